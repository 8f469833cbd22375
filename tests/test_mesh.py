"""Logical axes are split over the mesh axes of the one table, where their sizes divide."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jclt.errors import UserError
from jclt.mesh import (
    DATA_AXIS,
    FEATURES_AXIS,
    LOGICAL_AXES,
    MESH_AXES,
    PER_DEVICE_SPEC,
    TOKENS_FEATURES_SPEC,
    einsum_spec,
    make_mesh,
    make_sharding,
    make_spec,
    map_over_devices,
    sum_over_data_shards,
    sum_over_feature_shards,
)


def test_every_logical_axis_is_split_over_axes_of_the_mesh():
    assert all(set(mesh_axes) <= set(MESH_AXES) for mesh_axes in LOGICAL_AXES.values())
    assert TOKENS_FEATURES_SPEC == P(DATA_AXIS, FEATURES_AXIS) and PER_DEVICE_SPEC == P((DATA_AXIS, FEATURES_AXIS))


def test_an_axis_is_split_if_its_size_divides_and_logged_if_not(caplog):
    mesh = make_mesh(2, 2)
    with caplog.at_level(logging.DEBUG, "jclt.mesh"):
        assert make_spec(mesh, (6, 8, 3), ("tokens", "features", None)) == P(DATA_AXIS, FEATURES_AXIS, None)
        assert make_spec(mesh, (8, 8), ("stored", "stored")) == P(MESH_AXES, None)
        assert not caplog.records
        assert make_spec(mesh, (6, 5), ("tokens", "features")) == P(DATA_AXIS, None)
        assert make_spec(mesh, (6, 8), ("stored", "stored")) == P(None, MESH_AXES)
    assert [record.getMessage() for record in caplog.records] == [
        "axis 'features' of shape [6, 5] is not split: 5 does not divide by 2",
        "axis 'stored' of shape [6, 8] is not split: 6 does not divide by 4",
    ]


def test_sums_over_shards_are_the_sums_over_mesh_axes():
    x = np.arange(32.0).reshape(4, 8)

    def sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        over_features = sum_over_feature_shards(jnp.sum(x, axis=1))
        return over_features, sum_over_data_shards(jnp.sum(x, axis=0))

    specs = (P(DATA_AXIS), P(FEATURES_AXIS))
    mesh = make_mesh(2, 2)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, make_sharding(mesh, x.shape, ("tokens", "features")))
        by_token, by_feature = jax.jit(map_over_devices(sums, specs))(sharded)
        assert einsum_spec("nf,nf->f", sharded, sharded) == P(FEATURES_AXIS)
    np.testing.assert_array_equal(by_token, x.sum(1))
    np.testing.assert_array_equal(by_feature, x.sum(0))
    assert map_over_devices(sums, specs) is sums  # without a mesh


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
    with pytest.raises(UserError, match="^mesh: data=3, expected a divisor of 4, the number of devices$"):
        make_mesh(3)
    with pytest.raises(UserError, match="^mesh 4x4: expected at most 4 devices"):
        make_mesh(4, 4)
