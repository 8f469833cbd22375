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
    labels = random.choice(["a", "b", "c"], 60)
    inputs = random.normal(size=(60, 5)) + 2 * np.eye(5)[[["a", "b", "c"].index(x) for x in labels]]
    kept, probe = random.random(60) < 0.7, script.Probe(inputs, labels)
    scaled = np.c_[(inputs - inputs.mean(axis=0)) / (inputs.std(axis=0) + 1e-6), np.ones(60)]
    targets = np.stack([labels == value for value in "abc"], axis=1).astype(float)
    # Ridge regression as least squares with one more row for each input.
    more = np.sqrt(script.RIDGE * kept.sum()) * np.eye(6)
    weights = np.linalg.lstsq(np.r_[scaled[kept], more], np.r_[targets[kept], np.zeros((6, 3))], rcond=None)[0]
    want = [("a", "b", "c")[i] for i in (scaled @ weights).argmax(axis=1)]
    assert [probe.read(x, kept) for x in inputs] == want


def test_a_probe_does_not_tell_a_value_that_was_left_out(script):
    labels = np.array(["a", "b"] * 20)
    inputs = np.where(labels == "a", 1.0, -1.0)[:, None] + np.zeros((40, 3))
    probe = script.Probe(inputs, labels)
    assert probe.read(inputs[0], np.ones(40, bool)) == "a"
    assert probe.read(inputs[0], labels == "b") == "b"


def test_embeddings_do_not_hold_a_citys_state_and_later_layers_do(script):
    from jclt import load_model
    from jclt.world import TASKS

    tested, others = (
        TASKS["two_hop"].examples(split, count, seed=0) for split, count in (("choose", 12), ("train", 800))
    )
    shares = script.measure_concept(load_model("demo"), "state", tested, others)
    assert shares["exact"][0] < 0.3 and shares["exact"][-1] == 1
    assert shares["permuted"].max() < 0.5
