"""The sums over listed rows in plain XLA, as it computes them best on a CPU."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jclt.kernels.row_lists import Rows, places_and_groups
from jclt.models.ops import wide
from jclt.shapes import Array, Float

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


def sums_of_one(rows: Rows, value: Float[Array, "E"], length: int) -> Float[Array, "G R D"]:
    starts, index, table, first = rows
    table = table[:, first : first + length] if table.shape[1] > length else table
    slots = slots_for(index.shape[0], starts.shape[0] - 1)
    out = jnp.zeros((starts.shape[0] - 1, *table.shape[1:]), wide(table.dtype))

    def weighted(begin: Array, end: Array, count: int) -> Array:
        at, holds = window(begin, end, count, index.shape[0])
        rows = jnp.where(holds, index[at], 0)  # the same one wherever there is no entry
        weights = jnp.where(holds, value[at].astype(out.dtype), 0.0)
        terms = [weights[:, j, None, None] * table[rows[:, j]].astype(out.dtype) for j in range(count)]
        return sum(terms[1:], terms[0])

    for begin in range(0, slots, SLOTS):
        out = out + weighted(starts[:-1] + begin, starts[1:], SLOTS)

    def add(group: Array, begin: Array, end: Array, out: Array) -> Array:
        return out.at[group].add(weighted(begin[None], end[None], slots)[0])

    return for_each_piece(starts, slots, add, out)


def products_of_one(rows: Rows, held: Float[Array, "G R D"]) -> Float[Array, "E"]:
    starts, index, table, first = rows
    own = held[:, first : first + table.shape[1]]
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
    place, group = places_and_groups(starts, index.shape[0])
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
