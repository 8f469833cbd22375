"""The train step: tokens in, activations harvested from the frozen model, the coder trained; one compiled program.

Where things lie: the language model's tokens are split over every chip; its activations then move once, so that each
feature shard has all tokens of its data shard. From there on nothing with a feature axis ever leaves its chip. What
travels is the sum of the partial reconstructions, once a micro-batch, and some scalars.

On CPUs and TPUs the same state and batch give the same bits. On GPUs the sums over entries of the sparse path are made
by atomic additions, in no fixed order: there a run that is resumed may differ in its last bits from one that is not.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jclt.coders import SparseCoder, replacing
from jclt.coders.activations import gate, top_k
from jclt.coders.entries import of_features, summed_by_feature
from jclt.coders.products import decode
from jclt.coders.sparse import Found, sensed
from jclt.evaluation.replacement import divergence
from jclt.models import ModelConfig, forward
from jclt.shapes import Array, Float, Int, Params, Tokens
from jclt.sharding import as_placed, placed, reduced_later
from jclt.training import losses
from jclt.training.config import TrainConfig
from jclt.training.harvest import Harvest, Scaling, as_tokens, fold
from jclt.training.optimizers import coder_optimizer
from jclt.training.rules import activate, at_inference, with_thresholds
from jclt.training.shuffle import mixed
from jclt.training.source import activations
from jclt.training.sparse import activate_at, choose, least_wanted


class CoderState(NamedTuple):
    """Everything that a resumed run goes on from."""

    step: Array
    coder: SparseCoder  # on scaled activations; under JumpReLU `threshold` holds the threshold's logarithm
    optimizer: Any
    scaling: Scaling
    density: tuple[Float[Array, "F"], ...]  # running share of tokens on which each feature fires, from 0 on
    silent: tuple[Int[Array, "F"], ...]  # tokens since each feature last fired, counted up to `dead_after`
    running: Float[Array, ""]  # BatchTopK's running threshold
    skipped: Array  # steps whose loss was not finite
    skipped_in_row: Array
    room: Array  # entries a token, layer and device that the sparse path has room for; 0 on the dense path


def fresh_state(config: TrainConfig, coder: SparseCoder, scaling: Scaling) -> CoderState:
    """A run's first state, from its initial weights."""
    return CoderState(
        step=jnp.zeros((), jnp.int32),
        coder=coder,
        optimizer=jax.jit(coder_optimizer(config).init)(coder),
        scaling=scaling,
        density=tuple(jnp.zeros_like(own.encoder_bias) for own in coder.layers),
        silent=tuple(jnp.zeros_like(own.encoder_bias, jnp.int32) for own in coder.layers),
        running=jnp.zeros(()),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
        room=jnp.zeros(()),
    )


def dead_after(config: TrainConfig) -> int:
    """A feature that is silent on so many tokens is dead."""
    return round(1 / config.dead_density)


class Weights(NamedTuple):
    """What micro-batches are computed with, made of the trained weights once a step."""

    coder: SparseCoder  # `threshold` holds the threshold itself
    norms: tuple[Float[Array, "F"], ...]  # a pass over all decoders


class Batch(NamedTuple):
    """A micro-batch in the coder's terms: scaled, flat over tokens."""

    x: tuple[Float[Array, "N D"], ...]  # on every feature shard
    y: tuple[Float[Array, "N D"], ...]  # split over all devices


class Features(NamedTuple):
    """What encoding a micro-batch gives."""

    a: tuple[Float[Array, "N F"], ...]  # in the type that products are computed in
    penalty: Float[Array, ""]
    spare: tuple[Float[Array, "N F"], ...]  # what dead features would write under the auxiliary loss; else empty
    fired: tuple[Float[Array, "F"], ...]  # share of tokens
    least: Float[Array, ""]  # BatchTopK's threshold on this micro-batch


def prepare(trained: SparseCoder) -> Weights:
    return Weights(with_thresholds(trained), tuple(layer.norms for layer in trained.layers))


class Sensed(NamedTuple):
    """What penalties are made of, in one layer: everything of shape [N, F] with what belongs to features of shape
    [1, F], or both as lists of the entries where an activation is not 0 or has a gradient."""

    h: Float[Array, "*A"]
    a: Float[Array, "*A"]
    norms: Float[Array, "*#A"]
    threshold: Float[Array, "*#A"]


def sparsity_penalty(
    config: TrainConfig, each: list[Sensed], tokens: int, mean: Callable[[int, Array], Array]
) -> Float[Array, ""]:
    """`mean(layer, values)` is each feature's mean over tokens."""
    if config.sparsity_term == "tanh":
        return sum((losses.tanh_penalty(own.a, own.norms, config.tanh_scale, tokens) for own in each), jnp.zeros(()))
    if config.sparsity_term == "l1":
        return sum((losses.l1_penalty(own.a, own.norms, tokens) for own in each), jnp.zeros(()))
    if config.sparsity_term == "kl":
        means = (mean(layer, jnp.tanh(own.a)) for layer, own in enumerate(each))
        return sum((losses.kl_penalty(own, config.target_density) for own in means), jnp.zeros(()))
    if config.sparsity_term == "l0":
        c = config.coder
        gates: list[Any] = [gate(own.h, own.threshold, c.bandwidth, c.through) for own in each]
        return losses.l0_penalty(jnp.stack([jnp.sum(g) for g in gates]).sum() / tokens, config.target_l0)
    return jnp.zeros(())


def encode(
    config: TrainConfig, weights: Weights, x: tuple[Array, ...], silent: tuple[Array, ...], ramp: Array
) -> Features:
    """Activations and every penalty on them, each feature shard by itself."""
    coder, norms = weights
    h = tuple(coder.preactivation(layer, own) for layer, own in enumerate(x))
    a, least = activate(coder, h, norms)
    fired = tuple(jnp.mean(own > 0, axis=0, dtype=jnp.float32) for own in a)
    thresholds = [own.opens_at for own in coder.layers]
    of_features = [(norm[None], threshold[None]) for norm, threshold in zip(norms, thresholds, strict=True)]
    each = [Sensed(h_, a_, *own) for h_, a_, own in zip(h, a, of_features, strict=True)]
    penalty = sparsity_penalty(config, each, x[0].shape[0], lambda _, values: jnp.mean(values, axis=0))
    penalty *= config.sparsity_weight * ramp
    if config.preactivation == "zero":
        penalty += config.preactivation_weight * sum(losses.below_zero_penalty(h_) for h_ in h)
    elif config.preactivation == "threshold":
        penalty += config.preactivation_weight * sum(
            losses.below_threshold_penalty(h_, threshold, norm)
            for h_, norm, threshold in zip(h, norms, thresholds, strict=True)
        )

    spare = ()
    if config.auxiliary_weight:
        k = min(config.auxiliary_k, config.coder.features)
        dead = tuple(losses.dead_values(h_, own >= dead_after(config)) for h_, own in zip(h, silent, strict=True))
        spare = tuple(top_k(own, k) for own in dead)
    low = x[0].dtype
    return Features(tuple(own.astype(low) for own in a), penalty, tuple(own.astype(low) for own in spare), fired, least)


def encode_at(
    config: TrainConfig, weights: Weights, x: tuple[Array, ...], chosen: tuple[Found, ...], ramp: Array
) -> Features:
    """`encode` where features are listed: equal to it as long as no other feature is active or has a gradient."""
    (coder, norms), tokens = weights, x[0].shape[0]
    entries = tuple(own.entries for own in chosen)
    made = [
        sensed(own, x_, layer.encoder, layer.encoder_bias, least_wanted(config, layer))
        for own, x_, layer in zip(chosen, x, coder.layers, strict=True)
    ]
    h, shortfalls = [own[0] for own in made], [own[1] for own in made]
    thresholds = [own.opens_at for own in coder.layers]
    at = [(of_features(e, norm), of_features(e, t)) for e, norm, t in zip(entries, norms, thresholds, strict=True)]
    a, least = activate_at(coder.config, entries, h, at, tokens)
    each = [Sensed(h_, a_, *own) for h_, a_, own in zip(h, a, at, strict=True)]
    fired = tuple(summed_by_feature(e, (a_ > 0).astype(jnp.float32)) / tokens for e, a_ in zip(entries, a, strict=True))
    penalty = sparsity_penalty(
        config, each, tokens, lambda layer, values: summed_by_feature(entries[layer], values) / tokens
    )
    penalty *= config.sparsity_weight * ramp
    if config.preactivation != "none":
        weighs = norms if config.preactivation == "threshold" else (1.0,) * len(norms)
        below = (jnp.sum(short * weight) / tokens for short, weight in zip(shortfalls, weighs, strict=True))
        penalty += config.preactivation_weight * sum(below)
    return Features(tuple(own.astype(x[0].dtype) for own in a), penalty, (), fired, least)


def objective(
    config: TrainConfig,
    share: float,
    weights: Weights,
    batch: Batch,
    silent: tuple[Array, ...],
    ramp: Array,
    chosen: tuple[Found, ...] | None = None,
) -> tuple[Array, dict[str, Any]]:
    """The loss of a micro-batch, of which the squared error counts `share`, and what there is to report."""
    entries = None
    with jax.named_scope("encode"):
        if chosen is not None:
            found = encode_at(config, weights, batch.x, chosen, ramp)
            entries = tuple(own.entries for own in chosen)
        else:
            encoder = jax.checkpoint(encode, static_argnums=0) if config.remat else encode
            found = encoder(config, weights, batch.x, silent, ramp)
    with jax.named_scope("decode"):
        written = weights.coder.decode(found.a, batch.x, entries)
    error = jnp.stack([losses.squared_error(y_, y) for y_, y in zip(written, batch.y, strict=True)])
    loss = share * jnp.sum(error) + found.penalty
    if config.auxiliary_weight:
        with jax.named_scope("auxiliary"):
            spare = decode(found.spare, tuple(own.rows for own in weights.coder.layers))
            missing = [jax.lax.stop_gradient(y - y_) for y_, y in zip(written, batch.y, strict=True)]
            left = sum(losses.squared_error(s_, y) for s_, y in zip(spare, missing, strict=True))
            loss += config.auxiliary_weight * left
    report = {"loss": loss, "error": error, "penalty": found.penalty}
    return loss, jax.lax.stop_gradient(report | {"fired": found.fired, "least": found.least})


def micro_batches(config: TrainConfig, scaling: Scaling, found: Harvest) -> Callable[[Array | int], Batch]:
    """The i-th micro-batch as a function of i: a stretch of every row's positions, so that no chip is left out."""
    length = found.reads.shape[2] // config.micro_batches

    def batch(i: Array | int) -> Batch:
        cut = [jax.lax.dynamic_slice_in_dim(x, i * length, length, axis=2) for x in (found.reads, found.writes)]
        x = as_tokens(cut[0], scaling.read_mean, scaling.read_scale, jnp.dtype(config.compute))
        y = as_tokens(cut[1], scaling.write_mean, scaling.write_scale, jnp.float32)
        layers = range(len(x))
        with jax.named_scope("reshard"):
            # What features read goes to all of them; what they write is compared where its tokens are.
            return Batch(tuple(placed(x[i], ("tokens", None)) for i in layers), tuple(y[i] for i in layers))

    return batch


def variance(x: Float[Array, "L B T D"]) -> Float[Array, "L D"]:
    """Over tokens, where they lie."""
    wide = x.astype(jnp.float32)
    centred = wide - placed(jnp.mean(wide, axis=(1, 2), keepdims=True), (None,) * 4)
    return placed(jnp.mean(jnp.square(centred), axis=(1, 2)), (None, None))


def gradients(
    config: TrainConfig, share: float, state: CoderState, found: Harvest, ramp: Array, room: float | None = None
) -> tuple[Any, Any]:
    """Gradient and report, averaged over micro-batches. Gradients of matrices travel over `data` once, at the end.

    With `room` for so many entries a token, layer and device only these are computed with; a micro-batch that needs
    more is computed densely.
    """
    batch = micro_batches(config, state.scaling, found)
    weights, to_trained = jax.vjp(prepare, state.coder)
    differentiate = jax.grad(partial(objective, config, share), has_aux=True)
    once = jax.tree.map(lambda x: reduced_later(x) if x.ndim > 1 else x, weights)

    def one(own: Batch) -> tuple[Any, Any]:
        def densely() -> tuple[Any, Any]:
            return differentiate(once, own, state.silent, ramp)

        if room is None:
            return densely()
        with jax.named_scope("choose"):
            chosen, fits = choose(config, weights.coder, weights.norms, own.x, state.running, room)
        gradient, report = jax.lax.cond(fits, lambda: differentiate(once, own, state.silent, ramp, chosen), densely)
        return gradient, report | {"overflow": 1.0 - fits.astype(jnp.float32)}

    first = batch(0)
    if config.micro_batches == 1:
        total = one(first)
    else:
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding), jax.eval_shape(one, first))

        def add_one(carry: tuple[Any, Batch], i: Array) -> tuple[tuple[Any, Batch], None]:
            total, own = carry
            part = one(own)
            # The next inputs travel beside what is left to do once these have had their last use, in the encoders'
            # gradients: then they can take their place, and need not be copied.
            i, _ = jax.lax.optimization_barrier((i, [layer.encoder for layer in part[0].coder.layers]))
            return (jax.tree.map(jnp.add, total, part), batch(i)), None

        numbers = jnp.minimum(jnp.arange(config.micro_batches) + 1, config.micro_batches - 1)  # nothing uses the last
        (total, _), _ = jax.lax.scan(add_one, (zero, first), numbers)
    with jax.named_scope("reduce"):
        total = jax.tree.map(as_placed, total[0], weights), total[1]
    gradient, report = jax.tree.map(lambda x: x / config.micro_batches, total)
    # The decoder biases' gradient is the mean error, times 2 and its share in the loss.
    drift = [jnp.sum(jnp.square(own.decoder_bias / (2 * share))) for own in gradient.coder.layers]
    with jax.named_scope("spread"):
        spread = jnp.sum(variance(found.writes) / jnp.square(state.scaling.write_scale), axis=1)
    return to_trained(gradient)[0], report | {"drift": jnp.stack(drift), "spread": spread}


def end_to_end(
    config: TrainConfig, model: ModelConfig, params: Params, trained: SparseCoder, state: CoderState, tokens: Tokens
) -> Float[Array, ""]:
    """KL(model || replacement model) over all positions, every covered site replaced by the coder as at inference."""
    coder = fold(at_inference(trained, state.running), state.scaling)
    right, _, _ = forward(model, params, tokens)
    replaced, _, _ = forward(model, params, tokens, edit=replacing(coder, trained=True), unroll=True)
    return jnp.mean(divergence(jax.lax.stop_gradient(right), replaced))


def update(config: TrainConfig, state: CoderState, gradient: Any, report: dict[str, Any]) -> CoderState:
    """The next state; where the loss or the gradient is not finite the old one, with the step counted as skipped."""
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix types
        norm = optax.tree.norm(gradient)
        fine = jnp.isfinite(report["loss"]) & jnp.isfinite(norm)
        params: Any = state.coder
        moved, inner = coder_optimizer(config).update(gradient, state.optimizer, params)
        coder = optax.apply_updates(params, moved)
    keep = config.density_decay
    density = tuple(keep * old + (1 - keep) * new for old, new in zip(state.density, report["fired"], strict=True))
    tokens, most = config.batch * config.length, dead_after(config)
    silent = tuple(
        jnp.where(new > 0, 0, jnp.minimum(old + tokens, most))
        for old, new in zip(state.silent, report["fired"], strict=True)
    )
    first = state.running == 0
    decay = jnp.where(first, 0.0, config.running_decay)
    running = decay * state.running + (1 - decay) * report["least"]
    old = (state.coder, state.optimizer, state.density, state.silent, state.running)
    kept: Any = jax.tree.map(partial(jnp.where, fine), (coder, inner, density, silent, running), old)
    bad = (~fine).astype(jnp.int32)
    coder, inner, density, silent, running = kept
    return CoderState(
        step=state.step + 1,
        coder=coder,
        optimizer=inner,
        scaling=state.scaling,
        density=density,
        silent=silent,
        running=running,
        skipped=state.skipped + bad,
        skipped_in_row=bad * (state.skipped_in_row + 1),
        room=state.room,
    )


@partial(jax.jit, static_argnames=("config", "model", "ends", "room"), donate_argnames=("state", "buffer"))
def train_step(
    config: TrainConfig,
    model: ModelConfig,
    ends: bool,
    state: CoderState,
    buffer: Harvest | None,
    params: Params,
    batch: Tokens | Harvest,
    room: float | None = None,
) -> tuple[CoderState, Harvest | None, dict[str, Any]]:
    """One step on tokens, or on activations that were harvested before; `ends` adds the end-to-end term, `room` takes
    the sparse path."""
    with jax.named_scope("harvest"):
        found = activations(config, model, params, batch)
    if buffer is not None:
        with jax.named_scope("shuffle"):
            buffer, found = mixed(buffer, found, state.step + config.shuffle - 1, config.seed)
    ramp = jnp.minimum(1.0, (state.step + 1) / max(1, round(config.sparsity_ramp * config.steps))).astype(jnp.float32)
    share = 1 / (1 + config.end_to_end_weight) if ends else 1.0
    gradient, report = gradients(config, share, state, found, ramp, room)
    if ends:
        assert not isinstance(batch, Harvest)
        with jax.named_scope("end_to_end"):
            differentiate = jax.value_and_grad(partial(end_to_end, config, model, params))
            kl, more = differentiate(state.coder, state, batch)
        of_kl = (1 - share) * losses.as_large(jnp.sum(report["error"]), kl)
        gradient = jax.tree.map(lambda a, b: a + of_kl * b, gradient, more)
        report |= {"kl": kl}
    with jax.named_scope("update"):
        new = update(config, state, gradient, report)
    return new, buffer, metrics(config, new, report, optax.tree.norm(gradient), ramp)


DECADES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Edges of the density histogram: shares of features that fire on fewer tokens than the first, on fewer than the
second, and so on, by the running average."""


def metrics(config: TrainConfig, state: CoderState, report: dict[str, Any], norm: Array, ramp: Array) -> dict[str, Any]:
    """What a step reports: numbers for all layers together, and lists with one for each.

    Normalised error is ||y - y'||^2 over the spread of y about its mean on these tokens; explained variance forgives
    the part of the error that is constant. A layer without spread has an error of 0 and does not count in the mean.
    How many features are dead is NaN until there have been as many tokens as it takes to tell.
    """
    l0 = jnp.stack([jnp.sum(fired) for fired in report["fired"]])
    spread = report["spread"]
    varies = spread > 0
    layers = jnp.maximum(1, jnp.sum(varies, dtype=jnp.float32))
    nmse, unexplained = (
        jnp.where(varies, error / jnp.where(varies, spread, 1.0), 0.0)
        for error in (report["error"], report["error"] - report["drift"])
    )
    steps = jnp.maximum(1, state.step - state.skipped)
    # Of an average that started at 0 only so much is made of densities.
    seen = 1 - jnp.power(jnp.float32(config.density_decay), steps.astype(jnp.float32))
    below = [jnp.stack([jnp.mean(own < edge * seen, dtype=jnp.float32) for own in state.density]) for edge in DECADES]
    most = dead_after(config)
    dead = jnp.stack([jnp.mean(own >= most, dtype=jnp.float32) for own in state.silent])
    dead = jnp.where(steps >= -(-most // (config.batch * config.length)), dead, jnp.nan)
    return {
        "loss": report["loss"],
        "nmse": jnp.sum(nmse) / layers,
        "explained": 1 - jnp.sum(unexplained) / layers,
        "l0": jnp.sum(l0),
        "dead": jnp.mean(dead),
        "penalty": report["penalty"],
        "gradient_norm": norm,
        "ramp": ramp,
        "skipped": state.skipped,
        "skipped_in_row": state.skipped_in_row,
        **{name: report[name] for name in ("kl", "overflow") if name in report},
        "layers_nmse": nmse,
        "layers_explained": 1 - unexplained,
        "layers_l0": l0,
        "layers_dead": dead,
        "density_histogram": jnp.diff(jnp.stack(below).mean(axis=1), prepend=0.0, append=1.0),
    }
