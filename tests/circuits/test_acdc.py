"""ACDC and edge scores on models set by hand, whose edges are known."""

from functools import cache

import numpy as np
import pytest
from handmade_induction import CLEAN, CORRUPTED, EDGES, RIGHT, THROUGH_PATTERNS, WRONG, build_induction
from more_cases import mark_others

from jclt import UserError, make_pairs
from jclt.circuits import find_circuit, score_edges
from jclt.circuits.edges import find_edges, list_edges, name_edges
from jclt.evaluation.circuit_grades import area_under_roc
from jclt.world.handmade import ANSWERS, BEGIN, PROMPTS, build_two_hop

CITIES = (0, 1)
"""Of two states."""
CHAIN = {"input->a0.h0<v>", "a0.h0->m0", "m0->m1", "m1->logits"}
TWO_HOP = {
    "city": ((*PROMPTS[CITIES[1]],), CHAIN),
    "city and relation": ((*PROMPTS[CITIES[1]][:2], BEGIN), CHAIN | {"input->m0", "input->m1"}),
}
"""Corrupted prompts, and the edges that the answer needs: those whose sender differs."""


@cache
def make_case(name):
    """A model, pairs, and the edges that the difference between two answers needs."""
    if name == "induction":
        model = build_induction()
        return model, make_pairs(model, [(CLEAN, CORRUPTED, RIGHT, WRONG)]), EDGES
    kind, _, variant = name.partition(", ")
    model = build_two_hop(basis_seed=1) if variant else build_two_hop()
    corrupted, edges = TWO_HOP[kind]
    answers = ANSWERS[CITIES[0]], ANSWERS[CITIES[1]]
    return model, make_pairs(model, [(PROMPTS[CITIES[0]], corrupted, *answers)]), edges


NAMES = [*TWO_HOP, "city and relation, rotated", "induction"]


@pytest.mark.parametrize("name", mark_others(NAMES, ["city and relation, rotated", "induction"]))
def test_acdc_finds_exactly_the_edges_over_two_decades(name):
    model, pairs, edges = make_case(name)
    places = np.argwhere(list_edges(model.config))
    shuffled = np.random.default_rng(0).permutation(places)
    for threshold in (0.003, 0.03, 0.3):
        for order in (None, shuffled):
            found = find_circuit(
                model, pairs, threshold, metric="logit_difference", order=order, prune=False, progress=False
            )
            assert set(found.names) == edges, (threshold, order is None)
    assert found.passes <= len(places)


def test_the_divergence_also_sees_what_changes_other_tokens():
    """The city's neuron writes the state, which is a token, too."""
    model, pairs, edges = make_case("city")
    found = find_circuit(model, pairs, 1e-4, progress=False)
    assert set(found.names) == edges | {"m0->logits"} and found.loss < 1e-4


def test_a_circuit_can_begin_within_another():
    model, pairs, edges = make_case("induction")
    start = find_edges(model.config, edges | {"input->logits"})
    found = find_circuit(model, pairs, 0.01, metric="logit_difference", start=start, progress=False)
    assert set(found.names) == edges
    broken = find_edges(model.config, edges - {"a0.h0->a1.h0<k>"})
    assert not find_circuit(model, pairs, 10.0, metric="logit_difference", start=broken, progress=False).kept.any()
    for settings, message in (
        ({"threshold": 0.0}, "threshold=0.0"),
        ({"order": np.array([[3, 0]])}, "order: expected rows"),
    ):
        with pytest.raises(UserError, match=message):
            find_circuit(model, pairs, **{"threshold": 0.1} | settings)


@pytest.mark.parametrize("name", mark_others(NAMES, ["induction"]))
def test_scores_tell_the_edges_from_all_others(name):
    """Of integrated gradients with a point near the clean run: at most others the thresholds let nothing through."""
    model, pairs, edges = make_case(name)
    possible = list_edges(model.config)
    planted = find_edges(model.config, edges)[possible]
    for method in ("exact", "eap ig inputs", "relp"):
        found = score_edges(model, pairs, method, quadrature="gauss", progress=False)
        scores = np.abs(found.values[possible])
        assert area_under_roc(scores, planted) == 1.0, method
    permuted = [area_under_roc(scores, np.random.default_rng(seed).permutation(planted)) for seed in range(200)]
    assert abs(np.mean(permuted) - 0.5) < 0.05


def test_a_frozen_pattern_hides_edges_through_queries_and_keys():
    model, pairs, edges = make_case("induction")
    scores = score_edges(model, pairs, "relp", rules="relp with attention", progress=False).values
    seen = set(name_edges(model.config, np.abs(scores) > 1e-6))
    assert seen == edges - THROUGH_PATTERNS
