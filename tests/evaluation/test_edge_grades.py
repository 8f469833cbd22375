"""Grades of edges on a model set by hand: the planted edges are faithful and complete under each ablation; ends are 1
and 0."""

import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import golden_model
from handmade_induction import CLEAN, CORRUPTED, EDGES, RIGHT, WRONG, build_induction
from patching_prompts import compute_difference, get_pairs

import jclt
from jclt import UserError, make_pairs
from jclt.circuits import run_edge_circuits, score_edges
from jclt.circuits.edges import list_edges
from jclt.evaluation.edge_grades import grade_edges, list_sizes
from jclt.models import Replace
from jclt.models.sites import SITE_AXES

ROTATED = [tuple((x + 1) % 11 + 1 for x in side) for side in (CLEAN, CORRUPTED)]
"""The same with other tokens."""


def make_rows():
    return [(CLEAN, CORRUPTED, RIGHT, WRONG), (*ROTATED, (RIGHT + 1) % 11 + 1, (WRONG + 1) % 11 + 1)]


def test_planted_edges_are_faithful_and_complete():
    model = build_induction()
    pairs = make_pairs(model, make_rows())
    scores = score_edges(model, pairs, progress=False)
    grades, random = grade_edges(model, pairs, scores, (len(EDGES) - 1, len(EDGES), 20), draws=5)
    faithful, complete = ([figure.value for figure in kind] for kind in (grades.faithfulness, grades.completeness))
    assert faithful[0] < 0.9 and complete[0] < 0.1
    np.testing.assert_allclose(faithful[1:], 1, atol=1e-4)
    np.testing.assert_allclose(complete[1:], 0, atol=1e-4)
    assert random.name == "random" and random.faithfulness[1].value < 0.2
    assert 0 <= grades.cmd().value < 0.05 < 0.3 < random.cmd().value and grades.cpr().value > 0.9 > random.cpr().value


@pytest.mark.parametrize("ablation", ["counterfactual", "zero", "mean", "resample"])
def test_all_edges_are_the_model_and_none_is_the_ablation(ablation):
    """Without edges the logits read what senders write in the ablation, all at once."""
    model, pairs = golden_model("neox"), get_pairs("neox")
    edges, sites = list_edges(model.config), ("token_embedding", "head_out", "mlp_out")
    got = run_edge_circuits(model, pairs, np.stack([edges, np.zeros_like(edges)]), ablation=ablation)
    clean, corrupted = (np.stack(side) for side in (pairs.clean, pairs.corrupted))
    other = jclt.run(model, clean[::-1] if ablation == "resample" else corrupted, capture=sites)[1]
    if ablation in ("mean", "zero"):
        batch = {name: x.ndim - len(SITE_AXES[name]) for name, x in other.items()}
        other = {
            name: jnp.mean(x, axis=batch[name], keepdims=True) * float(ablation == "mean") for name, x in other.items()
        }
        other = {name: jnp.repeat(x, 2, axis=batch[name]) for name, x in other.items()}
    for values, edit in zip(got, (None, Replace(other)), strict=True):
        logits = np.asarray(jclt.run(model, clean, edit=edit)[0][:, -1])
        np.testing.assert_allclose(values, compute_difference(logits), atol=1e-5)
    assert np.abs(got[1] - got[0]).max() > 1e-3


def test_what_cannot_be_graded_is_named():
    model = build_induction()
    pairs = make_pairs(model, make_rows())
    scores = score_edges(model, pairs, "eap", progress=False)
    with pytest.raises(UserError, match="sizes .*: expected increasing numbers"):
        grade_edges(model, pairs, scores, (5, 5))
    with pytest.raises(UserError, match="circuits: bool of shape"):
        run_edge_circuits(model, pairs, np.zeros((1, 2, 3), bool))
    assert list_sizes(golden_model("gpt2").config)[0] == 1
