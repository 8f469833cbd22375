"""Figures of graphs: on the handmade model, whose graph is known; and the threshold of neurons."""

import numpy as np
import pytest
from traced_graphs import make_case

import jclt
from jclt.coders import neurons
from jclt.evaluation.graph_figures import measure_path, threshold_neurons
from jclt.evaluation.questions import THRESHOLDED, answer_questions
from jclt.world.handmade import ANSWERS, PROMPTS, build_two_hop


@pytest.mark.exhaustive  # programs of its own; scores, paths and pruning are tested in tests/graphs
def test_figures_of_the_handmade_model_are_those_by_hand():
    """Of the walks from the capital 23/24 go to the state's feature and 1/48 each to the city's and the relation. Half
    of those at the state's go on to the city's, from where all end at an embedding."""
    model = build_two_hop()
    prompts = [np.asarray(prompt) for prompt in PROMPTS[:2]]
    text, summary = answer_questions(model, {"neurons": neurons(model), THRESHOLDED: None}, ["graphs"], prompts)
    for figures in (summary["graphs"]["neurons"], summary["graphs"][THRESHOLDED]):
        for name, value in {
            "completeness": 1,
            "replacement score": 1,
            "features": 2,
            "features kept at 0.8": 2,
        }.items():
            assert figures[name]["value"] == pytest.approx(value, abs=1e-5), name
            assert figures[name]["prompts"] == 2
    graph = jclt.attribute_batch(model, neurons(model), prompts, targets=[ANSWERS[1]])[1]
    assert measure_path(graph) == pytest.approx((1 + 2 * 24 + 3 * 23) / 48)
    assert "thresholded-neurons" in text and "0.61; per layer 0.37" in text


def test_as_many_neurons_are_above_the_threshold_as_features_are_active():
    model, coder, tokens = make_case("gpt2", "clt", "float32")
    _, seen = jclt.run(model, tokens, capture=("mlp_in",))
    above = threshold_neurons(model, coder, [tokens])
    counts = [sum(np.count_nonzero(c.encode(i, seen["mlp_in"][i])) for i in range(3)) for c in (coder, above)]
    assert counts[0] == counts[1] > 0 and above.threshold > 0
    kept = np.asarray(above.encode(1, seen["mlp_in"][1]))
    np.testing.assert_array_equal(kept[kept != 0], np.asarray(neurons(model).encode(1, seen["mlp_in"][1]))[kept != 0])
