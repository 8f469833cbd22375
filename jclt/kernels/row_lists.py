"""Rows of a table, listed by groups: the arguments of the sums in `row_sums.py`."""

from typing import NamedTuple

import jax.numpy as jnp

from jclt.shapes import Array, Float, Int

LANES = 128
"""Numbers that a TPU keeps side by side in a vector register."""


class GroupedRows(NamedTuple):
    """Groups of pairs, each of which names a row of a table. The pairs of group g are starts[g] to starts[g + 1] - 1.

    A table row holds R vectors and a group's accumulator `length` vectors, one for each layer. The shorter of the two
    begins at position `offset` of the longer one.
    """

    starts: Int[Array, "_"]
    row: Int[Array, "E"]
    table: Float[Array, "I R D"]
    offset: int = 0


def slots_and_groups(starts: Int[Array, "_"], slots: int) -> tuple[Int[Array, "E"], Int[Array, "E"]]:
    """Every slot of a list, and the group of its pair; for empty slots a number that is too large."""
    slot = jnp.arange(slots, dtype=jnp.int32)
    return slot, jnp.searchsorted(starts, slot, side="right").astype(jnp.int32) - 1
