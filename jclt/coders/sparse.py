"""A coder's products where features are active and nowhere else: the numbers of `products`, at the cost of the entries.

Two sums do all the work. `row_sums` adds up weighted rows of a table for each group: rows of a decoder for each token
make what is written, errors of tokens for each feature make the gradient of its decoder. `row_products` multiplies
each entry's row with what its group holds: a decoder's row with a token's error is the gradient to the activation.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jclt.coders.entries import Entries
from jclt.models.ops import held, wide
from jclt.shapes import Array, Float, Int
from jclt.sharding import ENTRIES, FEATURES, TOKENS, on_each_device, placed, sum_over

SLOTS = 8
"""Entries of a group that are added up in one pass over all groups; beyond so many a group's others are added in pieces
of as many, one after the other."""
ROUNDS = 4
"""Passes over all groups at most."""
BLOCK = 16
"""Groups whose rows are gathered at once to be multiplied."""


def slots_for(places: int, groups: int) -> int:
    """Slots of a group: as many as there are places for it on average, in whole passes."""
    return min(max(1, -(-places // (groups * SLOTS))), ROUNDS) * SLOTS


def row_sums(
    starts: Int[Array, "_"], index: Int[Array, "E"], value: Float[Array, "E"], table: Float[Array, "I *D"]
) -> Float[Array, "G *D"]:
    """For each group the sum of its entries' values times the rows of the table that they name. The entries of group g
    stand from starts[g] to starts[g + 1]."""
    slots = slots_for(index.shape[0], starts.shape[0] - 1)
    out = jnp.zeros((starts.shape[0] - 1, *table.shape[1:]), wide(table.dtype))

    def weighted(begin: Array, end: Array, count: int) -> Array:
        at, holds = window(begin, end, count, index.shape[0])
        rows = jnp.where(holds, index[at], 0)  # the same one wherever there is no entry
        weights = jnp.where(holds, value[at].astype(out.dtype), 0.0)
        across = (slice(None), *(None,) * (table.ndim - 1))
        terms = [weights[:, j][across] * table[rows[:, j]].astype(out.dtype) for j in range(count)]
        return sum(terms[1:], terms[0])

    for begin in range(0, slots, SLOTS):
        out = out + weighted(starts[:-1] + begin, starts[1:], SLOTS)

    def add(group: Array, begin: Array, end: Array, out: Array) -> Array:
        return out.at[group].add(weighted(begin[None], end[None], slots)[0])

    return for_each_piece(starts, slots, add, out)


def row_products(
    starts: Int[Array, "_"], index: Int[Array, "E"], own: Float[Array, "G *D"], table: Float[Array, "I *D"]
) -> Float[Array, "E"]:
    """For each entry the inner product of what its group holds with the row of the table that it names."""
    groups, slots = starts.shape[0] - 1, slots_for(index.shape[0], starts.shape[0] - 1)
    block = max(size for size in range(1, BLOCK + 1) if groups % size == 0)
    own, table = own.reshape(groups, -1), table.reshape(table.shape[0], -1)
    dtype = wide(own.dtype)

    def multiplied(held: Array, begin: Array, end: Array) -> Array:
        at, holds = window(begin, end, slots, index.shape[0])
        rows = table[jnp.where(holds, index[at], 0)].astype(dtype)
        return jnp.einsum("gd,gsd->gs", held.astype(dtype), rows, precision="highest")

    def products(i: Array) -> Array:
        begin = jax.lax.dynamic_slice_in_dim(starts, i * block, block + 1)
        return multiplied(jax.lax.dynamic_slice_in_dim(own, i * block, block), begin[:-1], begin[1:])

    first = jax.lax.map(products, jnp.arange(groups // block, dtype=jnp.int32)).reshape(groups, slots)
    place = jnp.arange(index.shape[0], dtype=jnp.int32)
    group = jnp.searchsorted(starts, place, side="right").astype(jnp.int32) - 1
    out = first[group, jnp.minimum(place - starts[group], slots - 1)]

    def put(group: Array, begin: Array, end: Array, out: Array) -> Array:
        part = multiplied(own[group][None], begin[None], end[None])[0]
        at = begin + jnp.arange(slots, dtype=jnp.int32)
        return out.at[jnp.where(at < end, at, index.shape[0])].set(part, mode="drop")

    return for_each_piece(starts, slots, put, out)


def window(begin: Array, end: Array, slots: int, places: int) -> tuple[Array, Array]:
    """The places of some entries of each group, and which of them it has."""
    at = begin[:, None] + jnp.arange(slots, dtype=jnp.int32)[None]
    return jnp.minimum(at, places - 1), at < end[:, None]


def for_each_piece(starts: Array, slots: int, do: Callable[[Array, Array, Array, Array], Array], out: Array) -> Array:
    """Goes through what groups hold beyond their slots, in pieces of at most as many entries."""
    pieces = -(-jnp.maximum(starts[1:] - starts[:-1] - slots, 0) // slots)
    ends = jnp.cumsum(pieces)

    def one(i: Array, out: Array) -> Array:
        group = jnp.searchsorted(ends, i, side="right").astype(jnp.int32)
        piece = i - (ends[group] - pieces[group])
        return do(group, starts[group] + slots * (1 + piece), starts[group + 1], out)

    return jax.lax.fori_loop(jnp.int32(0), ends[-1], one, out)


# What a layer's features read.


class Found(NamedTuple):
    """What a dense product finds of one layer's features before anything is differentiated."""

    entries: Entries
    h: Float[Array, "E"]  # pre-activations at the entries
    shortfall: Float[Array, "F"]  # how far each feature stays below a threshold, summed over tokens
    below: tuple[Float[Array, "F D"], Float[Array, "F"]] | None
    """On each device, its tokens below that threshold added up, and how many they are. None where they are all tokens
    but those of the entries above it."""


@jax.custom_vjp
def sensed(
    found: Found,
    x: Float[Array, "N D"],
    encoder: Float[Array, "F D"],
    bias: Float[Array, "F"],
    threshold: Float[Array, "F"],
) -> tuple[Float[Array, "E"], Float[Array, "F"]]:
    """Pre-activations at the entries and each feature's shortfall, as functions of the weights; what features read is
    data, and has no gradient.

    Every token below a threshold moves the shortfall alike. So its gradient is made of the sum of these tokens, which
    is that of all less that of the entries above the threshold: there no dense product is needed.
    """
    return found.h, found.shortfall


def _sensed_forward(found: Found, x: Array, encoder: Array, bias: Array, threshold: Array) -> Any:
    return sensed(found, x, encoder, bias, threshold), (found, x, encoder, bias, threshold)


def _sensed_backward(kept: Any, gradients: tuple[Array, Array]) -> Any:
    found, x, encoder, bias, threshold = kept
    where, added = of_gradient(encoder)

    def own(found: Found, x: Array, threshold: Array, g: Array, short: Array) -> Any:
        entries, features = found.entries, threshold.shape[0]
        moved = jax.ops.segment_sum(g, entries.feature, features)
        if found.below is None:
            above = found.h >= threshold[entries.feature]
            g = g + jnp.where(above, short[entries.feature], 0.0)
            often = x.shape[0] - jax.ops.segment_sum(above.astype(g.dtype), entries.feature, features)
            below = jnp.sum(x.astype(g.dtype), axis=0)[None]
        else:
            below, often = found.below
        order = entries.by_feature
        to_encoder = row_sums(entries.feature_starts, entries.token[order], g[order], x) - short[:, None] * below
        lifted = short * often
        return added(to_encoder).astype(encoder.dtype), sum_over("data", moved - lifted), sum_over("data", lifted)

    to_encoder, to_bias, to_threshold = on_each_device(own, (where, FEATURES, FEATURES))(
        found, x, threshold, *gradients
    )
    return None, None, to_encoder, to_bias.astype(bias.dtype), to_threshold.astype(threshold.dtype)


sensed.defvjp(_sensed_forward, _sensed_backward)


# What all features write.


@jax.custom_vjp
def decode(
    entries: tuple[Entries, ...],
    activations: tuple[Float[Array, "E"], ...],
    decoders: tuple[Float[Array, "F _ D"], ...],
) -> tuple[Float[Array, "N D"], ...]:
    """`products.decode` of activations that are 0 but at the entries."""

    def own(entries: tuple[Entries, ...], activations: tuple[Array, ...], decoders: tuple[Array, ...]) -> Any:
        targets: list[Any] = [0.0] * len(decoders)
        for source, (where, a, decoder) in enumerate(zip(entries, activations, decoders, strict=True)):
            with jax.named_scope(f"from_{source}"):
                written = row_sums(where.token_starts, where.feature, a, decoder)
            for row in range(decoder.shape[1]):
                targets[source + row] += written[:, row]
        return tuple(sum_over("features", target) for target in targets)

    out = on_each_device(own, (TOKENS,) * len(decoders))(entries, activations, decoders)
    return tuple(placed(own, ("batch", None)) for own in out)


def _decode_forward(entries: Any, activations: Any, decoders: Any) -> tuple[Any, Any]:
    return decode(entries, activations, decoders), (entries, activations, decoders)


def _decode_backward(kept: Any, gradients: tuple[Array, ...]) -> Any:
    entries, activations, decoders = kept
    errors = jnp.stack([x.astype(activations[0].dtype) for x in gradients], axis=1)
    gradient = held(placed(errors, ("tokens", None, None)))

    to_activations, to_decoders = [], []
    for source, (where, a, decoder) in enumerate(zip(entries, activations, decoders, strict=True)):
        placement, added = of_gradient(decoder)
        written = gradient[:, source : source + decoder.shape[1]]
        with jax.named_scope(f"from_{source}"):
            to_a, to_decoder = on_each_device(partial(_of_source, added), (ENTRIES, placement))(
                where, a, decoder, written
            )
        to_activations.append(to_a)
        to_decoders.append(to_decoder)
    return None, tuple(to_activations), tuple(to_decoders)


def _of_source(
    added: Callable[[Array], Array], entries: Entries, a: Array, decoder: Array, written: Array
) -> tuple[Array, Array]:
    """The gradients to one layer's activations and decoder, from that of what it wrote."""
    order = entries.by_feature
    to_a = row_products(entries.token_starts, entries.feature, written, decoder)
    to_decoder = row_sums(entries.feature_starts, entries.token[order], a[order], written)
    return to_a.astype(a.dtype), added(to_decoder).astype(decoder.dtype)


decode.defvjp(_decode_forward, _decode_backward)


def of_weight(weight: Array) -> P:
    return jax.typeof(weight).sharding.spec


def of_gradient(weight: Array) -> tuple[P, Callable[[Array], Array]]:
    """Where the gradient of a weight lies, and how it is added up over the devices that hold the same features: not at
    all where the weight's type says that this is done later."""
    where = of_weight(weight)
    if "data" in where.reduced:
        return P(*where.partitions, unreduced=where.reduced), lambda x: x
    return where, lambda x: sum_over("data", x)
