"""Means and differences of graphs: they obey the law of graphs, and tables are sums over nodes."""

import numpy as np
import pytest
from traced_graphs import trace_whole_graph

from jclt.errors import UserError
from jclt.graphs import Graph, average_graphs, find_shared_features, load_graph, subtract_graphs, tabulate_influence


def take_part(graph: Graph) -> Graph:
    return graph.prune(0.6)


def test_the_mean_of_a_graph_with_itself_is_itself():
    graph = trace_whole_graph("gpt2", "clt", "float32")
    mean = average_graphs([graph, graph])
    order = np.lexsort(graph.features.T[::-1])
    np.testing.assert_array_equal(mean.features, graph.features[order])
    np.testing.assert_allclose(mean.influence[: len(order)], graph.influence[order], rtol=1e-4, atol=1e-6)
    assert mean.tokens.tolist() == graph.tokens.tolist() and mean.scores.both == pytest.approx(graph.scores.both)
    assert not subtract_graphs([graph], [graph]).adjacency.any()


def test_means_and_differences_obey_the_law_of_graphs(tmp_path):
    graph = trace_whole_graph("gpt2", "clt", "float32")
    part = take_part(graph)
    mean, difference = average_graphs([graph, part]), subtract_graphs([graph], [part])
    for combined in (mean, difference):
        assert combined.conservation_error < 1e-5
    # An edge that only the first has counts half in the mean, and whole in the difference.
    key = {tuple(x): node for node, x in enumerate(mean.features.tolist())}
    alone = next(node for node, x in enumerate(graph.features.tolist()) if x not in part.features.tolist())
    to = key[tuple(graph.features[alone].tolist())]
    assert mean.adjacency[to].sum() == pytest.approx(graph.adjacency[alone].sum() / 2, rel=1e-4)
    assert difference.adjacency[to].sum() == pytest.approx(graph.adjacency[alone].sum(), rel=1e-4)
    mean.save(tmp_path / "mean.npz")
    np.testing.assert_array_equal(load_graph(tmp_path / "mean.npz").adjacency, mean.adjacency)


def test_tables_are_sums_over_nodes():
    graph = trace_whole_graph("gpt2", "clt", "float32")
    part, n = take_part(graph), len(graph.features)
    classes = [["first", *["later"] * 4]] * 2
    table = tabulate_influence([graph, part], classes)
    influence = graph.influence[:n]
    first = (graph.features[:, 0] == 1) & (graph.features[:, 1] == 0)
    assert table[1, "first", ""][0] == pytest.approx(influence[first].sum() / influence.sum(), rel=1e-5)
    np.testing.assert_allclose(sum(table.values()), 1)
    shared, shares = find_shared_features([graph, part], least=1.0)
    assert set(map(tuple, shared)) == set(map(tuple, part.features[:, ::2])) and (np.diff(shares) <= 0).all()
    with pytest.raises(UserError, match="graphs: none"):
        average_graphs([])
