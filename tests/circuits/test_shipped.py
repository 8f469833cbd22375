"""On the shipped model: gradients say what exact patching finds, and few neurons do what the model does."""

import numpy as np
import pytest
from more_cases import mark_others

import jclt
from jclt.circuits import score_nodes
from jclt.evaluation import grade_nodes
from jclt.evaluation.intervals import correlate

pytestmark = pytest.mark.exhaustive  # the page jclt/circuits/README.md runs a circuit by default; tables are measured


@pytest.mark.parametrize("task", ["agreement", "ioi"])
@pytest.mark.parametrize("kind", mark_others(["streams", "heads", "mlps"], ["streams", "heads", "mlps"]))
def test_relevance_and_integrated_gradients_agree_with_exact_patching(task, kind):
    model = jclt.load_model("demo")
    pairs = jclt.make_world_pairs(model, task, 24).keep_one_length()
    exact, atp, relp, ig = (
        score_nodes(model, pairs, kind, method).values.ravel() for method in ("exact", "atp", "relp", "ig activations")
    )
    differs = exact != 0
    assert correlate(relp[differs], exact[differs]) > 0.8
    assert correlate(ig[differs], exact[differs]) > 0.93


def test_two_hundred_neurons_agree_and_random_ones_do_not():
    model = jclt.load_model("demo")
    chosen, graded = (jclt.make_world_pairs(model, "agreement", 48, split) for split in ("train", "report"))
    scores = score_nodes(model, chosen, "neurons", "relp")
    few, random = grade_nodes(model, graded, scores, (200, 400), mean_of=chosen)
    assert few.faithfulness[0].low > 0.9 and few.completeness[0].high < 0.25
    assert random.faithfulness[0].high < 0.1 and np.abs(random.completeness[0].value - 1) < 0.1
