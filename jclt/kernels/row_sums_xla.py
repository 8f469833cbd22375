"""The sums over listed rows in plain XLA, in the form that is fastest on a CPU.

Each group's first pairs are added in a few passes over all groups at once. Then a loop adds the remaining pairs of the
groups that have more, in chunks.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jclt.kernels.row_lists import GroupedRows, slots_and_groups
from jclt.numerics import at_least_float32, einsum
from jclt.shapes import Array, Float

PAIRS_PER_PASS = 8
"""Pairs of each group that are added in one pass over all groups."""
MAX_PASSES = 4
BLOCK = 16
"""Groups whose rows are gathered at once for inner products."""


def pairs_of_first_passes(slots: int, groups: int) -> int:
    """Pairs of each group that the passes over all groups add: as many as a group has slots on average, in whole
    passes."""
    return min(max(1, -(-slots // (groups * PAIRS_PER_PASS))), MAX_PASSES) * PAIRS_PER_PASS


def sum_rows_of_list(rows: GroupedRows, value: Float[Array, "E"], length: int) -> Float[Array, "G R D"]:
    starts, index, table, offset = rows
    table = table[:, offset : offset + length] if table.shape[1] > length else table
    chunk = pairs_of_first_passes(index.shape[0], starts.shape[0] - 1)
    sums = jnp.zeros((starts.shape[0] - 1, *table.shape[1:]), at_least_float32(table.dtype))

    def sum_pairs(begin: Array, end: Array, count: int) -> Array:
        slot, is_filled = window_slots(begin, end, count, index.shape[0])
        row_numbers = jnp.where(is_filled, index[slot], 0)  # the same row for all empty slots
        weights = jnp.where(is_filled, value[slot].astype(sums.dtype), 0.0)
        terms = [weights[:, j, None, None] * table[row_numbers[:, j]].astype(sums.dtype) for j in range(count)]
        return sum(terms[1:], terms[0])

    for begin in range(0, chunk, PAIRS_PER_PASS):
        sums = sums + sum_pairs(starts[:-1] + begin, starts[1:], PAIRS_PER_PASS)

    def add_chunk(group: Array, begin: Array, end: Array, sums: Array) -> Array:
        return sums.at[group].add(sum_pairs(begin[None], end[None], chunk)[0])

    return loop_over_remainder(starts, chunk, add_chunk, sums)


def dot_rows_of_list(rows: GroupedRows, group_values: Float[Array, "G R D"]) -> Float[Array, "E"]:
    starts, index, table, offset = rows
    group_values = group_values[:, offset : offset + table.shape[1]]
    groups, chunk = starts.shape[0] - 1, pairs_of_first_passes(index.shape[0], starts.shape[0] - 1)
    block = max(size for size in range(1, BLOCK + 1) if groups % size == 0)
    group_values, table = group_values.reshape(groups, -1), table.reshape(table.shape[0], -1)
    dtype = at_least_float32(group_values.dtype)

    def dot_chunk(values: Array, begin: Array, end: Array) -> Array:
        slot, is_filled = window_slots(begin, end, chunk, index.shape[0])
        gathered = table[jnp.where(is_filled, index[slot], 0)].astype(dtype)
        return einsum("gd,gsd->gs", values.astype(dtype), gathered)

    def dot_block(i: Array) -> Array:
        bounds = jax.lax.dynamic_slice_in_dim(starts, i * block, block + 1)
        return dot_chunk(jax.lax.dynamic_slice_in_dim(group_values, i * block, block), bounds[:-1], bounds[1:])

    first_products = jax.lax.map(dot_block, jnp.arange(groups // block, dtype=jnp.int32)).reshape(groups, chunk)
    slot, group = slots_and_groups(starts, index.shape[0])
    products = first_products[group, jnp.minimum(slot - starts[group], chunk - 1)]

    def put_chunk(group: Array, begin: Array, end: Array, products: Array) -> Array:
        part = dot_chunk(group_values[group][None], begin[None], end[None])[0]
        slot = begin + jnp.arange(chunk, dtype=jnp.int32)
        return products.at[jnp.where(slot < end, slot, index.shape[0])].set(part, mode="drop")

    return loop_over_remainder(starts, chunk, put_chunk, products)


def window_slots(begin: Array, end: Array, count: int, slots: int) -> tuple[Array, Array]:
    """For each group `count` slots from `begin` on, and whether each is before `end`."""
    slot = begin[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
    return jnp.minimum(slot, slots - 1), slot < end[:, None]


def loop_over_remainder(
    starts: Array, chunk: int, use: Callable[[Array, Array, Array, Array], Array], carry: Array
) -> Array:
    """Calls `use(group, begin, end, carry)` for the pairs of each group after its first `chunk`, a chunk at a time."""
    chunks = -(-jnp.maximum(starts[1:] - starts[:-1] - chunk, 0) // chunk)
    ends = jnp.cumsum(chunks)

    def use_chunk(i: Array, carry: Array) -> Array:
        group = jnp.searchsorted(ends, i, side="right").astype(jnp.int32)
        chunk_of_group = i - (ends[group] - chunks[group])
        return use(group, starts[group] + chunk * (1 + chunk_of_group), starts[group + 1], carry)

    return jax.lax.fori_loop(jnp.int32(0), ends[-1], use_chunk, carry)
