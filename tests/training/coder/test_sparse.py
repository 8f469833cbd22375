"""The sparse path equals the dense one: gradients against the dense step, on every mesh, for every rule."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from more_cases import mark_others
from short_run import CONFIG, read_losses

from jclt.coders import CoderConfig, load_coder
from jclt.errors import UserError
from jclt.kernels.active import gather_values, list_active
from jclt.mesh import make_mesh, shard_by_axes
from jclt.training.coder.harvest import Harvest, Scaling
from jclt.training.coder.initial import make_initial_weights
from jclt.training.coder.sparse_switch import SPARSE_BELOW, update_capacity
from jclt.training.coder.state import CoderState, make_state
from jclt.training.coder.step import compute_gradients
from jclt.training.coder.train import train_coder
from jclt.training.config import TrainConfig
from jclt.training.metrics import read_metrics

LAYERS, WIDTH, FEATURES, ROWS, LENGTH = 2, 8, 96, 8, 16
RULES = {
    "relu": CoderConfig("sae", features=FEATURES, reads="mlp_out", activation="relu", tied=True),
    "jumprelu": CoderConfig(features=FEATURES, bandwidth=0.3),
    "jumprelu threshold": CoderConfig("transcoder", features=FEATURES, bandwidth=0.3, through="threshold"),
    "topk": CoderConfig(features=FEATURES, activation="topk", k=4),
    "batchtopk": CoderConfig(features=FEATURES, activation="batchtopk", k=6),
}
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
    pairs = jax.jit(list_active, static_argnums=1)(jnp.asarray(x != 0), float(features))
    count = int(pairs.total[0])
    listed = np.zeros_like(x)
    listed[np.asarray(pairs.token[:count]), np.asarray(pairs.feature[:count])] = gather_values(pairs, jnp.asarray(x))[
        :count
    ]
    np.testing.assert_array_equal(listed, x)
    assert count == (x != 0).sum()
    np.testing.assert_array_equal(np.diff(pairs.token_starts), (x != 0).sum(1))
    np.testing.assert_array_equal(np.diff(pairs.feature_starts), (x != 0).sum(0))
    order = np.asarray(pairs.by_feature[:count])
    assert np.all(np.diff(np.asarray(pairs.feature)[order]) >= 0)


def setting(rule: str, **changes: Any) -> TrainConfig:
    coder = replace(RULES[rule], layers=tuple(range(LAYERS)), width=WIDTH)
    plain = {"batch": ROWS, "length": LENGTH, "sparsity_weight": 0.3, "preactivation_weight": 1e-2}
    return TrainConfig(coder, **(plain | changes))


def batch() -> Harvest:
    random = np.random.default_rng(2)
    shape = (LAYERS, ROWS, LENGTH, WIDTH)
    return Harvest(*(jnp.asarray(random.standard_normal(shape), jnp.float32) for _ in range(2)))


def state_of(config: TrainConfig, mesh: Any) -> CoderState:
    """A state whose weights make about one feature in twenty active."""
    scaling = Scaling(*(f((LAYERS, WIDTH)) for f in (jnp.zeros, jnp.ones) * 2))
    coder = make_initial_weights(config, mesh)
    layers = tuple(
        replace(
            layer,
            encoder=5 * layer.encoder,
            encoder_bias=layer.encoder_bias - 1.3,
            decoder_bias=layer.decoder_bias + 0.1,
        )
        for layer in coder.layers
    )
    return make_state(config, type(coder)(layers, coder.config), scaling)._replace(running=jnp.asarray(0.14))


def compute_step(config: TrainConfig, capacity: float | None, data: int = 1, features: int = 1) -> tuple[Any, Any]:
    with jax.set_mesh(make_mesh(data, features)):
        state = state_of(config, make_mesh(data, features))
        harvest = jax.tree.map(lambda x: shard_by_axes(x, (None, "batch", None, None)), batch())
        run = jax.jit(partial(compute_gradients, config, 1.0), static_argnames="capacity")
        return jax.device_get(run(state, harvest, jnp.ones(()), capacity=capacity))


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
    assert_equal(compute_step(config, 40.0, data, features), compute_step(config, None))


def test_a_micro_batch_over_capacity_is_computed_densely_and_counted():
    config = setting("jumprelu")
    assert_equal(compute_step(config, 1.0), compute_step(config, None), overflow=1.0)


RUN = replace(CONFIG, save_every=25, headroom=1.5)


def change_over_early(patched: pytest.MonkeyPatch) -> None:
    patched.setattr("jclt.training.coder.train.REVIEW_EVERY", 10)
    patched.setitem(SPARSE_BELOW, "cpu", 1.0)


@pytest.fixture(scope="module")
def run_sparsely(tmp_path_factory) -> Path:
    """A run on the sparse path from its tenth step to its thirtieth."""
    folder = tmp_path_factory.mktemp("sparse") / "run"
    with pytest.MonkeyPatch.context() as patched:
        change_over_early(patched)
        train_coder(RUN, folder, make_mesh(devices=jax.devices()[:1]))
    return folder


def test_a_run_on_the_sparse_path_has_the_losses_of_a_dense_one(run_sparsely, tmp_path):
    train_coder(replace(RUN, path="dense"), tmp_path / "run", make_mesh(devices=jax.devices()[:1]))
    np.testing.assert_allclose(read_losses(run_sparsely), read_losses(tmp_path / "run"), rtol=1e-5)


def test_it_changes_over_when_few_enough_features_matter_and_back_when_not(run_sparsely):
    entries = [entry for entry in read_metrics(run_sparsely / "metrics.jsonl") if "loss" in entry]
    # Back at its thirtieth step, when with this headroom the capacity would have to exceed the number of features.
    assert ["overflow" in entry for entry in entries] == [False] * 10 + [True] * 20 + [False] * 20
    assert all(entry["overflow"] == 0 for entry in entries[10:30])


def test_a_run_resumed_across_the_change_ends_in_the_same_bits(run_sparsely, tmp_path, monkeypatch):
    change_over_early(monkeypatch)
    shutil.copytree(run_sparsely, tmp_path / "run")
    for name in ("coder", "checkpoints/50"):
        shutil.rmtree(tmp_path / "run" / name)
    train_coder(RUN, tmp_path / "run", make_mesh(devices=jax.devices()[:1]))
    resumed, uninterrupted = (load_coder(folder / "coder") for folder in (tmp_path / "run", run_sparsely))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, resumed, uninterrupted)))


def test_a_setting_without_a_sparse_path_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="setting 'path': sparse, expected auto or dense, since auxiliary_weight"):
        train_coder(replace(RUN, path="sparse", auxiliary_weight=0.1), tmp_path / "run")


@pytest.mark.parametrize(
    "path, backend, capacity", [("auto", "cpu", 6), ("auto", "tpu", 0), ("sparse", "tpu", 6), ("dense", "cpu", 0)]
)
def test_where_nothing_is_measured_it_changes_over_only_when_asked(path, backend, capacity, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    config = replace(setting("jumprelu"), path=path)
    config = replace(config, coder=replace(config.coder, features=256))
    mesh = make_mesh(1, 1)
    reached = update_capacity(config, mesh, state_of(config, mesh), lambda: jnp.float32(4))
    assert reached.capacity == capacity
    assert update_capacity(config, mesh, reached, lambda: jnp.float32(8)).capacity == 0  # which are more than 3%
