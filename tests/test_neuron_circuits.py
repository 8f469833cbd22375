"""The parts of experiments/neuron_circuits: clusters of neurons, what they stand for, and how they are changed."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import ROWS, make_model

import jclt
from jclt.circuits.neuron_edges import trace_neurons

FOLDER = Path(__file__).parents[1] / "experiments/neuron_circuits"


@pytest.fixture
def clusters(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    yield import_module("clusters")
    sys.modules.pop("clusters", None)


def make_neurons(clusters, inputs, outputs):
    where = np.array([(0, 0, number) for number in range(len(outputs))])
    return clusters.Neurons(where, inputs, outputs, np.ones((1, 1, len(outputs)), bool))


def test_a_cluster_stands_for_the_largest_part_of_what_it_gives(clusters):
    """Of one cell of S x R the mean has 1 / SR of the square, rows (S - 1) / SR and columns (R - 1) / SR."""
    rows, columns, cell = np.zeros((3, 5, 4))
    rows[1], columns[:, 2], cell[3, 0] = 1, 1, 1
    want = [(1 / 5, 4 / 5, 0, 0), (1 / 4, 0, 3 / 4, 0), (1 / 20, 4 / 20, 3 / 20, 12 / 20), (1, 0, 0, 0)]
    grids = (rows, columns, cell, np.ones((5, 4)))
    np.testing.assert_allclose([clusters.split_squares(grid) for grid in grids], want, atol=1e-12)
    names = [clusters.name_cluster(grid, list("abcde"), list("wxyz")) for grid in grids]
    assert [name[0] for name in names] == ["subject", "relation", "answer", "every"]
    assert [name[2] for name in names] == [(("b", ""),), (("", "y"),), (("d", "w"),), ()]


def test_neurons_that_act_alike_are_joined(clusters):
    """Three planted groups, each with its own inputs and outputs, at any size of activation."""
    random = np.random.default_rng(0)
    group = random.permutation(np.repeat([0, 1, 2], [9, 6, 3]))
    inputs, outputs = random.normal(size=(3, 3, 30))[group], random.normal(size=(3, 30))[group]
    sizes = random.lognormal(0, 2, size=18)
    noisy = [x + 0.1 * random.normal(size=x.shape) for x in (inputs, outputs)]
    neurons = make_neurons(clusters, noisy[0] * sizes[:, None, None], noisy[1] * sizes[:, None])
    found = clusters.join_neurons(neurons, 0.5)
    assert [set(numbers) for numbers in found] == [set(np.flatnonzero(group == number)) for number in range(3)]


@pytest.mark.exhaustive  # three seconds to compile; jvp of a pass whose gradients other tests check
def test_inputs_are_the_edges_from_embeddings_along_all_paths(clusters):
    with jax.enable_x64():
        model = make_model(norm="rms", activation="silu", gated=True, kv_heads=1)
        tokens, group = np.array(ROWS[0][0]), np.array([False, True, False, True, False])
        neurons = np.array([(layer, position, number) for layer in (0, 1) for position in (1, 4) for number in (2, 7)])
        edges = trace_neurons(model, tokens, neurons, [ROWS[0][2]], [ROWS[0][3]], direct=False).edges
        found = clusters.trace_inputs(model.config, model.params, jnp.asarray(tokens[None]), jnp.asarray(group))
    layers, positions, numbers = neurons.T
    want = edges[:-1, len(neurons) :][:, group].sum(axis=1)
    np.testing.assert_allclose(np.asarray(found)[layers, 0, positions, numbers], want, atol=1e-12)


def test_changes_are_those_of_edits(clusters):
    """Set to zero, and put from another run; nothing changes without a change."""
    with jax.enable_x64():
        model = make_model(norm="rms", activation="relu", gated=False)
        tokens, other = np.array([ROWS[0][0]]), np.array([ROWS[0][1]])
        values = np.asarray(jclt.run(model, other, capture=("mlp_neurons",))[1]["mlp_neurons"])
        mask = np.zeros(values.shape, bool)
        mask[1, :, 3, 4:9] = True
        where: Any = {"site": "mlp_neurons", "layer": 1, "position": 3, "index": slice(4, 9)}
        edits = (jclt.Scale(0.0, **where), jclt.Set(values[1, 0, 3], **where), jclt.Scale(1.0, **where))
        changes = (
            clusters.ChangeNeurons(np.where(mask, 0.0, 1.0), np.zeros_like(values)),
            clusters.ChangeNeurons(np.where(mask, 0.0, 1.0), np.where(mask, values, 0)),
            clusters.ChangeNeurons(np.ones_like(values), np.zeros_like(values)),
        )
        for edit, change in zip(edits, changes, strict=True):
            want, found = (jclt.run(model, tokens, edit=one)[0] for one in (edit, change))
            np.testing.assert_allclose(found, want, atol=1e-12)


def test_random_neurons_are_others_of_the_same_places_active_ones_first(clusters):
    members, active = np.zeros((2, 2, 3, 10), bool)
    members[0, 1, :2] = members[1, 2, 4] = True
    active[0, 1, [0, 1, 5, 6]] = active[1, 2, :3] = True
    drawn = clusters.draw_alike(members, active, np.random.default_rng(0))
    assert not (drawn & members).any() and np.flatnonzero(drawn[0, 1]).tolist() == [5, 6]
    assert (drawn.sum(axis=2) == members.sum(axis=2)).all() and active[1, 2][drawn[1, 2]].all()
    shifted = clusters.shift_back(members)
    np.testing.assert_array_equal(shifted[:, :-1], members[:, 1:])
    assert not shifted[:, -1].any()
