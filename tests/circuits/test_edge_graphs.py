"""Edges between heads and MLPs as a graph: the same sums, and all that serves a graph."""

import numpy as np
from golden_cases import golden_model
from patching_prompts import get_pairs

import jclt
from jclt.circuits import make_edge_graph, score_edges
from jclt.circuits.edges import list_edges, take_best
from jclt.graphs import load_graph, name_of


def test_a_graph_has_the_scores_and_serves_as_others_do(tmp_path):
    """`llama3` has heads that share keys and values: their parts add up to the scores."""
    model = golden_model("llama3")
    config = model.config
    scores = score_edges(model, get_pairs("llama3"), "eap", progress=False)
    values, edges = scores.values, list_edges(config)
    graph = make_edge_graph(scores)
    kinds = {"feature": config.layers, "head": config.layers * config.heads, "token": 1, "output": 1}
    assert {kind: count for kind, count in graph.counts.items() if count} == kinds
    np.testing.assert_allclose(graph.adjacency.sum(), -values.sum(), rtol=1e-6)
    output = graph.adjacency[graph.nodes.find("output")[0]]
    first_head = graph.nodes.find("head")[0]
    np.testing.assert_allclose(output[first_head], -values[1, -1], rtol=1e-6)
    into = graph.adjacency[first_head, graph.nodes.find("token")[0]]
    group = config.heads // config.key_heads
    columns = [scores.receivers.index(name) for name in ("a0.h0<q>", "a0.h0<k>", "a0.h0<v>")]
    np.testing.assert_allclose(into, -values[0, columns] @ np.array([1, 1 / group, 1 / group]), rtol=1e-6)
    assert name_of(graph, 1).startswith("MLP (1/0)") and graph.conservation_error < 1e-12

    few = make_edge_graph(scores, take_best(config, values, 20))
    assert 0 < np.count_nonzero(few.adjacency) <= 20 * group and few.conservation_error < 1e-12
    np.testing.assert_allclose(few.values, graph.values, atol=1e-12)
    small = graph.prune(0.7)
    assert len(small) < len(graph) and edges.sum() > np.count_nonzero(small.adjacency)
    small.save(tmp_path / "circuit.npz")
    np.testing.assert_allclose(load_graph(tmp_path / "circuit.npz").adjacency, small.adjacency, rtol=1e-6)
    jclt.export_html(small, tmp_path / "circuit.html")
    assert (tmp_path / "circuit.html").stat().st_size > 10_000
