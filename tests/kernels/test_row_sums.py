"""The sums that sparse products are made of, in each of their forms, beside the whole matrices multiplied."""

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

from jclt.kernels import row_sums as rows
from jclt.kernels import row_sums_sparse_core as sparse_core
from jclt.kernels import row_sums_tensor_core as tensor_core
from jclt.kernels.active import Entries, listed, taken
from jclt.kernels.row_lists import Rows


class Layer(NamedTuple):
    x: np.ndarray  # values of features at tokens
    entries: Entries
    values: Any
    table: np.ndarray


def layer(tokens: int, features: int, length: int, width: int, share: float, seed: int) -> Layer:
    random = np.random.default_rng(seed)
    x = random.standard_normal((tokens, features)) * (random.random((tokens, features)) < share)
    x[tokens // 3] = np.linspace(0.1, 1, features)  # one token at which every feature is active
    entries = jax.jit(listed, static_argnums=1)(
        jnp.asarray(x != 0), float(round(features * share) + features // tokens + 10)
    )
    table = random.standard_normal((features, length, width))
    return Layer(x, entries, taken(entries, jnp.asarray(x, jnp.float32)), table)


def low(x: np.ndarray) -> Any:
    return jnp.asarray(x, jnp.float32)


def check(form: Any, tokens: int, features: int, lengths: tuple[int, ...], width: int, share: float) -> None:
    """Layers whose features write to so many, each from its own on, and errors of them all."""
    layers = [layer(tokens, features, length, width, share, seed) for seed, length in enumerate(lengths)]
    errors = np.random.default_rng(9).standard_normal((tokens, 3, width))
    by_token = [Rows(own.entries.token_starts, own.entries.feature, low(own.table), i) for i, own in enumerate(layers)]

    written = form.row_sums(by_token, [own.values for own in layers], lengths[0])
    wanted = np.zeros((tokens, lengths[0], width))
    for i, (x, _, _, table) in enumerate(layers):
        wanted[:, i : i + lengths[i]] += np.einsum("nf,frd->nrd", x, table)
    np.testing.assert_allclose(written, wanted, rtol=1e-4, atol=1e-4)

    for i, (own, products) in enumerate(zip(layers, form.row_products(by_token, low(errors)), strict=True)):
        count = int(own.entries.found[0])
        wanted = np.einsum("nrd,frd->nf", errors[:, i : i + lengths[i]], own.table)
        wanted = wanted[own.entries.token[:count], own.entries.feature[:count]]
        np.testing.assert_allclose(products[:count], wanted, rtol=1e-4, atol=1e-4)
        assert np.all(np.isfinite(products))

    x, entries, values, _ = layers[-1]
    order = entries.by_feature
    by_feature = Rows(entries.feature_starts, entries.token[order], low(errors), 1)
    gradient = form.row_sums([by_feature], [values[order]], 1)
    np.testing.assert_allclose(gradient, np.einsum("nf,nrd->frd", x, errors[:, 1:2]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [0.03, 0.9])  # one group beyond its slots, and all of them
def test_sums_and_products_are_those_of_the_whole_matrices(share):
    check(rows, 12, 80, (3, 1), 5, share)


def test_the_tensor_cores_kernels_add_up_the_same_rows(monkeypatch):
    monkeypatch.setattr(tensor_core, "STRETCH", 16)
    monkeypatch.setattr(tensor_core, "MOST", 4)
    with pltpu.force_tpu_interpret_mode():
        check(tensor_core, 12, 40, (3, 1), 128, 0.1)


SUBCORES = (2, 2)


class RowByRow:
    """`sparse_core.gather` by copies of single rows: no interpreter knows one that takes its rows from memory."""

    def __init__(self, table: Any, names: Any, into: Any, _: Any):
        self.table, self.names, self.into = table, names, into

    def start(self) -> None:
        for i in range(sparse_core.WINDOW):
            pltpu.sync_copy(self.table.at[self.names[...][i]], self.into.at[i])

    def wait(self) -> None:
        pass


def each_subcore(function: Any, shares: Any) -> Any:
    """Every subcore's work done on a device of its own, and put together from what each has to write."""

    def joined(lists: list[Rows], own: Any, *length: int) -> Any:
        mesh = jax.make_mesh(SUBCORES, ("core", "subcore"))
        where = {"in_specs": P(), "out_specs": P(("core", "subcore")), "check_vma": False}
        run = jax.shard_map(
            lambda own: jax.tree.map(lambda x: x[None], function(lists, own, *length)), mesh=mesh, **where
        )
        first, end = map(np.asarray, shares(lists[0].starts, mesh.size))
        parts = jax.device_get(run(own))
        return jax.tree.map(lambda x: np.concatenate([x[i, first[i] : end[i]] for i in range(mesh.size)]), parts)

    return joined


def test_the_sparse_cores_kernels_add_up_the_same_rows(monkeypatch):
    chip = jax.sharding.AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=chip)):
        one = Rows(jnp.zeros(2, jnp.int32), jnp.zeros(1, jnp.int32), jnp.zeros((1, 1, 128)))
        assert rows.kernels_for([one]) is sparse_core and rows.kernels_for([one, one]) is tensor_core
        mesh = tpu_sc.VectorSubcoreMesh(
            core_axis_name="core", subcore_axis_name="subcore", num_cores=SUBCORES[0], num_subcores=SUBCORES[1]
        )
    cores = sparse_core.Cores(mesh, 8)
    monkeypatch.setattr(sparse_core.Cores, "at_hand", lambda: cores)
    monkeypatch.setattr(sparse_core, "STRETCH", 32)
    monkeypatch.setattr(sparse_core, "UNROLL", 1)
    monkeypatch.setattr(sparse_core, "gather", RowByRow)
    monkeypatch.setattr(tpu_sc, "parallel_loop", lambda begin, end, step, unroll: pl.loop(begin, end, step=step))
    monkeypatch.setattr(pl, "kernel", partial(pl.kernel, interpret=True))

    def of_entries(starts: Any, workers: int) -> Any:
        return sparse_core.entry_shares(starts[-1], workers)

    def of_groups(starts: Any, workers: int) -> Any:
        return sparse_core.group_shares(starts, workers)[:2]

    monkeypatch.setattr(sparse_core, "row_products", each_subcore(sparse_core.row_products, of_entries))
    monkeypatch.setattr(sparse_core, "row_sums", each_subcore(sparse_core.row_sums, of_groups))
    check(sparse_core, 40, 50, (2,), 128, 0.1)
