"""The rules of experiments/intermediates.py: which features of a graph say a concept, at which place."""

import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    yield import_module("intermediates")
    sys.modules.pop("intermediates", None)


@pytest.mark.parametrize(("position", "says"), [(3, 1), (4, 0), (2, 0)])
def test_a_feature_says_a_concept_where_it_tells_its_value(script, monkeypatch, position, says):
    """One feature that fires at the concept's position, 3, for its value alone, and later for every value."""
    monkeypatch.setattr(script, "measure_walks", lambda graph, nodes: 0.0)
    right = np.arange(20) < 10
    fires = np.stack([right, np.ones(20, bool)], axis=1)
    kept = script.KeptFeatures(None, np.array([0]), np.array([0]), np.array([position]))
    finding = script.measure_prompt(kept, 3, fires, right, np.random.default_rng(0))
    assert (finding.feature, finding.base) == (says, 0.5)


def test_firings_are_those_at_the_start_and_after_it(script):
    """Beside the activations of each prompt alone."""
    import jclt
    from jclt.world import TASKS

    model = jclt.load_model("demo")
    coder = jclt.load_coder("demo", model=model)
    examples = TASKS["two_hop"].examples("choose", 3, seed=0)
    starts = np.array([2, 5, 4])
    found = script.find_firings(model, coder, examples, starts)
    for example, start, row in zip(examples, starts, found, strict=True):
        reads = jclt.run(model, example.prompt, capture=(coder.config.reads,))[1][coder.config.reads]
        active = np.concatenate(
            [np.asarray(coder.encode(layer, read)) > 0 for layer, read in enumerate(reads)], axis=-1
        )
        active = active.reshape(-1, active.shape[-1])
        np.testing.assert_array_equal(row, np.concatenate([active[start], active[start + 1 :].any(axis=0)]))
