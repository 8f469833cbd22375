"""Each form of the sums over active pairs, compared with products of full matrices."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc
from jax.sharding import PartitionSpec as P

from jclt.kernels import row_sums
from jclt.kernels import row_sums_sparse_core as sparse_core
from jclt.kernels import row_sums_tensor_core as tensor_core
from jclt.kernels.active import ActivePairs, gather_values, list_active
from jclt.kernels.row_lists import GroupedRows


class Layer(NamedTuple):
    x: np.ndarray  # values of features at tokens
    pairs: ActivePairs
    values: Any
    table: np.ndarray


def random_layer(tokens: int, features: int, length: int, width: int, share: float, seed: int) -> Layer:
    random = np.random.default_rng(seed)
    x = random.standard_normal((tokens, features)) * (random.random((tokens, features)) < share)
    x[tokens // 3] = np.linspace(0.1, 1, features)  # one token at which every feature is active
    capacity = float(round(features * share) + features // tokens + 10)
    pairs, values = list_with_values(to_float32(x), capacity)
    return Layer(x, pairs, values, random.standard_normal((features, length, width)))


@partial(jax.jit, static_argnums=1)
def list_with_values(x: jax.Array, capacity: float) -> tuple[ActivePairs, jax.Array]:
    pairs = list_active(x != 0, capacity)
    return pairs, gather_values(pairs, x)


def to_float32(x: np.ndarray) -> Any:
    return jnp.asarray(x.astype(np.float32))


def check(
    form: Any, tokens: int, features: int, lengths: tuple[int, ...], width: int, share: float, jit: Any = jax.jit
) -> None:
    """Compares the sums of layers whose features write to so many layers, from their layer on, with products."""
    layers = [random_layer(tokens, features, length, width, share, seed) for seed, length in enumerate(lengths)]
    errors = np.random.default_rng(9).standard_normal((tokens, 3, width))
    by_token = [
        GroupedRows(layer.pairs.token_starts, layer.pairs.feature, to_float32(layer.table), i)
        for i, layer in enumerate(layers)
    ]

    sums = jit(lambda *values: form.sum_rows(by_token, values, lengths[0]))(*(layer.values for layer in layers))
    wanted = np.zeros((tokens, lengths[0], width))
    for i, layer in enumerate(layers):
        wanted[:, i : i + lengths[i]] += np.einsum("nf,frd->nrd", layer.x, layer.table)
    np.testing.assert_allclose(sums, wanted, rtol=1e-4, atol=1e-4)

    products_of_layers = jit(lambda errors: form.dot_rows(by_token, errors))(to_float32(errors))
    for i, (layer, products) in enumerate(zip(layers, products_of_layers, strict=True)):
        count = int(layer.pairs.total[0])
        wanted = np.einsum("nrd,frd->nf", errors[:, i : i + lengths[i]], layer.table)
        token, feature = (np.asarray(x)[:count] for x in (layer.pairs.token, layer.pairs.feature))
        wanted = wanted[token, feature]
        np.testing.assert_allclose(np.asarray(products)[:count], wanted, rtol=1e-4, atol=1e-4)
        assert np.all(np.isfinite(products))

    x, pairs, values, _ = jax.device_get(layers[-1])
    token, values = (jnp.asarray(of_pairs[pairs.by_feature]) for of_pairs in (pairs.token, values))
    by_feature = GroupedRows(jnp.asarray(pairs.feature_starts), token, to_float32(errors), 1)
    gradient = jit(lambda values: form.sum_rows([by_feature], [values], 1))(values)
    np.testing.assert_allclose(gradient, np.einsum("nf,nrd->frd", x, errors[:, 1:2]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [0.03, 0.9])  # more pairs than the first passes add: in one group, in all
def test_sums_and_products_are_those_of_the_whole_matrices(share):
    check(row_sums, 12, 80, (3, 1), 5, share)


def test_the_tensor_cores_kernels_add_up_the_same_rows(monkeypatch):
    monkeypatch.setattr(tensor_core, "CHUNK", 8)
    monkeypatch.setattr(tensor_core, "MOST_ROWS", 4)
    with pltpu.force_tpu_interpret_mode():
        check(tensor_core, 12, 24, (3, 1), 128, 0.1)


SUBCORES = (2, 2)


class RowByRow:
    """`sparse_core.gather_copy` as copies of single rows: no interpreter knows copies with row numbers in memory."""

    def __init__(self, table: Any, numbers: Any, target: Any, _: Any):
        self.table, self.numbers, self.target = table, numbers, target

    def start(self) -> None:
        @pl.loop(0, sparse_core.WINDOW)
        def _(i: Any) -> None:
            pltpu.sync_copy(self.table.at[self.numbers[i]], self.target.at[i])

    def wait(self) -> None:
        pass


def each_subcore(function: Any, shares: Any) -> Any:
    """Runs every subcore's work on a separate device, and joins the shares that the subcores write."""

    def run_on_each(lists: list[GroupedRows], values: Any, *length: int) -> Any:
        mesh = jax.make_mesh(SUBCORES, ("core", "subcore"))
        specs: Any = {"in_specs": P(), "out_specs": P(("core", "subcore")), "check_vma": False}
        run = jax.jit(
            jax.shard_map(
                lambda values: jax.tree.map(lambda x: x[None], function(lists, values, *length)), mesh=mesh, **specs
            )
        )
        first, end = jax.device_get(jax.jit(shares, static_argnums=1)(lists[0].starts, mesh.size))
        parts = jax.device_get(run(values))
        return jax.tree.map(lambda x: np.concatenate([x[i, first[i] : end[i]] for i in range(mesh.size)]), parts)

    return run_on_each


def test_the_sparse_cores_kernels_add_up_the_same_rows(monkeypatch):
    chip = jax.sharding.AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=chip)):
        single = GroupedRows(jnp.zeros(2, jnp.int32), jnp.zeros(1, jnp.int32), jnp.zeros((1, 1, 128)))
        assert row_sums.choose_kernels([single]) is sparse_core
        assert row_sums.choose_kernels([single, single]) is tensor_core
        mesh = tpu_sc.VectorSubcoreMesh(
            core_axis_name="core", subcore_axis_name="subcore", num_cores=SUBCORES[0], num_subcores=SUBCORES[1]
        )
    cores = sparse_core.Cores(mesh, 8)
    monkeypatch.setattr(sparse_core.Cores, "of_chip", lambda: cores)
    monkeypatch.setattr(sparse_core, "CHUNK", 32)
    monkeypatch.setattr(sparse_core, "UNROLL", 1)
    monkeypatch.setattr(sparse_core, "gather_copy", RowByRow)
    monkeypatch.setattr(tpu_sc, "parallel_loop", lambda begin, end, step, unroll: pl.loop(begin, end, step=step))
    monkeypatch.setattr(pl, "kernel", partial(pl.kernel, interpret=True))

    def share_pairs(starts: Any, workers: int) -> Any:
        return sparse_core.share_pairs(starts[-1], workers)

    def share_groups(starts: Any, workers: int) -> Any:
        return sparse_core.share_groups(starts, workers)[:2]

    monkeypatch.setattr(sparse_core, "dot_rows", each_subcore(sparse_core.dot_rows, share_pairs))
    monkeypatch.setattr(sparse_core, "sum_rows", each_subcore(sparse_core.sum_rows, share_groups))
    check(sparse_core, 40, 50, (2,), 128, 0.1, jit=lambda function: function)  # each subcore's is compiled
