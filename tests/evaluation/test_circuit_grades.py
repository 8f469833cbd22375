"""Grades of circuits: known ones of the handmade model, and the formulas on numbers made up for them."""

import numpy as np
import pytest

import jclt
from jclt import UserError
from jclt.circuits import score_nodes
from jclt.evaluation import CircuitGrades, area_under_roc, compute_faithfulness, grade_nodes, measure_minimality
from jclt.evaluation.circuit_grades import check_range, check_sizes, choose_best, compute_area
from jclt.world.handmade import ANSWERS, PROMPTS, STATE_OF_CITY, build_two_hop

CITIES = ((0, 1), (2, 5), (7, 4))
"""Clean and corrupted city of each pair, in different states."""


def get_pairs(model, cities=CITIES):
    return jclt.make_pairs(model, [(PROMPTS[a], PROMPTS[b], ANSWERS[a], ANSWERS[b]) for a, b in cities])


def plant(cities):
    """The neurons of cities and of their states, at the last position."""
    planted = np.zeros((2, 3, 12), bool)
    for city in cities:
        planted[0, 2, city] = planted[1, 2, STATE_OF_CITY[city]] = True
    return planted


@pytest.mark.parametrize(
    ("method", "reference"), [("exact", "corrupted"), ("ig inputs", "corrupted"), ("relp", "zero")]
)
def test_scores_find_the_neurons_of_the_handmade_model_and_labels_that_are_mixed_up_do_not(method, reference):
    model, (clean, corrupted) = build_two_hop(), CITIES[1]
    pairs = get_pairs(model, CITIES[1:2])
    scores = np.abs(score_nodes(model, pairs, "neurons", method, reference=reference, steps=20).values)
    # At the clean run alone, what the other city would do is not seen: its state's neuron is silent.
    planted = plant((clean, corrupted) if reference == "corrupted" else (clean,))
    assert area_under_roc(scores, planted) == 1
    generator = np.random.default_rng(0)
    mixed = [area_under_roc(scores, generator.permutation(planted.ravel()).reshape(planted.shape)) for _ in range(40)]
    assert abs(np.mean(mixed) - 0.5) < 0.05


def test_the_known_circuit_does_all_and_the_rest_nothing():
    model = build_two_hop()
    pairs = get_pairs(model, CITIES[1:2])
    scores = score_nodes(model, pairs, "neurons", "exact")
    known, random = grade_nodes(model, pairs, scores, (1, 4), ablation="counterfactual", draws=5)
    assert known.faithfulness[1].value == pytest.approx(1, abs=1e-6)
    assert known.completeness[1].value == pytest.approx(0, abs=1e-6)
    assert known.find_size() == 4 and random.find_size() is None and random.name == "random"
    assert known.faithfulness[0].value < 0.6 and random.faithfulness[1].value < 0.3
    drops, controls = measure_minimality(model, pairs, scores, 4, ablation="counterfactual")
    assert drops.min() > 0.4 and np.abs(controls).max() < 1e-6
    assert "m(all) 2.000" in str(known) and "72 nodes (neurons), counterfactual ablation" in str(known)


@pytest.mark.parametrize("ablation", ["zero", "mean", "counterfactual"])
def test_all_nodes_but_one_and_one_node_bound_the_curve(ablation):
    """Circuits are nested, all methods have the same ends, and several scores share the random circuits."""
    model = build_two_hop(norms=True)
    pairs = get_pairs(model)
    scores = [score_nodes(model, pairs, "neurons", method) for method in ("relp", "atp")]
    grades = grade_nodes(model, pairs, scores, (1, 71), ablation=ablation, draws=1)
    assert [grade.name for grade in grades] == ["relp", "atp", "random"]
    for grade in grades:
        np.testing.assert_array_equal(grade.whole, grades[0].whole)
        assert grade.circuit.shape == grade.rest.shape == (2, 3) and grade.total == 72
        assert grade.cmd().value >= 0
    order = scores[0].rank_nodes()
    assert (choose_best(order, 5, (72,)) <= choose_best(order, 9, (72,))).all()


def test_areas_are_those_of_trapezoids():
    curve = np.array([0.2, 0.6])
    assert compute_area((10, 50), 100, curve, "share", False) == pytest.approx(0.4 * 0.4 + 0.5 * 0.8)
    assert compute_area((10, 50), 100, curve, "share", True) == pytest.approx(0.4 * 0.6 + 0.5 * 0.2)
    far = np.log10(50 / 10)  # of a decade from 10 to 100
    assert compute_area((10, 50), 100, curve, "log share", False) == pytest.approx(0.4 * far + 0.8 * (1 - far))
    over = np.array([1.5, 1.5])
    assert compute_area((10, 50), 100, over, "share", True) == pytest.approx(0.4 * 0.5 + 0.5 * 0.25)
    with pytest.raises(UserError, match="axis 'log'"):
        compute_area((10, 50), 100, curve, "log", True)


def test_figures_are_ratios_of_means_with_intervals_that_hold_them():
    generator = np.random.default_rng(0)
    whole, empty = generator.normal(4, 1, 40), generator.normal(0, 1, 40)
    circuit = np.stack([empty + share * (whole - empty) + generator.normal(0, 0.3, 40) for share in (0.3, 0.9)])
    grades = CircuitGrades(
        "made up", "nodes", 100, (10, 50), circuit, circuit[::-1], whole, empty, "zero", "difference"
    )
    for figure, row in zip(grades.faithfulness, circuit, strict=True):
        assert figure.value == pytest.approx((row - empty).mean() / (whole - empty).mean())
        assert figure.low < figure.value < figure.high < figure.low + 0.2
    assert grades.completeness[0] == grades.faithfulness[1]
    cpr, cmd = grades.cpr(), grades.cmd()
    assert cpr.low < cpr.value < cpr.high and cmd.value == pytest.approx(0.9 - cpr.value, abs=0.01)
    assert compute_faithfulness(whole, whole, empty).value == 1 and compute_faithfulness(empty, whole, empty).value == 0


def test_what_cannot_be_graded_is_refused():
    with pytest.raises(UserError, match=r"1 with all nodes and 1 with none.*is it saturated"):
        check_range(np.full(5, 0.99999), np.full(5, 0.99998))
    with pytest.raises(UserError, match="expected two values that can be told apart"):
        check_range(np.array([1.0, -1.0, 2.0, -2.0]), np.array([-0.9, 0.9, -1.9, 2.1]))
    for sizes in ((), (0, 2), (2, 2), (3, 9)):
        with pytest.raises(UserError, match="expected increasing numbers of nodes from 1 to 8"):
            check_sizes(sizes, 9)
    with pytest.raises(UserError, match="planted: 0 of 3"):
        area_under_roc(np.arange(3.0), np.zeros(3, bool))
    assert area_under_roc(np.array([3.0, 1, 1, 0]), np.array([True, True, False, False])) == 0.875
    model = build_two_hop()
    pairs = get_pairs(model)
    scores = [score_nodes(model, pairs, basis, "atp") for basis in ("neurons", "heads")]
    with pytest.raises(UserError, match="of several bases"):
        grade_nodes(model, pairs, scores, (1,))
