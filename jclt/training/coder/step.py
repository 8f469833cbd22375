"""The train step, one compiled program: tokens in, activations harvested from the frozen model, the coder trained.

Sharding: the tokens of the language model are split over all chips. Its activations are sent once, so that each feature
shard has all tokens of its data shard. Arrays with a feature axis are never communicated within a data shard: the only
large collective is one all-reduce of the reconstructions per micro-batch, beside some scalars.

Reproducibility: on CPUs and TPUs the same state and batch give the same bits. On GPUs the sums of the sparse path use
atomic additions, in no fixed order; there a resumed run may differ in its last bits from one that was never stopped.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jclt.coders import CoderReplacement, SparseCoder
from jclt.mesh import defer_gradient_sum, shard_by_axes, shard_like
from jclt.models import ModelConfig, forward
from jclt.numerics import kl_divergence
from jclt.shapes import Array, Float, Params, Tokens
from jclt.training.coder import losses
from jclt.training.coder.batches import harvest_batch
from jclt.training.coder.forms import to_inference_form
from jclt.training.coder.harvest import Harvest, Scaling, fold_scaling, scale_tokens
from jclt.training.coder.objective import MicroBatch, compute_objective, prepare_weights
from jclt.training.coder.report import compute_metrics
from jclt.training.coder.shuffle import mix_batches
from jclt.training.coder.sparse import choose_active
from jclt.training.coder.state import DENSITY_DECAY, THRESHOLD_DECAY, CoderState, tokens_until_dead
from jclt.training.config import TrainConfig
from jclt.training.optimizers import make_coder_optimizer


def split_micro_batches(config: TrainConfig, scaling: Scaling, harvest: Harvest) -> Callable[[Array | int], MicroBatch]:
    """The i-th micro-batch as a function of i: a stretch of every row's positions, so that every chip has a part."""
    length = harvest.reads.shape[2] // config.micro_batches

    def make_batch(i: Array | int) -> MicroBatch:
        reads, writes = (
            jax.lax.dynamic_slice_in_dim(x, i * length, length, axis=2) for x in (harvest.reads, harvest.writes)
        )
        x = scale_tokens(reads, scaling.read_mean, scaling.read_scale, jnp.dtype(config.compute))
        y = scale_tokens(writes, scaling.write_mean, scaling.write_scale, jnp.float32)
        layers = range(len(x))
        with jax.named_scope("reshard"):
            # Every feature shard needs all inputs; targets stay where their tokens are, and are compared there.
            return MicroBatch(
                x=tuple(shard_by_axes(x[layer], ("tokens", None)) for layer in layers),
                y=tuple(y[layer] for layer in layers),
            )

    return make_batch


def compute_variance(x: Float[Array, "L B T D"]) -> Float[Array, "L D"]:
    """The variance over tokens, computed where the tokens are."""
    x = x.astype(jnp.float32)
    centred = x - shard_by_axes(jnp.mean(x, axis=(1, 2), keepdims=True), (None,) * 4)
    return shard_by_axes(jnp.mean(jnp.square(centred), axis=(1, 2)), (None, None))


def compute_gradients(
    config: TrainConfig,
    share: float,
    state: CoderState,
    harvest: Harvest,
    ramp: Array,
    capacity: float | None = None,
) -> tuple[Any, Any]:
    """The gradient and the report of a step, both averaged over micro-batches.

    With a `capacity`, in pairs per token, layer and device, a micro-batch is computed on the sparse path; one whose
    active pairs exceed the capacity is computed densely. `share` is the weight of the squared error.
    """
    make_batch = split_micro_batches(config, state.scaling, harvest)
    weights, pull_back = jax.vjp(prepare_weights, state.coder)
    differentiate = jax.grad(partial(compute_objective, config, share), has_aux=True)
    # Gradients of matrices are summed over data shards once, after the last micro-batch.
    deferred = jax.tree.map(lambda x: defer_gradient_sum(x) if x.ndim > 1 else x, weights)

    def differentiate_batch(batch: MicroBatch) -> tuple[Any, Any]:
        def differentiate_dense() -> tuple[Any, Any]:
            return differentiate(deferred, batch, state.silent, ramp)

        if capacity is None:
            return differentiate_dense()
        with jax.named_scope("choose"):
            encodings, fits = choose_active(config, weights.coder, weights.norms, batch.x, state.running, capacity)
        gradient, report = jax.lax.cond(
            fits, lambda: differentiate(deferred, batch, state.silent, ramp, encodings), differentiate_dense
        )
        return gradient, report | {"overflow": 1.0 - fits.astype(jnp.float32)}

    gradient, report = sum_over_micro_batches(differentiate_batch, make_batch, config.micro_batches)
    with jax.named_scope("reduce"):
        gradient = jax.tree.map(shard_like, gradient, weights)
    gradient, report = jax.tree.map(lambda x: x / config.micro_batches, (gradient, report))
    # The gradient of a decoder bias is 2 * share * the mean error, so `drift` is the square of the mean error.
    drift = [jnp.sum(jnp.square(layer.decoder_bias / (2 * share))) for layer in gradient.coder.layers]
    with jax.named_scope("spread"):
        spread = jnp.sum(compute_variance(harvest.writes) / jnp.square(state.scaling.write_scale), axis=1)
    return pull_back(gradient)[0], report | {"drift": jnp.stack(drift), "spread": spread}


def sum_over_micro_batches(
    differentiate: Callable[[MicroBatch], tuple[Any, Any]], make_batch: Callable[[Array | int], MicroBatch], count: int
) -> tuple[Any, Any]:
    """Gradient and report, each summed over so many micro-batches."""
    first = make_batch(0)
    if count == 1:
        return differentiate(first)
    shapes = jax.eval_shape(differentiate, first)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding), shapes)

    def add_batch(carry: tuple[Any, MicroBatch], following: Array) -> tuple[tuple[Any, MicroBatch], None]:
        total, batch = carry
        added = differentiate(batch)
        # The inputs of the following batch are sent only after the last use of this batch's inputs, in the gradients of
        # the encoders. Then they can take the same memory and need not be copied.
        following, _ = jax.lax.optimization_barrier((following, [layer.encoder for layer in added[0].coder.layers]))
        return (jax.tree.map(jnp.add, total, added), make_batch(following)), None

    following = jnp.minimum(jnp.arange(count) + 1, count - 1)  # the batch made in the last round is not used
    (total, _), _ = jax.lax.scan(add_batch, (zero, first), following)
    return total


def end_to_end_loss(
    config: TrainConfig, model: ModelConfig, params: Params, trained: SparseCoder, state: CoderState, tokens: Tokens
) -> Float[Array, ""]:
    """KL(model || replacement model) over all positions. The coder replaces every covered site, as at inference."""
    coder = fold_scaling(to_inference_form(trained, state.running), state.scaling)
    logits, _, _ = forward(model, params, tokens)
    replaced, _, _ = forward(model, params, tokens, edit=CoderReplacement(coder, trained=True), unroll=True)
    return jnp.mean(kl_divergence(jax.lax.stop_gradient(logits), replaced))


def update_state(config: TrainConfig, state: CoderState, gradient: Any, report: dict[str, Any]) -> CoderState:
    """The next state. If the loss or the gradient is not finite, only the step and the skipped steps are counted."""
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix types
        norm = optax.tree.norm(gradient)
        is_finite = jnp.isfinite(report["loss"]) & jnp.isfinite(norm)
        params: Any = state.coder
        updates, optimizer = make_coder_optimizer(config).update(gradient, state.optimizer, params)
        coder: Any = optax.apply_updates(params, updates)
    density = tuple(
        DENSITY_DECAY * old + (1 - DENSITY_DECAY) * fired
        for old, fired in zip(state.density, report["fired"], strict=True)
    )
    tokens, limit = config.batch * config.length, tokens_until_dead(config)
    silent = tuple(
        jnp.where(fired > 0, 0, jnp.minimum(old + tokens, limit))
        for old, fired in zip(state.silent, report["fired"], strict=True)
    )
    decay = jnp.where(state.running == 0, 0.0, THRESHOLD_DECAY)
    running = decay * state.running + (1 - decay) * report["batch_threshold"]
    updated = state._replace(coder=coder, optimizer=optimizer, density=density, silent=silent, running=running)
    kept: CoderState = jax.tree.map(partial(jnp.where, is_finite), updated, state)
    is_skipped = (~is_finite).astype(jnp.int32)
    return kept._replace(
        step=state.step + 1,
        skipped=state.skipped + is_skipped,
        skipped_in_row=is_skipped * (state.skipped_in_row + 1),
    )


@partial(jax.jit, static_argnames=("config", "model", "end_to_end", "capacity"), donate_argnames=("state", "buffer"))
def train_step(
    config: TrainConfig,
    model: ModelConfig,
    end_to_end: bool,
    state: CoderState,
    buffer: Harvest | None,
    params: Params,
    batch: Tokens | Harvest,
    capacity: float | None = None,
) -> tuple[CoderState, Harvest | None, dict[str, Any]]:
    """One step on a batch of tokens, or of stored activations: the next state, the shuffle buffer and the metrics.

    `end_to_end` adds the end-to-end term to the loss. With a `capacity` the step takes the sparse path.
    """
    with jax.named_scope("harvest"):
        harvest = harvest_batch(config, model, params, batch)
    if buffer is not None:
        with jax.named_scope("shuffle"):
            buffer, harvest = mix_batches(buffer, harvest, state.step + config.shuffle - 1, config.seed)
    ramp = jnp.minimum(1.0, (state.step + 1) / max(1, round(config.sparsity_ramp * config.steps))).astype(jnp.float32)
    share = 1 / (1 + config.end_to_end_weight) if end_to_end else 1.0
    gradient, report = compute_gradients(config, share, state, harvest, ramp, capacity)
    if end_to_end:
        assert not isinstance(batch, Harvest)
        with jax.named_scope("end_to_end"):
            differentiate = jax.value_and_grad(partial(end_to_end_loss, config, model, params))
            kl, kl_gradient = differentiate(state.coder, state, batch)
        factor = (1 - share) * losses.balance_kl(jnp.sum(report["error"]), kl)
        gradient = jax.tree.map(lambda of_error, of_kl: of_error + factor * of_kl, gradient, kl_gradient)
        report |= {"kl": kl}
    with jax.named_scope("update"):
        new = update_state(config, state, gradient, report)
    return new, buffer, compute_metrics(config, new, report, optax.tree.norm(gradient), ramp)
