"""The sparse path: it lists the active pairs of a micro-batch and computes activations at these pairs alone.

With JumpReLU's default bandwidth (1.0) almost every feature receives a gradient, so the default configuration always
trains densely. For the sparse path use BatchTopK, TopK or ReLU, or a smaller `coder.bandwidth`.

A pair of a token and a feature is listed if the feature may be active at the token or have a gradient there:

- relu: if the feature is active
- jumprelu: if the pre-activation is above the threshold minus half a bandwidth (the straight-through window)
- topk, batchtopk: if the feature may be among the largest

A dense product finds the pairs. Everything after it reads only the pairs. A micro-batch whose pairs exceed the
capacity of the lists is computed densely; the metric `overflow` is the share of micro-batches that were.
"""

import jax
import jax.numpy as jnp

from jclt.coders import CoderConfig, CoderLayer, SparseCoder
from jclt.coders.activations import batch_thresholds, find_largest_reached, jump_relu, kth_largest
from jclt.kernels.active import (
    ActivePairs,
    all_fit,
    count_by_token,
    gather_by_feature,
    gather_by_token,
    gather_values,
    list_active,
)
from jclt.kernels.matmuls import sharded_einsum
from jclt.kernels.sparse_matmuls import PairEncoding
from jclt.mesh import PER_DEVICE_SPEC, TOKENS_FEATURES_SPEC, map_over_devices
from jclt.shapes import Array, Bool, Float
from jclt.training.config import TrainConfig

MARGIN = 0.8
"""Under BatchTopK the pairs are listed whose score is above this share of the running threshold of their layer. If a
threshold of the micro-batch is below it, the micro-batch is computed densely."""
BLOCK = 8
"""Features per block. TopK finds a lower bound of the k-th largest value among the maxima of blocks."""


def explain_why_not_sparse(config: TrainConfig) -> str | None:
    """Why a configuration has no sparse path, in words for a user; None if it has one."""
    return "auxiliary_weight reads every dead feature" if config.auxiliary_weight else None


def may_matter(
    config: CoderConfig, h: Float[Array, "N F"], threshold: Array | None, norms: Array, running: Array
) -> Bool[Array, "N F"]:
    """Where a feature of one layer may be active or have a gradient. `running` is BatchTopK's running threshold."""
    if config.activation == "jumprelu":
        assert threshold is not None
        return h > (threshold - config.bandwidth / 2)[None]
    if config.activation == "batchtopk":
        return jax.nn.relu(h) > (MARGIN * running / norms)[None]
    if config.activation == "topk":
        assert config.k is not None
        bound = kth_largest((find_block_maxima(jax.nn.relu(h)),), config.k, (1,))
        return h > bound * (1 - 1e-6)
    return h > 0


def find_block_maxima(x: Float[Array, "N F"]) -> Float[Array, "N C"]:
    """The maximum of every block of features. x must not be negative.

    The k-th largest of these maxima is never above the k-th largest of all values.
    """

    def find_on_device(x: Array) -> Array:
        blocks = -(-x.shape[1] // BLOCK)
        x = jnp.pad(x, ((0, 0), (0, blocks * BLOCK - x.shape[1])))
        return jnp.max(x.reshape(x.shape[0], BLOCK, blocks), axis=1)

    return map_over_devices(find_on_device, TOKENS_FEATURES_SPEC)(x)


def choose_active(
    config: TrainConfig,
    coder: SparseCoder,
    norms: tuple[Float[Array, "F"], ...],
    x: tuple[Float[Array, "N D"], ...],
    running: Array,
    capacity: float,
) -> tuple[tuple[PairEncoding, ...], Bool[Array, ""]]:
    """The active pairs of every layer with their pre-activations, and whether the lists hold all that matter.

    Nothing here has a gradient.
    """
    coder, norms, x = jax.lax.stop_gradient((coder, norms, x))
    encodings = []
    for index, (layer, norm, x_) in enumerate(zip(coder.layers, norms, x, strict=True)):
        h = coder.compute_preactivation(index, x_)
        pairs = list_active(may_matter(config.coder, h, layer.threshold, norm, running[index]), capacity)
        threshold = get_penalty_threshold(config, layer)
        shortfall, below = jnp.zeros_like(norm), None
        if config.preactivation != "none":
            shortfall = jnp.sum(jax.nn.relu(threshold[None] - h), axis=0)
            if not lists_all_above(config):
                below = map_over_devices(sum_below, (PER_DEVICE_SPEC, PER_DEVICE_SPEC))(h, x_, threshold)
        encodings.append(PairEncoding(pairs=pairs, h=gather_values(pairs, h), shortfall=shortfall, below=below))
    fits = all_fit(tuple(encoding.pairs for encoding in encodings))
    if config.coder.activation == "batchtopk":
        assert config.coder.k is not None
        scores = tuple(
            jax.nn.relu(encoding.h) * gather_by_feature(encoding.pairs, norm)
            for encoding, norm in zip(encodings, norms, strict=True)
        )
        thresholds = batch_thresholds(scores, config.coder.k, x[0].shape[0])
        fits &= jnp.all(thresholds >= MARGIN * running)
    return tuple(encodings), fits


def get_penalty_threshold(config: TrainConfig, layer: CoderLayer) -> Float[Array, "F"]:
    """The value below which the pre-activation penalty acts on a pre-activation."""
    return jnp.zeros_like(layer.threshold_or_zero) if config.preactivation == "zero" else layer.threshold_or_zero


def lists_all_above(config: TrainConfig) -> bool:
    """Whether every pair above `get_penalty_threshold` is listed."""
    activation = config.coder.activation
    return activation == "relu" or (activation == "jumprelu" and config.preactivation == "threshold")


def sum_below(h: Array, x: Array, threshold: Array) -> tuple[Float[Array, "F D"], Float[Array, "F"]]:
    """For each feature the sum of x over the tokens below its threshold, and the number of these tokens."""
    is_below = h < threshold[None]
    return sharded_einsum("nf,nd->fd", is_below.astype(x.dtype), x), jnp.sum(is_below, axis=0, dtype=jnp.float32)


def count_needed(
    config: TrainConfig, coder: SparseCoder, norms: tuple[Array, ...], x: tuple[Array, ...], running: Array
) -> Float[Array, ""]:
    """The pairs per token that the lists would need, in the layer and on the device that need most."""

    def count_on_device(matters: Array) -> Array:
        return (jnp.sum(matters, dtype=jnp.float32) / matters.shape[0])[None]

    maxima = []
    for index, (layer, norm, x_) in enumerate(zip(coder.layers, norms, x, strict=True)):
        matters = may_matter(
            config.coder, coder.compute_preactivation(index, x_), layer.threshold, norm, running[index]
        )
        maxima.append(jnp.max(map_over_devices(count_on_device, PER_DEVICE_SPEC)(matters)))
    return jnp.stack(maxima).max()


def activate_sparse(
    config: CoderConfig,
    pairs: tuple[ActivePairs, ...],
    h: list[Float[Array, "E"]],
    norms: list[Float[Array, "E"]],
    thresholds: list[Float[Array, "E"]],
    tokens: int,
) -> tuple[tuple[Float[Array, "E"], ...], Float[Array, "L"]]:
    """`forms.activate_dense` at the listed pairs. Norms and thresholds are those of each pair's feature."""
    if config.activation == "jumprelu":
        of_layers = zip(h, thresholds, strict=True)
        return tuple(jump_relu(h_, t, config.bandwidth, config.through) for h_, t in of_layers), jnp.zeros(len(h))
    a = tuple(jax.nn.relu(h_) for h_ in h)
    if config.activation == "relu":
        return a, jnp.zeros(len(h))
    assert config.k is not None
    if config.activation == "topk":
        constants = jax.lax.stop_gradient(a)
        bounds = [
            gather_by_token(p, find_kth_of_tokens(p, a_, config.k)) for p, a_ in zip(pairs, constants, strict=True)
        ]
        return tuple(jnp.where(a_ >= bound, a_, 0.0) for a_, bound in zip(a, bounds, strict=True)), jnp.zeros(len(h))
    scores = tuple(jax.lax.stop_gradient(a_ * norm) for a_, norm in zip(a, norms, strict=True))
    least = batch_thresholds(scores, config.k, tokens)
    masked = (
        jnp.where((score >= bound) & (score > 0), a_, 0.0) for a_, score, bound in zip(a, scores, least, strict=True)
    )
    return tuple(masked), least


def find_kth_of_tokens(pairs: ActivePairs, values: Float[Array, "E"], k: int) -> Float[Array, "N"]:
    """For each token the k-th largest value at its pairs. The values must not be negative."""

    def is_reached(value: Array) -> Array:
        return count_by_token(pairs, values >= gather_by_token(pairs, value)) >= k

    return find_largest_reached(is_reached, count_by_token(pairs, values < 0))
