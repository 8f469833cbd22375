"""Some rows of a table, wherever it lies: in the memory of one device, or split over the feature shards of a mesh."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jclt.mesh import FEATURES_AXIS, is_split, map_over_devices, mesh_of, sum_over_feature_shards, use_mesh
from jclt.shapes import Array, ArrayLike, Float, Int


def take_rows(table: Float[Array, "F ..."], rows: Int[ArrayLike, "n"]) -> Float[Array, "n ..."]:
    """The rows with these numbers, on all devices that hold a part of the table. The table itself is never gathered."""
    with use_mesh(mesh_of(table)):
        return take_from_shards(table, jnp.asarray(rows, jnp.int32))


@jax.jit
def take_from_shards(table: Float[Array, "F ..."], rows: Int[Array, "n"]) -> Float[Array, "n ..."]:
    """Each shard takes the rows that it owns and zeros in place of the others; the sum of these has all rows."""
    if not is_split(table):
        return table[rows]

    def take_own(table: Array, rows: Array) -> Array:
        own = rows - jax.lax.axis_index(FEATURES_AXIS) * table.shape[0]
        is_own = (own >= 0) & (own < table.shape[0])
        taken = table[jnp.where(is_own, own, 0)]
        return sum_over_feature_shards(jnp.where(is_own.reshape(-1, *[1] * (table.ndim - 1)), taken, 0))

    return map_over_devices(take_own, P())(table, rows)
