"""Rows of a table, listed by groups: what the sums over them take."""

from typing import NamedTuple

import jax.numpy as jnp

from jclt.shapes import Array, Float, Int

LANES = 128
"""Numbers that lie side by side in a TPU's memory."""


class Rows(NamedTuple):
    """Rows of a table that entries name; the entries of group g stand from starts[g] to starts[g + 1]."""

    starts: Int[Array, "_"]
    which: Int[Array, "E"]
    table: Float[Array, "I R D"]
    first: int = 0
    """Where in the longer of the two, a row and what a group holds, the shorter one begins."""


def places_and_groups(starts: Int[Array, "_"], places: int) -> tuple[Int[Array, "E"], Int[Array, "E"]]:
    """Every place of a list, and the group whose entry stands there; beyond the entries a number too large."""
    place = jnp.arange(places, dtype=jnp.int32)
    return place, jnp.searchsorted(starts, place, side="right").astype(jnp.int32) - 1
