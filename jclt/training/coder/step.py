"""The train step: tokens in, activations harvested from the frozen model, the coder trained; one compiled program.

Where things lie: the language model's tokens are split over every chip; its activations then move once, so that each
feature shard has all tokens of its data shard. From there on nothing with a feature axis ever leaves its chip. What
travels is the sum of the partial reconstructions, once a micro-batch, and some scalars.

On CPUs and TPUs the same state and batch give the same bits. On GPUs the sums over entries of the sparse path are made
by atomic additions, in no fixed order: there a run that is resumed may differ in its last bits from one that is not.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jclt.coders import SparseCoder, replacing
from jclt.evaluation.replacement import divergence
from jclt.mesh import as_placed, placed, reduced_later
from jclt.models import ModelConfig, forward
from jclt.shapes import Array, Float, Params, Tokens
from jclt.training.coder import losses
from jclt.training.coder.batches import activations
from jclt.training.coder.forms import at_inference
from jclt.training.coder.harvest import Harvest, Scaling, as_tokens, fold
from jclt.training.coder.objective import Batch, objective, prepare
from jclt.training.coder.report import metrics
from jclt.training.coder.shuffle import mixed
from jclt.training.coder.sparse import choose
from jclt.training.coder.state import CoderState, dead_after
from jclt.training.config import TrainConfig
from jclt.training.optimizers import coder_optimizer


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
