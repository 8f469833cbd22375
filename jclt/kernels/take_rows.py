"""Some rows of a table, wherever it lies: in the memory of one device, or split over the feature shards of a mesh."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jclt.mesh import (
    FEATURES_AXIS,
    count_feature_shards,
    is_split,
    map_over_devices,
    mesh_of,
    sum_over_feature_shards,
    use_mesh,
)
from jclt.shapes import Array, ArrayLike, Bool, Float, Int

NO_ROW = -1
"""Pads lists of row numbers. The row that is taken for it has no meaning, and depends on where the table lies."""


def take_rows(table: Float[Array, "F ..."], rows: Int[ArrayLike, "*B n"]) -> Float[Array, "..."]:
    """The rows with these numbers. The table itself is never gathered.

    From a split table every device gets the rows of a single list. If there are several lists, and the number of shards
    divides theirs, each shard gets only the rows of its own lists; otherwise every device gets all.
    """
    mesh = mesh_of(table)
    with use_mesh(mesh):
        shards = count_feature_shards(mesh, len(table))
        most = count_most_rows(np.asarray(rows), len(table), shards)
        return take_from_shards(table, jnp.asarray(rows, jnp.int32), most)


def count_most_rows(rows: Int[np.ndarray, "*B n"], features: int, shards: int) -> int | None:
    """The most rows that one shard sends to one device, rounded up so that few programs are compiled; None where the
    rows of all lists come to all devices."""
    if shards == 1 or rows.ndim < 2 or len(rows) % shards:
        return None
    by_shard = rows.reshape(shards, -1)
    owners = by_shard // (features // shards)
    counts = np.bincount((owners + shards * np.arange(shards)[:, None])[by_shard != NO_ROW], minlength=1)
    return max(8, 1 << (int(counts.max()) - 1).bit_length())


@partial(jax.jit, static_argnames=("most",))
def take_from_shards(
    table: Float[Array, "F ..."], rows: Int[Array, "*B n"], most: int | None = None
) -> Float[Array, "..."]:
    """`take_rows` within a program; `most` is what `count_most_rows` returns."""
    if not is_split(table):
        return table[rows]
    if most is not None:
        return map_over_devices(partial(_exchange, most), P(FEATURES_AXIS))(table, rows)
    return map_over_devices(_take_own, P())(table, rows)


def _take_own(table: Float[Array, "f ..."], rows: Int[Array, "*B n"]) -> Float[Array, "..."]:
    """Each shard takes the rows that it owns and zeros in place of the others; the sum of these has all rows."""
    own = rows - jax.lax.axis_index(FEATURES_AXIS) * len(table)
    is_own = (own >= 0) & (own < len(table))
    taken = table[jnp.where(is_own, own, 0)]
    return sum_over_feature_shards(jnp.where(is_own.reshape(*own.shape, *[1] * (table.ndim - 1)), taken, 0))


def _exchange(most: int, table: Float[Array, "f ..."], rows: Int[Array, "B n"]) -> Float[Array, "..."]:
    """Each shard sends every other one at most `most` rows that it owns, and each puts those that it gets in its own
    lists."""
    shards, shard = jax.lax.axis_size(FEATURES_AXIS), jax.lax.axis_index(FEATURES_AXIS)
    by_shard = rows.reshape(shards, -1)
    owners = jnp.floor_divide(by_shard, len(table))

    @jax.vmap
    def find(is_wanted: Bool[Array, "n"]) -> Int[Array, "m"]:
        """The indices of the wanted entries, padded to `most` with an index out of range."""
        return jnp.nonzero(is_wanted, size=most, fill_value=len(is_wanted))[0]

    sent = jnp.take_along_axis(by_shard, find(owners == shard), axis=1, mode="clip") - shard * len(table)
    received = jax.lax.all_to_all(table[jnp.clip(sent, 0, len(table) - 1)], FEATURES_AXIS, 0, 0, tiled=True)
    places = find(owners[shard][None] == jnp.arange(shards)[:, None])
    lists = jnp.zeros((by_shard.shape[1], *table.shape[1:]), table.dtype)
    lists = lists.at[places.ravel()].set(received.reshape(-1, *table.shape[1:]), mode="drop")
    return lists.reshape(-1, rows.shape[1], *table.shape[1:])
