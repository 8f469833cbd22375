"""The sparse path equals the dense one: gradients against the dense step, on every mesh, for every rule."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from more_cases import mark_others
from short_run import CONFIG, ONE_DEVICE_MESH, read_losses

from jclt.coders import CoderConfig, load_coder
from jclt.errors import UserError
from jclt.kernels.active import ActivePairs, gather_values, list_active
from jclt.mesh import make_mesh, make_sharding
from jclt.training.coder.abstract import abstract_state
from jclt.training.coder.harvest import Harvest
from jclt.training.coder.sparse_switch import SPARSE_BELOW, update_capacity
from jclt.training.coder.state import CoderState
from jclt.training.coder.step import compute_gradients
from jclt.training.coder.train import train_coder
from jclt.training.config import TrainConfig
from jclt.training.metrics import read_metrics

WIDTH, FEATURES, ROWS, LENGTH = 8, 96, 8, 16
RULES = {
    "relu": CoderConfig("sae", features=FEATURES, reads="mlp_out", activation="relu", tied=True),
    "jumprelu": CoderConfig(features=FEATURES, bandwidth=0.3),
    "jumprelu threshold": CoderConfig("transcoder", features=FEATURES, bandwidth=0.3, through="threshold"),
    "topk": CoderConfig(features=FEATURES, activation="topk", k=4),
    "batchtopk": CoderConfig(features=FEATURES, activation="batchtopk", k=6),
}
LAYERS = dict.fromkeys(RULES, 2) | {"topk": 1}  # whose layers do not depend on each other
CASES = [  # the rule, the two penalties, the micro-batches, the mesh
    ("relu", "tanh", "threshold", 1, 4, 1),
    ("jumprelu", "l0", "zero", 2, 2, 2),
    ("jumprelu threshold", "kl", "threshold", 1, 1, 1),
    ("topk", "tanh", "threshold", 1, 2, 2),
    ("batchtopk", "l1", "none", 1, 1, 4),
]


def sparse(*shape: int, share: float, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.random(shape) < share) * random.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("features", "share"), [(5, 1.0), (32, 0.5), (70, 0.02), (70, 0.0)])
def test_pairs_are_listed_where_x_is_not_zero(features, share):
    x = sparse(6, features, share=share)
    pairs, values = jax.device_get(list_with_values(x))
    count = int(pairs.total[0])
    listed = np.zeros_like(x)
    listed[pairs.token[:count], pairs.feature[:count]] = values[:count]
    np.testing.assert_array_equal(listed, x)
    assert count == (x != 0).sum()
    np.testing.assert_array_equal(np.diff(pairs.token_starts), (x != 0).sum(1))
    np.testing.assert_array_equal(np.diff(pairs.feature_starts), (x != 0).sum(0))
    assert np.all(np.diff(pairs.feature[pairs.by_feature[:count]]) >= 0)


@jax.jit
def list_with_values(x: jax.Array) -> tuple[ActivePairs, jax.Array]:
    pairs = list_active(x != 0, float(x.shape[1]))
    return pairs, gather_values(pairs, x)


def setting(rule: str, **changes: Any) -> TrainConfig:
    coder = replace(RULES[rule], layers=tuple(range(LAYERS[rule])), width=WIDTH)
    plain = {"batch": ROWS, "length": LENGTH, "sparsity_weight": 0.3, "preactivation_weight": 1e-2}
    return TrainConfig(coder, **(plain | changes))


def state_of(config: TrainConfig, mesh: Mesh, lift: float = 0.0) -> CoderState:
    """A state whose weights make about one feature in twenty active, or more if their biases are lifted."""
    random, bounds = np.random.default_rng(1), {"encoder": 0.5, "decoder": 0.25}
    biases = {"encoder_bias": lift - 1.3, "decoder_bias": 0.1, "threshold": np.log(config.threshold)}
    constants = biases | {"read_scale": 1.0, "write_scale": 1.0, "running": 0.14}

    def fill(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> jax.Array:
        name = "" if path[0].name == "optimizer" else getattr(path[-1], "name", "")
        values = np.full(x.shape, constants.get(name, 0.0))
        if name in bounds:
            values = random.uniform(-bounds[name], bounds[name], x.shape)
        return jax.device_put(values.astype(x.dtype), x.sharding)

    return jax.tree_util.tree_map_with_path(fill, abstract_state(config, mesh))


def batch_of(config: TrainConfig, mesh: Mesh) -> Harvest:
    random, shape = np.random.default_rng(2), (len(config.coder.covered), ROWS, LENGTH, WIDTH)
    where = make_sharding(mesh, shape, (None, "batch", None, None))
    return Harvest(*(jax.device_put(random.standard_normal(shape).astype(np.float32), where) for _ in range(2)))


CAPACITY = 12.0  # pairs per token
compute = jax.jit(compute_gradients, static_argnums=(0, 1), static_argnames="capacity")


def compute_step(
    config: TrainConfig, capacity: float | None, data: int = 1, features: int = 1, lift: float = 0.0
) -> tuple[Any, Any]:
    mesh = make_mesh(data, features)
    with jax.set_mesh(mesh):
        state, harvest = state_of(config, mesh, lift), batch_of(config, mesh)
        return jax.device_get(compute(config, 1.0, state, harvest, np.float32(1), capacity=capacity))


def assert_equal(sparse: Any, dense: Any, overflow: float = 0.0) -> None:
    (gradient, report), (wanted, other) = sparse, dense
    assert report.pop("overflow") == overflow
    for (path, a), b in zip(
        jax.tree.leaves_with_path((gradient, report)), jax.tree.leaves((wanted, other)), strict=True
    ):
        size = np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * size, err_msg=jax.tree_util.keystr(path))
    assert all(np.abs(layer.encoder).max() > 1e-4 for layer in gradient.layers)


@pytest.mark.parametrize(
    ("rule", "sparsity", "preactivation", "micro", "data", "features"), mark_others(CASES, CASES[1:4:2])
)
def test_values_and_gradients_are_the_dense_ones(rule, sparsity, preactivation, micro, data, features):
    config = setting(rule, sparsity=sparsity, preactivation=preactivation, micro_batches=micro)
    assert_equal(compute_step(config, CAPACITY, data, features), compute_step(config, None))


def test_a_micro_batch_over_capacity_is_computed_densely_and_counted():
    # The settings of a case above, whose program is compiled already.
    config = setting("jumprelu", sparsity="l0", preactivation="zero", micro_batches=2)
    over = compute_step(config, CAPACITY, 2, 2, lift=3.0)
    assert_equal(over, compute_step(config, None, lift=3.0), overflow=1.0)


RUN = replace(
    CONFIG,
    coder=replace(CONFIG.coder, layers=(2,), bandwidth=0.1),
    initial="clt",
    normalize="scale",
    beta1=0.0,
    initial_density=0.01,
    steps=30,
    save_every=15,
    headroom=3.0,
)


def change_over_early(patched: pytest.MonkeyPatch) -> None:
    patched.setattr("jclt.training.coder.train.REVIEW_EVERY", 10)
    patched.setitem(SPARSE_BELOW, "cpu", 0.4)


@pytest.fixture(scope="module")
def run_sparsely(tmp_path_factory) -> Path:
    """A run on the sparse path from its tenth step to its twentieth."""
    folder = tmp_path_factory.mktemp("sparse") / "run"
    with pytest.MonkeyPatch.context() as patched:
        change_over_early(patched)
        train_coder(RUN, folder, ONE_DEVICE_MESH)
    return folder


def test_a_run_on_the_sparse_path_has_the_losses_of_a_dense_one(run_sparsely, tmp_path):
    train_coder(replace(RUN, path="dense"), tmp_path / "run", ONE_DEVICE_MESH)
    np.testing.assert_allclose(read_losses(run_sparsely), read_losses(tmp_path / "run"), rtol=1e-5)


def test_it_changes_over_when_few_enough_features_matter_and_back_when_not(run_sparsely):
    entries = [entry for entry in read_metrics(run_sparsely / "metrics.jsonl") if "loss" in entry]
    # At its twentieth step three times as many matter as at its tenth.
    assert ["overflow" in entry for entry in entries] == [False] * 10 + [True] * 10 + [False] * 10
    assert all(entry["overflow"] == 0 for entry in entries[10:20])


def test_a_run_resumed_across_the_change_ends_in_the_same_bits(run_sparsely, tmp_path, monkeypatch):
    change_over_early(monkeypatch)
    shutil.copytree(run_sparsely, tmp_path / "run")
    for name in ("coder", "checkpoints/30"):
        shutil.rmtree(tmp_path / "run" / name)
    train_coder(RUN, tmp_path / "run", ONE_DEVICE_MESH)
    resumed, uninterrupted = (load_coder(folder / "coder") for folder in (tmp_path / "run", run_sparsely))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, resumed, uninterrupted)))


def test_a_setting_without_a_sparse_path_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="setting 'path': sparse, expected auto or dense, since auxiliary_weight"):
        train_coder(replace(RUN, path="sparse", auxiliary_weight=0.1), tmp_path / "run", ONE_DEVICE_MESH)


@pytest.mark.parametrize(
    "path, backend, capacity", [("auto", "cpu", 6), ("auto", "tpu", 0), ("sparse", "tpu", 6), ("dense", "cpu", 0)]
)
def test_setting_and_backend_say_which_path_is_taken(path, backend, capacity, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    config = replace(setting("jumprelu"), path=path)
    config = replace(config, coder=replace(config.coder, features=256))
    mesh = make_mesh(1, 1)
    reached = update_capacity(config, mesh, state_of(config, mesh), lambda: jnp.float32(4))
    assert reached.capacity == capacity
    assert update_capacity(config, mesh, reached, lambda: jnp.float32(8)).capacity == 0  # which are more than 3%
