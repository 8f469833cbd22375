"""What the sparse path computes with: the entries of a micro-batch, and the rules that are read off them.

An entry is a feature at a token that is active or, under JumpReLU, within the straight-through window; under TopK and
BatchTopK one that may be among the largest. A dense product finds them; all that comes after touches nothing else.
"""

import jax
import jax.numpy as jnp

from jclt.coders import CoderConfig, CoderLayer, SparseCoder
from jclt.coders.activations import jump_relu, kth_largest, largest_reached
from jclt.kernels.active import Entries, all_found_places, counted_by_token, listed, of_tokens, taken
from jclt.kernels.matmuls import einsum
from jclt.kernels.sparse_matmuls import Found
from jclt.mesh import ENTRIES, TOKENS_AND_FEATURES, on_each_device
from jclt.shapes import Array, Bool, Float
from jclt.training.config import TrainConfig

MARGIN = 0.8
"""Under BatchTopK entries are features whose score is above this share of the running threshold. The batch's own lies
above it, or the micro-batch is computed densely."""
BLOCK = 8
"""Features whose largest value stands for them where TopK looks for a lower bound."""


def reason_against(config: TrainConfig) -> str | None:
    """Why a configuration has no sparse path, in words for a user; None where it has one."""
    return "auxiliary_weight reads every dead feature" if config.auxiliary_weight else None


def matters(
    config: CoderConfig, h: Float[Array, "N F"], threshold: Array | None, norms: Array, running: Array
) -> Bool[Array, "N F"]:
    """Where a feature of one layer may be active or have a gradient."""
    if config.activation == "jumprelu":
        assert threshold is not None
        return h > (threshold - config.bandwidth / 2)[None]
    if config.activation == "batchtopk":
        return jax.nn.relu(h) > (MARGIN * running / norms)[None]
    if config.activation == "topk":
        assert config.k is not None
        bound = kth_largest((largest_of_blocks(jax.nn.relu(h)),), config.k, (1,))
        return h > bound * (1 - 1e-6)
    return h > 0


def largest_of_blocks(x: Float[Array, "N F"]) -> Float[Array, "N C"]:
    """Of non-negative numbers. The k-th largest of these is no larger than the k-th largest of all."""

    def own(x: Array) -> Array:
        blocks = -(-x.shape[1] // BLOCK)
        x = jnp.pad(x, ((0, 0), (0, blocks * BLOCK - x.shape[1])))
        return jnp.max(x.reshape(x.shape[0], BLOCK, blocks), axis=1)

    return on_each_device(own, TOKENS_AND_FEATURES)(x)


def choose(
    config: TrainConfig,
    coder: SparseCoder,
    norms: tuple[Float[Array, "F"], ...],
    x: tuple[Float[Array, "N D"], ...],
    running: Array,
    room: float,
) -> tuple[tuple[Found, ...], Bool[Array, ""]]:
    """The entries of every layer, and whether they are all that matter. Without a gradient."""
    coder, norms, x = jax.lax.stop_gradient((coder, norms, x))
    found = []
    for layer, (own, norm, x_) in enumerate(zip(coder.layers, norms, x, strict=True)):
        h = coder.preactivation(layer, x_)
        entries = listed(matters(config.coder, h, own.threshold, norm, running), room)
        threshold = least_wanted(config, own)
        shortfall, below = jnp.zeros_like(norm), None
        if config.preactivation != "none":
            shortfall = jnp.sum(jax.nn.relu(threshold[None] - h), axis=0)
            if not lists_all_above(config):
                below = on_each_device(below_of, (ENTRIES, ENTRIES))(h, x_, threshold)
        found.append(Found(entries, taken(entries, h), shortfall, below))
    fits = all_found_places(tuple(own.entries for own in found))
    if config.coder.activation == "batchtopk":
        assert config.coder.k is not None
        listed_in_all = jnp.stack([jnp.sum(own.entries.found) for own in found]).sum()
        fits &= listed_in_all >= config.coder.k * x[0].shape[0]
    return tuple(found), fits


def least_wanted(config: TrainConfig, layer: CoderLayer) -> Float[Array, "F"]:
    """What the pre-activation penalty wants each pre-activation to reach."""
    return jnp.zeros_like(layer.opens_at) if config.preactivation == "zero" else layer.opens_at


def lists_all_above(config: TrainConfig) -> bool:
    """Whether all that reaches `least_wanted` is an entry."""
    rule = config.coder.activation
    return rule == "relu" or (rule == "jumprelu" and config.preactivation == "threshold")


def below_of(h: Array, x: Array, threshold: Array) -> tuple[Float[Array, "F D"], Float[Array, "F"]]:
    is_below = h < threshold[None]
    return einsum("nf,nd->fd", is_below.astype(x.dtype), x), jnp.sum(is_below, axis=0, dtype=jnp.float32)


def needed(
    config: TrainConfig, coder: SparseCoder, norms: tuple[Array, ...], x: tuple[Array, ...], running: Array
) -> Float[Array, ""]:
    """Entries a token, in the layer and on the device that have most."""

    def count(own: Array) -> Array:
        return (jnp.sum(own, dtype=jnp.float32) / own.shape[0])[None]

    most = []
    for layer, (own, norm, x_) in enumerate(zip(coder.layers, norms, x, strict=True)):
        where = matters(config.coder, coder.preactivation(layer, x_), own.threshold, norm, running)
        most.append(jnp.max(on_each_device(count, ENTRIES)(where)))
    return jnp.stack(most).max()


def activate_at(
    config: CoderConfig, entries: tuple[Entries, ...], h: list[Array], at: list[tuple[Array, Array]], tokens: int
) -> tuple[tuple[Float[Array, "E"], ...], Float[Array, ""]]:
    """`rules.activate` at the entries, each with the norm and the threshold of its feature."""
    if config.activation == "jumprelu":
        pairs = zip(h, at, strict=True)
        return tuple(jump_relu(own, t, config.bandwidth, config.through) for own, (_, t) in pairs), jnp.zeros(())
    a = tuple(jax.nn.relu(own) for own in h)
    if config.activation == "relu":
        return a, jnp.zeros(())
    assert config.k is not None
    if config.activation == "topk":
        values = zip(entries, jax.lax.stop_gradient(a), strict=True)
        bounds = [of_tokens(where, kth_of_tokens(where, own, config.k)) for where, own in values]
        pairs = zip(a, bounds, strict=True)
        return tuple(jnp.where(own >= bound, own, 0.0) for own, bound in pairs), jnp.zeros(())
    scores = tuple(jax.lax.stop_gradient(own * norm) for own, (norm, _) in zip(a, at, strict=True))
    least = kth_largest(scores, config.k * tokens, (0,)).reshape(())
    kept = tuple(jnp.where((s >= least) & (s > 0), own, 0.0) for own, s in zip(a, scores, strict=True))
    return kept, least


def kth_of_tokens(entries: Entries, values: Float[Array, "E"], k: int) -> Float[Array, "N"]:
    """The k-th largest of each token's entries, which are not negative."""

    def is_reached(value: Array) -> Array:
        return counted_by_token(entries, values >= of_tokens(entries, value)) >= k

    return largest_reached(is_reached, counted_by_token(entries, values < 0))
