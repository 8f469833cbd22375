"""Claims of graphs, and circuits: counts by hand, and the handmade model, whose probabilities are known."""

import numpy as np
import pytest
from handmade_coders import faithful_coder
from traced_graphs import trace_whole_graph

import jclt
from jclt.evaluation.circuits import count_confirmed, draw_matched, list_edges, measure_circuit
from jclt.evaluation.faithfulness import predict_ablations
from jclt.graphs.influence import compute_edge_influence
from jclt.interventions.settings import Setting
from jclt.world.handmade import ANSWERS, PROMPTS, build_two_hop


def test_a_claim_is_confirmed_within_a_factor_of_two_and_with_its_sign():
    assert count_confirmed([1.0, 1.0, 1.0, 1.0, -2.0, 0.0], [0.5, 2.0, 2.1, -1.0, -1.0, 0.0]) == 3


def test_random_sets_have_as_many_features_of_each_place():
    graph = trace_whole_graph("gpt2", "clt", "float32")
    kept = np.flatnonzero(graph.masks().nodes[: len(graph.features)])
    drawn = draw_matched(graph, kept, np.random.default_rng(0))
    assert set(drawn) != set(kept) and len(set(drawn)) == len(kept)
    places = [sorted(map(tuple, graph.features[nodes, :2].tolist())) for nodes in (drawn, kept)]
    assert places[0] == places[1]


def test_the_edges_that_are_tested_have_the_most_influence():
    graph = trace_whole_graph("gpt2", "clt", "float32")
    n, edges = len(graph.features), list_edges(graph)
    influence = compute_edge_influence(graph.edges)[:n, :n]
    assert sorted(influence[t, s] for s, t in edges) == sorted(np.sort(influence, axis=None)[-10:])
    said = predict_ablations(graph)
    outputs = graph.nodes.find("output")[[graph.logit_probabilities.argmax()]]
    changes = said.relative @ graph.adjacency[outputs, :n].T
    np.testing.assert_allclose(changes[:, 0], said.changes[:, 0], rtol=1e-3, atol=1e-4)


@pytest.mark.exhaustive  # programs of another model; what sets features to zero is tested in tests/interventions
def test_the_handmade_circuit_is_necessary_and_sufficient():
    """The logits of capital, state and relation are 2, 1, 1 and those of 21 others 0; without features 0, 0, 1."""
    model = build_two_hop()
    coder = faithful_coder(model)
    graph = jclt.attribute(model, coder, np.asarray(PROMPTS[3]), targets=[ANSWERS[3]])
    found = measure_circuit(model, coder, graph, np.random.default_rng(0), Setting(None, "free", "free", "current"))
    with_circuit, without = np.exp(2) / (np.exp(2) + 2 * np.e + 21), 1 / (np.e + 23)
    assert found["kept"] == found["sufficiency"] == found["worst choice"] == found["size by influence"] == 1
    assert found["necessity"] == pytest.approx(1 - without / with_circuit) == found["necessity, random"]
    assert found["nothing kept"] == pytest.approx(without / with_circuit)
