"""The probes of experiments/concept_probes.py."""

import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    yield import_module("concept_probes")
    for name in ("concept_probes", "intermediates"):
        sys.modules.pop(name, None)


def test_a_probe_is_the_ridge_regression_of_the_kept_prompts_alone(script):
    random = np.random.default_rng(0)
    inputs, numbers, kept = random.normal(size=(60, 5)), random.integers(0, 3, 60), random.random(60) < 0.7
    scaled = np.c_[(inputs - inputs.mean(axis=0)) / (inputs.std(axis=0) + 1e-6), np.ones(60)]
    # Ridge regression as least squares with one more row for each input.
    penalty = np.sqrt(script.RIDGE * kept.sum()) * np.eye(6)
    rows = np.r_[scaled[kept], penalty], np.r_[np.eye(3)[numbers][kept], np.zeros((6, 3))]
    probe = script.Probe(inputs, np.array(list("abc"))[numbers])
    np.testing.assert_allclose(probe.fit(kept), np.linalg.lstsq(*rows, rcond=None)[0], atol=1e-10)


def test_a_probe_predicts_no_value_that_was_left_out(script):
    labels = np.array(["a", "b"] * 20)
    inputs = np.where(labels == "a", 1.0, -1.0)[:, None] + np.zeros((40, 3))
    probe = script.Probe(inputs, labels)
    assert probe.predict(inputs[0], np.ones(40, bool)) == "a"
    assert probe.predict(inputs[0], labels == "b") == "b"


def test_prompts_with_the_same_token_are_left_out_unless_it_is_the_value(script):
    tokens, labels = np.array([5, 6, 5, 7]), np.array(["x", "x", "x", "y"])
    found = script.find_other_tokens(tokens, labels, np.ones(4, bool), 5, "x")
    np.testing.assert_array_equal(found, [False, True, False, True])
    assert script.find_other_tokens(tokens, labels, np.ones(4, bool), 7, "y").all()


def test_embeddings_do_not_hold_a_citys_state_and_later_layers_do(script):
    from jclt import load_model
    from jclt.world import TASKS

    examples = [TASKS["two_hop"].examples(x, n, seed=0) for x, n in (("choose", 12), ("train", 800))]
    tested, others = (script.read_prompts(load_model("demo"), some, "state") for some in examples)
    permuted = np.random.default_rng(0).permutation(others.values)
    exact, by_chance = (
        script.measure_places("state", tested, script.predict_values("state", tested, others, labels))
        for labels in (others.values, permuted)
    )
    assert exact[0] < 0.3 and exact[-1] == 1
    assert by_chance[-4:].max() < 0.5  # at the end
