"""The edges of large graphs, which are kept without zeros: everything is the same as with an array of all edges."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from graph_lists import random_graph

from jclt.errors import UserError
from jclt.graphs import (
    Graph,
    average_graphs,
    between_supernodes,
    export_json,
    import_json,
    load_graph,
    path_lengths,
    strongest_paths,
    suggest_supernodes,
    with_supernodes,
)
from jclt.graphs import adjacency as adjacency_module
from jclt.graphs.adjacency import SparseRows, compress, place_edges
from jclt.graphs.check import check_graph
from jclt.graphs.influence import compute_edge_influence
from jclt.graphs.npz import _pack
from jclt.graphs.prediction import predict_changes
from jclt.viewer.page_data import build_page_data
from jclt.viewer.picture import _find_strongest_edges


@pytest.fixture
def keep_no_array(monkeypatch):
    monkeypatch.setattr(adjacency_module, "LARGEST_ARRAY", 0)
    monkeypatch.setattr(adjacency_module, "BLOCK", 8 * 90 * 7)  # 7 rows


def assert_same_edges(got: Graph, want: Graph, share: float = 1e-12):
    assert isinstance(got.adjacency, SparseRows) and isinstance(want.adjacency, np.ndarray)
    np.testing.assert_allclose(got.adjacency, want.adjacency, rtol=share, atol=0)
    for name in ("rest", "rest_mass", "bias", "values", "cumulative_shares"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=share, atol=1e-15)
    assert repr(got) == repr(want)


@pytest.mark.parametrize("options", [{}, {"node_threshold": 0.5, "rule": "circuit-tracer"}, {"edge_threshold": 1.0}])
def test_graphs_without_zeros_are_explained_and_pruned_alike(options, keep_no_array, monkeypatch):
    monkeypatch.undo()
    want = random_graph(3, features=60, layers=4, rest=0.3, vectors=True)
    small, masks = want.prune(**options), want.masks(**options)
    monkeypatch.setattr(adjacency_module, "LARGEST_ARRAY", 0)
    monkeypatch.setattr(adjacency_module, "BLOCK", 8 * len(want) * 7)
    got = replace(want, adjacency=compress(want.adjacency))
    check_graph(got, "graph")
    assert_same_edges(got, want)
    np.testing.assert_array_equal(got.influence, want.influence)
    np.testing.assert_allclose(got.residual, want.residual, atol=1e-12)
    assert got.scores == want.scores and got.missing == want.missing
    np.testing.assert_array_equal(got.masks(**options).nodes, masks.nodes)
    np.testing.assert_array_equal(np.asarray(got.masks(**options).edges), masks.edges)
    assert_same_edges(got.prune(**options), small)
    assert got.prune(**options).scores == small.scores


def test_files_pages_paths_and_pictures_of_both_are_the_same(keep_no_array, tmp_path):
    want = random_graph(5, features=40, positions=True)
    want = replace(want, adjacency=want.adjacency.astype(np.float32))
    got = replace(want, adjacency=compress(want.adjacency))
    for name, graph in (("got", got), ("want", want)):
        graph.save(tmp_path / f"{name}.npz")
    assert (tmp_path / "got.npz").read_bytes() == (tmp_path / "want.npz").read_bytes()
    assert_same_edges(load_graph(tmp_path / "got.npz"), want)
    assert export_json(got) == export_json(want) and build_page_data(got, "graph") == build_page_data(want, "graph")
    export_json(want, tmp_path / "graph.json")
    assert_same_edges(
        import_json(tmp_path / "graph.json"),
        replace(want, bias=0 * want.bias, nodes=import_json(tmp_path / "graph.json").nodes),
    )
    assert strongest_paths(got, 9) == strongest_paths(want, 9)
    np.testing.assert_array_equal(path_lengths(got), path_lengths(want))
    for total in (True, False):
        changed = [predict_changes(graph, {3: -1.0, 5: 0.5}, total=total) for graph in (got, want)]
        np.testing.assert_allclose(*changed, rtol=1e-6, atol=1e-6)
    grouped = [
        between_supernodes(with_supernodes(graph, {"a": (1, 2), "b": (30,)}), others=True) for graph in (got, want)
    ]
    assert grouped[0][0] == grouped[1][0]
    np.testing.assert_array_equal(grouped[0][1], grouped[1][1])
    assert suggest_supernodes(got) == suggest_supernodes(want)
    np.testing.assert_array_equal(average_graphs([got, got]).adjacency, average_graphs([want, want]).adjacency)
    influence = compute_edge_influence(want.edges)
    order = np.argsort(influence, axis=None, kind="stable")
    targets, sources = np.unravel_index(order[np.sort(influence, axis=None) > 0], influence.shape)
    for found, expected in zip(
        _find_strongest_edges(got), (targets, sources, want.adjacency[targets, sources]), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_a_list_of_edges_may_be_in_any_order(keep_no_array):
    targets, sources, weights = np.array([[2, 1, 1, 2], [1, 2, 0, 1]]).tolist() + [np.array([1.0, 2.0, 3.0, 4.0])]
    got = place_edges(np.array(targets), np.array(sources), weights, 4)
    assert isinstance(got, SparseRows) and got.nbytes == 5 * 8 + 3 * (4 + 8)
    np.testing.assert_array_equal(got, [[0] * 4, [3, 0, 2, 0], [0, 4, 0, 0], [0] * 4])
    np.testing.assert_array_equal(got[1], [3, 0, 2, 0])
    np.testing.assert_array_equal(got @ np.arange(4.0), [0, 4, 4, 0])


def test_memory_is_that_of_the_edges_there_are(keep_no_array, monkeypatch, tmp_path):
    """One in six of the pairs has an edge."""
    graph = random_graph(0, features=900, layers=6, tokens=10, density=0.4)
    array = graph.adjacency.astype(np.float32)
    graph = replace(graph, adjacency=compress(array))
    assert np.count_nonzero(array) < array.size / 5 and graph.adjacency.nbytes < 0.42 * array.nbytes
    monkeypatch.setattr(adjacency_module, "BLOCK", 1 << 16)
    path, size = tmp_path / "graph.npz", array.nbytes
    graph.save(path)
    for function, share in (
        (graph.prune, 0.3),
        (lambda: graph.scores, 0.15),
        (lambda: _pack(graph.adjacency), 0.35),
        (lambda: load_graph(path), 1.0),
    ):
        tracemalloc.start()
        function()
        assert tracemalloc.get_traced_memory()[1] < share * size, function
        tracemalloc.stop()
    monkeypatch.setattr("jclt.memory.measure_free_host_memory", lambda: size)
    with pytest.raises(UserError, match="^graph: an array of the edges of its 972 nodes: needs .*; prune it first$"):
        np.asarray(graph.adjacency)
    with pytest.raises(UserError, match="^graph: the shares of edges between its 972 nodes: needs .*; prune it first$"):
        strongest_paths(graph)
