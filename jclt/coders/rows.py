"""The two sums over entries that all sparse products are made of.

`row_sums` adds up weighted rows of tables for each group: rows of the decoders for each token make what is written,
errors of tokens for each feature make the gradient of its decoder. `row_products` multiplies each entry's row with
what its group holds: a decoder's row with a token's error is the gradient to the activation.

What a feature writes is some of the layers that a token holds: rows may be shorter than a group's, or longer.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jclt.models.ops import wide
from jclt.shapes import Array, Float, Int
from jclt.sharding import device_kind

LANES = 128
"""Numbers that lie side by side in a TPU's memory."""


class Rows(NamedTuple):
    """Rows of a table that entries name; the entries of group g stand from starts[g] to starts[g + 1]."""

    starts: Int[Array, "_"]
    which: Int[Array, "E"]
    table: Float[Array, "I R D"]
    first: int = 0
    """Where in the longer of the two, a row and what a group holds, the shorter one begins."""


def row_sums(lists: Sequence[Rows], values: Sequence[Float[Array, "_"]], length: int) -> Float[Array, "G R D"]:
    """For each group the sum of all lists' rows times their entries' values."""
    if kernels := kernels_for(lists):
        return kernels.row_sums(lists, values, length)
    sums: list[Any] = [jnp.float32(0)] * length
    for own, value in zip(lists, values, strict=True):
        added = sums_of_one(own, value, length)
        first = own.first if added.shape[1] < length else 0
        for row in range(added.shape[1]):
            sums[first + row] += added[:, row]
    return jnp.stack(jnp.broadcast_arrays(*sums), axis=1)


def row_products(lists: Sequence[Rows], held: Float[Array, "G R D"]) -> tuple[Float[Array, "_"], ...]:
    """For each entry the inner product of its row with what its group holds; some finite number where there is none."""
    if kernels := kernels_for(lists):
        return kernels.row_products(lists, held)
    return tuple(products_of_one(own, held) for own in lists)


def kernels_for(lists: Sequence[Rows]) -> Any:
    """The module with kernels for these sums, on the processor that the program is traced for; None for XLA's forms.

    Several lists are one kernel on a TPU's TensorCore, which writes what a group sums up once. A single one is left to
    SparseCores, where the chip has them: they work beside the TensorCore.
    """
    kind = device_kind()
    if not kind.startswith("TPU") or any(own.table.shape[2] % LANES for own in lists):
        return None
    from jclt.coders import sparse_core, tensor_core  # which take a while to import

    return sparse_core if len(lists) == 1 and sparse_core.on_chip() else tensor_core


SPARSE_BELOW = {"cpu": 0.03}
"""The share of a device's features that there may be room for while the sparse path is the faster one, by the table of
`experiments/bench/sparse_step.py`. On other processors it is not measured yet: there `path` must ask for it."""


# As XLA computes it best on a CPU.

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


def places_and_groups(starts: Int[Array, "_"], places: int) -> tuple[Int[Array, "E"], Int[Array, "E"]]:
    """Every place of a list, and the group whose entry stands there; beyond the entries a number too large."""
    place = jnp.arange(places, dtype=jnp.int32)
    return place, jnp.searchsorted(starts, place, side="right").astype(jnp.int32) - 1


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
