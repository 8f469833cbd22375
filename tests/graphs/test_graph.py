"""Attribution graphs: influence, scores, pruning, paths and files, against closed forms and plain reference code."""

import io
import json
import pickle
import tracemalloc
import zipfile
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from golden_graphs import GRAPHS, golden_graph
from graph_lists import assert_same_graph, hand_graph, random_graph, replace_lists

from jclt.errors import UserError
from jclt.graphs import adjacency as adjacency_module
from jclt.graphs.circuit_tracer_pt import read_circuit_tracer
from jclt.graphs.curve import curve
from jclt.graphs.graph import Graph
from jclt.graphs.influence import compute_cumulative_shares, compute_edge_shares
from jclt.graphs.load import load_graph
from jclt.graphs.names import label_nodes, name_of
from jclt.graphs.npz import _pack
from jclt.graphs.paths import between_supernodes, describe, path_lengths, strongest_paths, with_supernodes


def dense_influence(graph: Graph) -> np.ndarray:
    """The influence, by the inverse of I - A."""
    sizes = np.abs(graph.adjacency)
    mass = sizes.sum(axis=1) + graph.rest_mass
    shares = np.divide(sizes, mass[:, None], out=np.zeros_like(sizes), where=mass[:, None] > 0)
    everything = np.linalg.inv(np.eye(len(sizes)) - shares) - np.eye(len(sizes))
    return graph.logit_probabilities @ everything[graph.nodes.find("output")]


def all_paths(graph: Graph, starts: np.ndarray) -> list[tuple[float, tuple[int, ...]]]:
    """Every walk that ends at a node without inputs, from the source up, with its share."""
    shares = compute_edge_shares(graph.edges)
    closed_paths, open_paths = [], [(float(start), (node,)) for node, start in enumerate(starts) if start > 0]
    while open_paths:
        share, path = open_paths.pop()
        sources = np.flatnonzero(shares[path[0]])
        if not len(sources) and len(path) > 1:
            closed_paths.append((share, path))
        open_paths += [(share * shares[path[0], source], (int(source), *path)) for source in sources]
    return sorted(closed_paths, reverse=True)


def test_influence_and_scores_of_a_small_graph_have_these_values():
    graph = hand_graph()
    # Of the output's 4, three quarters come through f1; half of that through f0, half from the error.
    expected = 0.5 * np.array([3 / 8, 3 / 4, 3 / 8, 3 / 32, 1 / 4 + 9 / 32, 0])
    np.testing.assert_allclose(graph.influence, expected, rtol=1e-6)
    assert graph.influence.dtype == np.float32 and compute_edge_shares(graph.edges).dtype == np.float32
    scores = graph.scores
    assert scores.replacement == pytest.approx(5 / 8)
    visits = 1 + 3 / 4 + 3 / 8 + 3 / 8 + 5 / 8
    assert scores.completeness == pytest.approx(1 - 3 / 4 * 1 / 2 / visits)
    assert scores.replacement_interval == pytest.approx((5 / 8, 5 / 8)) and graph.missing == 0


def test_what_comes_from_outside_the_graph_is_missing():
    graph = hand_graph()
    rest_mass = np.array([0, 4, 0, 0, 0, 0], np.float32)  # as much again as f1 gets within the graph
    graph = replace(graph, rest_mass=rest_mass, rest=-rest_mass)
    assert graph.missing == pytest.approx(3 / 8)
    scores = graph.scores
    tokens, error, missing = 1 / 4 + 3 / 16, 3 / 16, 3 / 8
    assert scores.replacement == pytest.approx(tokens / (tokens + error + missing))
    assert scores.replacement_interval == pytest.approx((tokens, tokens + missing))
    visits = 1 + 3 / 4 + 3 / 16 + tokens + error
    assert scores.completeness == pytest.approx((visits - 3 / 16 - missing) / visits)
    further = missing * 3  # layers 1 and 0, and an embedding or error
    low, high = (visits - 3 / 16) / (visits + further), (visits - 3 / 16 + further) / (visits + further)
    assert scores.completeness_interval == pytest.approx((low, high))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rest", [0.0, 1.0])
def test_one_pass_over_the_layers_gives_the_inverse(seed, rest):
    graph = random_graph(seed, rest=rest, positions=seed % 2 == 0)
    want = dense_influence(graph)
    np.testing.assert_allclose(graph.influence, want, rtol=1e-12, atol=1e-15)
    assert (want[graph.nodes.find("feature")] > 0).any()
    in_single = replace(graph, adjacency=graph.adjacency.astype(np.float32))
    np.testing.assert_allclose(in_single.influence, want, rtol=1e-5, atol=1e-8)


def test_features_in_any_order_have_the_same_influence():
    graph = random_graph(3)
    order = np.r_[np.random.default_rng(0).permutation(20), 20 : len(graph)]
    shuffled = replace_lists(
        graph, adjacency=graph.adjacency[np.ix_(order, order)], features=graph.features[order[:20]]
    )
    np.testing.assert_allclose(shuffled.influence, graph.influence[order], rtol=1e-12)


def test_an_empty_graph_explains_nothing():
    graph = random_graph(0, density=0.0)
    assert (graph.scores.replacement, graph.missing) == (0.0, 0.0)
    assert len(graph.prune(rule="circuit-tracer")) == 4 + 2 and not path_lengths(graph).any()
    assert strongest_paths(graph) == []
    no_outputs = random_graph(0, outputs=0)
    assert (no_outputs.scores.completeness, no_outputs.missing) == (0.0, 0.0)


@pytest.mark.parametrize("seed", range(40))
def test_the_whole_graph_lies_within_the_intervals(seed):
    full_graph = random_graph(seed, features=30, layers=4, density=0.3)
    random = np.random.default_rng(seed)
    nodes = np.ones(len(full_graph), bool)
    nodes[:30] = random.random(30) < random.uniform(0.1, 0.9)
    edges = None
    if seed % 2:  # errors and single edges may be missing too
        nodes[full_graph.nodes.find("error")] = random.random(16) < 0.5
        edges = random.random(full_graph.adjacency.shape) < 0.9
    part = full_graph.keep(nodes, edges)
    want, got = full_graph.scores, part.scores
    assert part.missing > 0
    for name in ("replacement", "completeness"):
        low, high = getattr(got, name + "_interval")
        assert low - 1e-12 <= getattr(want, name) <= high + 1e-12
        assert 0 <= low < high <= 1
    is_kept = nodes | full_graph.nodes.is_kind("token", "position", "output")
    gained = (full_graph.influence[is_kept] - part.influence) / full_graph.logit_probabilities.sum()
    assert gained.min() > -1e-12 and gained.max() <= part.missing + 1e-12 and gained.max() > 0


@pytest.mark.parametrize(("source", "end"), [("token", 1), ("error", 0)])
def test_the_bounds_of_replacement_are_met_by_graphs_that_go_one_way(source, end):
    """The missing contributions may be all embeddings or all errors."""
    full = random_graph(7, features=12, layers=2)
    full = replace_lists(full, features=full.features + np.array([2, 0, 0]), layers=4)  # above all errors
    full.adjacency[:12] = np.isin(np.arange(len(full)), full.nodes.find(source))
    part = full.keep(np.arange(len(full)) >= 6)
    assert full.scores.replacement == pytest.approx(part.scores.replacement_interval[end])
    assert 0.1 < full.scores.replacement < 0.9 and part.missing > 0.1


@pytest.mark.parametrize("rule", ["paper", "circuit-tracer"])
@pytest.mark.parametrize("rest", [0.0, 0.5])
def test_pruning_keeps_the_law(rule, rest):
    graph = random_graph(1, features=60, rest=rest)
    pruned = graph.prune(0.7, 0.9, rule)
    assert len(pruned) < len(graph) and np.abs(pruned.residual).max() < 1e-12
    assert np.abs(pruned.rest).sum() > np.abs(graph.rest).sum() and pruned.rest_mass.sum() > graph.rest_mass.sum()
    total = np.abs(pruned.adjacency).sum(axis=1) + pruned.rest_mass
    mass = (np.abs(graph.adjacency).sum(axis=1) + graph.rest_mass)[graph.masks(0.7, 0.9, rule).nodes]
    np.testing.assert_allclose(total, mass, rtol=1e-12)


def test_nodes_are_kept_up_to_the_threshold():
    graph = random_graph(2, features=40)
    masks = graph.masks(0.6, 1.0, "circuit-tracer")
    influence = dense_influence(graph)
    order = np.argsort(-influence)
    needed = order[: np.searchsorted(np.cumsum(influence[order]) / influence.sum(), 0.6) + 1]
    assert set(np.flatnonzero(masks.nodes)) <= set(needed) | set(graph.nodes.find("token", "output"))
    np.testing.assert_allclose(masks.cumulative[order], np.cumsum(influence[order]) / influence.sum(), rtol=1e-10)
    assert masks.nodes[graph.nodes.find("token", "output")].all()


def slow_edge_mask(graph: Graph, nodes: np.ndarray, threshold: float) -> np.ndarray:
    """The edges that carry this share of the influence among these nodes, one by one from the strongest."""
    subgraph = replace(graph, adjacency=graph.adjacency * nodes[:, None] * nodes)
    flow = compute_edge_shares(subgraph.edges) * (dense_influence(subgraph) + graph.output_weights)[:, None]
    mask, carried = np.zeros(flow.shape, bool), 0.0
    for place in np.argsort(-flow, axis=None):
        if carried >= threshold * flow.sum():
            break
        mask.flat[place] = True
        carried += flow.flat[place]
    return mask


@pytest.mark.parametrize("seed", range(4))
def test_edges_are_kept_up_to_the_threshold(seed):
    graph = random_graph(seed, features=40, rest=0.3)
    masks = graph.masks(1.0, 0.8, "paper")
    nodes = (dense_influence(graph) > 0) | graph.nodes.is_kind("error", "token", "output")
    want = slow_edge_mask(graph, nodes, 0.8)
    features = graph.nodes.is_kind("feature")
    while True:  # features without inputs or outputs go, until all have both
        dead = features & nodes & ~(want.any(0) & want.any(1))
        if not dead.any():
            break
        nodes &= ~dead
        want &= nodes[:, None] & nodes
    np.testing.assert_array_equal(masks.edges, want)
    np.testing.assert_array_equal(masks.nodes, nodes)


def peak_of(function, *arguments) -> int:
    """The peak of memory during the call, beyond the memory in use before it, in bytes."""
    tracemalloc.start()
    try:
        function(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("rest", [0.0, 0.5])
def test_blocks_of_rows_change_nothing(rest, monkeypatch):
    graph = random_graph(3, features=60, layers=4, rest=rest)
    want, masked, pruned = graph.scores, graph.masks(), graph.prune()
    for size in (1, 8 * len(graph) * 7):
        monkeypatch.setattr(adjacency_module, "BLOCK", size)
        for name in ("replacement", "completeness", "replacement_interval", "completeness_interval"):
            assert getattr(graph.scores, name) == pytest.approx(getattr(want, name), rel=1e-12)
        masks = graph.masks()
        assert (masks.nodes == masked.nodes).all() and (masks.edges == masked.edges).all()
        np.testing.assert_allclose(graph.prune().rest_mass, pruned.rest_mass, rtol=1e-12)


def test_scores_and_pruning_need_no_second_matrix(monkeypatch, tmp_path):
    graph = random_graph(0, features=900, layers=6, tokens=10, density=1.0)
    graph = replace(graph, adjacency=graph.adjacency.astype(np.float32))
    monkeypatch.setattr(adjacency_module, "BLOCK", 1 << 16)
    size = graph.adjacency.nbytes
    assert peak_of(lambda: graph.scores) < 0.15 * size
    assert peak_of(graph.prune) < 0.85 * size
    assert peak_of(_pack, graph.adjacency) < 0.6 * size  # half of them are there, and as many bits as there may be
    graph.save(tmp_path / "graph.npz")
    assert peak_of(load_graph, tmp_path / "graph.npz") < 2 * size


def test_a_pruned_graph_keeps_the_shares_and_scores_of_the_whole():
    graph = random_graph(2, features=60)
    shares = compute_cumulative_shares(graph.influence)
    once = graph.prune(0.8, 0.95)
    twice = once.prune(0.6, 0.95)
    node_mask = graph.masks(0.8, 0.95).nodes
    np.testing.assert_array_equal(once.whole_shares, shares[node_mask])
    np.testing.assert_array_equal(twice.whole_shares, shares[node_mask][once.masks(0.6, 0.95).nodes])
    assert not np.allclose(compute_cumulative_shares(once.influence), once.whole_shares)
    is_kept = np.arange(len(graph)) % 2 == 0
    graph = replace(graph, labels=tuple(map(str, range(len(graph)))))
    part = graph.keep(is_kept)
    stays = is_kept | graph.nodes.is_kind("token", "position", "output")
    assert part.labels == tuple(map(str, np.flatnonzero(stays)))
    np.testing.assert_array_equal(part.whole_shares, shares[stays])
    assert once.provenance["whole_graph_scores"] == twice.provenance["whole_graph_scores"] == graph.scores.both
    assert graph.whole_shares is None and "whole_graph_scores" not in graph.provenance


def test_outputs_count_by_their_weights():
    graph = random_graph(1)
    weighted = replace(graph, logit_weights=np.array([0.2, 0.8]), logit_probabilities=np.array([0.0, 0.3]))
    as_weights = replace(graph, logit_probabilities=np.array([0.2, 0.8]))
    np.testing.assert_array_equal(weighted.influence, as_weights.influence)
    assert weighted.scores == as_weights.scores and not np.allclose(weighted.influence, graph.influence)
    assert strongest_paths(weighted) == strongest_paths(as_weights)


def test_equal_influences_stay_or_go_together():
    graph = hand_graph()
    adjacency = np.zeros((6, 6), np.float32)
    adjacency[5, :2], adjacency[0, 3], adjacency[1, 4] = 1, 1, 1
    graph = replace_lists(graph, adjacency=adjacency, values=adjacency.sum(axis=1))
    assert graph.masks(0.1, 0.1, "circuit-tracer").nodes.tolist() == [True, True, False, True, True, True]


def test_errors_stay_under_the_papers_rule_alone():
    graph = random_graph(4, features=60)
    by_paper, by_circuit_tracer = (
        graph.masks(0.5, 0.9, rule).nodes[graph.nodes.find("error")] for rule in ("paper", "circuit-tracer")
    )
    assert by_paper.all() and not by_circuit_tracer.all()
    with_places = random_graph(4, features=60, positions=True)
    assert with_places.masks(0.0, 0.0, "circuit-tracer").nodes[with_places.nodes.find("token", "position")].all()


def test_features_that_lose_their_inputs_go():
    graph = hand_graph()
    adjacency = graph.adjacency.copy()
    adjacency[5, 0] = 0.01  # f0 also feeds the output, but its inputs are below the edges' threshold
    adjacency[1, 0] = 0.01
    graph = replace_lists(graph, adjacency=adjacency, values=adjacency.sum(axis=1))
    masks = graph.masks(1.0, 0.98)
    assert masks.nodes.tolist() == [False, True, True, True, True, True] and not masks.edges[:, 0].any()


def test_at_threshold_one_all_that_has_influence_stays():
    graph = random_graph(5, density=1.0)
    graph = replace(graph, adjacency=graph.adjacency.astype(np.float32))
    masks = graph.masks(1.0, 1.0, "circuit-tracer")
    has_influence = graph.influence > 0
    np.testing.assert_array_equal(
        masks.nodes, has_influence & (~graph.nodes.is_kind("output")) | graph.nodes.is_kind("token", "output")
    )
    graph = hand_graph()
    graph.adjacency[1, 0] = 1e-9  # lost beside the others in a sum in single precision
    assert graph.masks(1.0, 1.0).nodes[0] and not graph.masks(0.999999, 1.0).nodes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"node_threshold": 1.2}, "node_threshold=1.2: expected a share between 0 and 1"),
        ({"edge_threshold": -0.1}, "edge_threshold=-0.1: expected"),
        ({"node_threshold": float("nan")}, "node_threshold=nan: expected"),
    ],
)
def test_thresholds_are_shares(options, message):
    with pytest.raises(UserError, match=message):
        hand_graph().masks(**options)


def test_the_curve_falls_with_the_graph():
    graph = random_graph(6, features=80, layers=4)
    points = curve(graph, [0.3, 0.6, 0.9])
    assert [point.node_threshold for point in points] == [0.3, 0.6, 0.9]
    for less, more in pairwise(points):
        assert less.nodes < more.nodes and less.edges < more.edges
        assert less.scores.completeness < more.scores.completeness < graph.scores.completeness
    pruned = graph.prune(0.6)
    assert (points[1].nodes, points[1].edges) == (len(pruned), (pruned.adjacency != 0).sum())
    assert points[1].scores == pruned.scores


@pytest.mark.parametrize("seed", range(3))
def test_path_lengths_are_those_of_all_paths(seed):
    graph = random_graph(seed, features=10)
    weights = graph.logit_probabilities / graph.logit_probabilities.sum()
    paths = all_paths(graph, np.r_[np.zeros(len(graph) - 2), weights])
    sources = set(graph.nodes.find("token", "error"))
    want = np.zeros(graph.layers + 2)
    for share, path in paths:
        if path[0] in sources:
            want[len(path) - 1] += share
    assert (want > 0).sum() >= 3
    np.testing.assert_allclose(path_lengths(graph), want / want.sum(), rtol=1e-10)
    np.testing.assert_allclose(path_lengths(hand_graph(), ("token",)), [0, 0.4, 0, 0.6, 0], rtol=1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [1, 4, 25])
def test_the_strongest_paths_are_those_of_all_paths(seed, count):
    graph = random_graph(seed, features=10, rest=0.2)
    weights = graph.logit_probabilities / graph.logit_probabilities.sum()
    tokens = set(graph.nodes.find("token"))
    paths = all_paths(graph, np.r_[np.zeros(len(graph) - 2), weights])
    want = [(share, path) for share, path in paths if path[0] in tokens][:count]
    strongest = strongest_paths(graph, count)
    assert [path.nodes for path in strongest] == [path for _, path in want] and len(strongest) == count
    np.testing.assert_allclose([path.share for path in strongest], [share for share, _ in want], rtol=1e-12)
    for path in strongest:
        assert path.sign == np.prod([np.sign(graph.adjacency[b, a]) for a, b in pairwise(path.nodes)])
    assert max(len(path.nodes) for path in strongest_paths(graph, 25)) > 2


def test_the_strongest_paths_lead_to_the_target_asked_for():
    graph = random_graph(8, features=10)
    target = int(np.flatnonzero(np.abs(graph.adjacency[:10]).sum(axis=1) * graph.features[:, 0])[-1])
    want = all_paths(graph, np.eye(len(graph))[target])[:6]
    paths = strongest_paths(graph, 6, target, ("token", "error", "feature"))
    ends = [path for path in paths if path.nodes[0] >= 10]
    assert {path.nodes for path in ends} <= {path for _, path in want} and all(p.nodes[-1] == target for p in paths)
    assert any(path.nodes[0] < 10 for path in paths) and all(len(path.nodes) > 1 for path in paths)
    output = int(graph.nodes.find("output")[1])
    assert {path.nodes[-1] for path in strongest_paths(graph, 5, output)} == {output}
    with pytest.raises(UserError, match=r"node 99: expected a number from 0 to \d+"):
        strongest_paths(graph, 5, 99)
    with pytest.raises(UserError, match="count=0: expected at least 1"):
        strongest_paths(graph, 0)


def test_nodes_and_paths_in_words():
    graph = hand_graph()
    assert [name_of(graph, node) for node in range(6)] == [
        'layer 0 feature 17 at " South" (0)',
        'layer 2 feature 40 at " Creek" (1)',
        'error of layer 1 at " Creek" (1)',
        '" South" (0)',
        '" Creek" (1)',
        '" Denver"',
    ]
    direct, long = strongest_paths(graph, 2)
    assert describe(graph, direct) == '" Creek" (1) -> layer 0 feature 17 at " South" (0) -> ' + (
        'layer 2 feature 40 at " Creek" (1) -> " Denver" 28.1%, against it'
    )
    assert describe(graph, long) == '" Creek" (1) -> " Denver" 25.0%'
    labelled = label_nodes(graph, {(0, 17): "compass\n at noon", (3, 17): "none"})
    assert ' -> compass at noon (0/17) at " South" (0) -> layer 2 feature 40 at' in describe(labelled, direct)
    assert name_of(label_nodes(graph, {(2, 40): "x" * 90}), 1) == f'{"x" * 59}… (2/40) at " Creek" (1)'
    assert label_nodes(labelled, {}).labels == label_nodes(graph, {(0, 17): ""}).labels == ()
    nameless = replace_lists(graph, token_texts=("", "\n"), logit_names=("x - y",), logit_tokens=np.array([-1]))
    assert [name_of(nameless, node) for node in (3, 4, 5)] == ["token 5 (0)", '"\\n" (1)', "x - y"]
    placed = random_graph(0, positions=True)
    assert name_of(placed, int(placed.nodes.find("position")[2])) == "position 2"
    with pytest.raises(UserError, match="node 6: expected a number from 0 to 5"):
        name_of(graph, 6)


def test_edges_between_supernodes():
    graph = with_supernodes(hand_graph(), {"place": [0, 1], "words": [3, 4], "answer": [5]})
    names, edges = between_supernodes(graph)
    assert names == ["place", "words", "answer"]
    # f1 has twice the influence of f0: a third of "place" is f0 = (token0 - 3 token1) / 4, two thirds f1 = f0 / 2 - ...
    np.testing.assert_allclose(edges, [[1 / 3, -1 / 6, 0], [0, 0, 0], [3 / 4, 1 / 4, 0]], atol=1e-6)
    names, edges = between_supernodes(graph, others=True)
    assert names[3:] == ['error of layer 1 at " Creek" (1)'] and edges[0, 3] == pytest.approx(-1 / 3)
    without_groups = between_supernodes(replace(graph, supernodes={}), others=True)[1]
    np.testing.assert_allclose(np.abs(without_groups), compute_edge_shares(graph.edges), rtol=1e-6)
    pruned = graph.keep(np.array([False, True, True, True, True, True]))
    assert between_supernodes(pruned)[1][2, 0] == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": [0, 6]}, "supernode 'a': node 6: expected a number from 0 to 5"),
        ({"a": [0], "b": [1, 0]}, "supernode 'b': node 0 is in 'a' already"),
        ({"a": [-1]}, "supernode 'a': node -1: expected"),
    ],
)
def test_supernodes_hold_each_node_once(groups, message):
    with pytest.raises(UserError, match=message):
        with_supernodes(hand_graph(), groups)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_saved_graph_is_read_back(dtype, tmp_path):
    graph = random_graph(9, positions=True, rest=1.0)
    graph = replace(
        graph,
        adjacency=graph.adjacency.astype(dtype),
        supernodes={"a": (0, 3), "b": ()},
        annotations={"nodes": [{"label": f"é{node}"} for node in range(len(graph))]},
        labels=tuple(f"é{node % 3}" for node in range(len(graph))),
    )
    (tmp_path / "new").mkdir()
    path = tmp_path / "new" / "graph.npz"
    path.write_text("an older file")
    graph.save(path)
    assert_same_graph(load_graph(path), graph)
    assert [child.name for child in path.parent.iterdir()] == ["graph.npz"]
    assert path.stat().st_size < graph.adjacency.nbytes / 1.5 + 8000


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "graph.npz"
    hand_graph().save(path)
    before = path.read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(UserError, match=f"{path}: cannot be written .*disk full"):
        hand_graph().save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_saved_graph_replaces_the_old_file_at_once(tmp_path):
    path, old = tmp_path / "graph.npz", tmp_path / "old.npz"
    hand_graph().save(path)
    old.hardlink_to(path)
    replace(hand_graph(), provenance={"model": "new"}).save(path)
    assert (load_graph(old).provenance, load_graph(path).provenance) == ({}, {"model": "new"})


def test_optional_arrays_are_saved_and_files_without_them_are_read(tmp_path):
    path = tmp_path / "graph.npz"
    graph = random_graph(9)
    graph.save(path)
    version = json.loads(np.load(path)["about"].tobytes())["version"]
    assert version == 1 and {"logit_weights", "whole_shares"}.isdisjoint(np.load(path).files)
    assert load_graph(path).logit_weights is None and load_graph(path).whole_shares is None
    pruned = graph.prune()
    pruned.save(path)  # an older jclt passes over the shares, and nothing else of it is new
    assert json.loads(np.load(path)["about"].tobytes())["version"] == 1
    assert_same_graph(load_graph(path), pruned)
    weighted = replace(pruned, logit_weights=np.array([1.0, 0.0]))
    weighted.save(path)
    assert json.loads(np.load(path)["about"].tobytes())["version"] == 2
    assert_same_graph(load_graph(path), weighted)


def test_numpys_numbers_in_provenance_are_written_as_plain_ones(tmp_path):
    settings = {"targets": [np.int64(5), (np.int32(1), " a")], "tolerance": np.float32(0.5), "all": np.bool_(1)}
    graph = replace(hand_graph(), provenance={"settings": settings, "vector": np.arange(2)})
    graph.save(tmp_path / "graph.npz")
    want = {"settings": {"targets": [5, [1, " a"]], "tolerance": 0.5, "all": True}, "vector": [0, 1]}
    assert load_graph(tmp_path / "graph.npz").provenance == want
    for wrong, message in (({"a": object()}, "hold a object, expected what JSON can"), ({"a": np.nan}, "not finite")):
        with pytest.raises(UserError, match=message):
            replace(hand_graph(), provenance=wrong).save(tmp_path / "other.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["graph.npz"]


def test_a_graph_is_shown_in_a_line():
    assert repr(hand_graph()) == "<Graph of ' South Creek': 2 features, 1 error, 2 tokens, 1 output, 6 edges>"
    hostile = replace(hand_graph(), token_texts=("\x1b[31m\n\u202e\ud800", "x" * 5000))
    assert repr(hostile).isprintable() and len(repr(hostile)) < 200


@pytest.mark.parametrize("name", ["token_texts", "logit_names", "labels"])
def test_texts_of_other_lengths_are_refused(name):
    with pytest.raises(UserError, match=rf"graph: {name} of shape \[7\], expected \[\d\]: its lists have 6 nodes"):
        replace(hand_graph(), **{name: ("a",) * 7})


def test_words_for_nodes_hold_no_signs_that_do_not_print():
    texts = ("\x9b\u202e", "\ud800\x7f")
    graph = replace_lists(hand_graph(), token_texts=texts, logit_names=("\x1b[31m\n",), logit_tokens=np.array([-1]))
    path = strongest_paths(graph, 1)[0]
    assert describe(label_nodes(graph, {(0, 17): "a\u202eb\ud800"}), path).isprintable()
    assert all(name_of(graph, node).isprintable() for node in range(6))


def damage_file(path, change):
    """Changes the arrays of a saved file."""
    arrays = dict(np.load(path))
    change(arrays)
    np.savez_compressed(path, **arrays)


def about(**fields):
    def change(arrays):
        content = json.loads(arrays["about"].tobytes()) | fields
        arrays["about"] = np.frombuffer(json.dumps(content).encode(), np.uint8)

    return change


def set_item(name, place, value):
    def change(arrays):
        arrays[name] = arrays[name].copy()
        arrays[name][place] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (about(version=4), "version 4, expected 1 to 3, those that this jclt reads: written by a newer jclt"),
        (about(format="other"), "not a graph that jclt saved, expected format 'jclt-graph'"),
        (about(token_texts=["one"]), "'token_texts' in 'about' has 1 entries, expected 2"),
        (about(token_texts=[1, 2]), "expected texts"),
        (about(labels=["one"]), "'labels' in 'about' has 1 entries, expected 6"),
        (about(labels=[1] * 6), "expected texts"),
        (about(labels="abcdef"), "'labels' in 'about' is damaged or missing, expected list"),
        (about(layers="3"), "'layers' in 'about' is damaged or missing, expected int"),
        (about(supernodes={"a": [99]}), "supernode 'a' names nodes that are not there"),
        (lambda arrays: arrays.pop("about"), "not a graph that jclt saved, holds the arrays bias"),
        (lambda arrays: arrays.update(about=np.zeros(5, np.uint8)), "'about' is damaged: not valid JSON"),
        (lambda arrays: arrays.pop("rest"), "array 'rest' is missing"),
        (lambda arrays: arrays.update(rest=np.zeros(5)), r"array 'rest' has shape \[5\], expected \[6\]"),
        (lambda arrays: arrays.update(tokens=np.zeros(2)), "array 'tokens' is damaged: float64"),
        (lambda arrays: arrays.update(edges=arrays["edges"][1:]), "5 edges have values, expected 6"),
        (lambda arrays: arrays.update(edges_present=np.zeros(9, np.uint8)), "edges of another number of nodes"),
        (
            about(annotations={"nodes": [{}]}),
            "annotations of nodes are damaged, expected an object for each of 6 nodes",
        ),
        (about(annotations={"nodes": [{"node_id": []}] * 6}), "annotations of nodes are damaged"),
        (about(annotations={"metadata": 1}), "annotations of metadata are damaged"),
        (about(supernodes={"a": 5}), "supernode 'a' names nodes that are not there"),
        (about(layers=10**15), "1000000000000000 layers, expected 0 to 10000"),
        (about(layers=2), "array 'features, layer' holds 2, expected 0 to 1"),
        (set_item("bias", 2, np.nan), "array 'bias' holds nan, expected numbers"),
        (set_item("values", 0, np.inf), "array 'values' holds inf"),
        (set_item("rest_mass", 0, -1), "array 'rest_mass' holds -1.0, expected at least 0"),
        (set_item("activations", 0, np.nan), "array 'activations' holds nan"),
        (set_item("edges", 3, np.nan), "the edge .* -> .* is not finite"),
        (set_item("logit_probabilities", 0, -0.5), "array 'logit_probabilities' holds -0.5, expected at least 0"),
        (set_item("logit_probabilities", 0, 1.5), "array 'logit_probabilities of tokens' holds 1.5, expected 0 to 1.0"),
        (set_item("features", (0, 0), -5), "array 'features, layer' holds -5, expected 0 to 2"),
        (set_item("features", (0, 1), 10**6), "array 'features, position' holds 1000000, expected 0 to 1"),
        (set_item("features", (1, 2), -1), "array 'features, feature' holds -1"),
        (set_item("errors", (0, 0), 3), "array 'errors, layer' holds 3"),
        (set_item("errors", (0, 1), 2), "array 'errors, position' holds 2"),
        (set_item("logit_positions", 0, 2), "array 'logit_positions' holds 2, expected 0 to 1"),
        (set_item("tokens", 0, -2), "array 'tokens' holds -2"),
        (
            set_item("features", (0, 0), 2),
            'the edge layer 2 feature 17 at " South" .* leads from layer 2 to 2, expected into a',
        ),
        (lambda arrays: arrays.update(logit_weights=np.array([-1.0])), "array 'logit_weights' holds -1.0"),
        (lambda arrays: arrays.update(whole_shares=np.full(6, 2.0)), "array 'whole_shares' holds 2.0"),
        (lambda arrays: arrays.update(edges=np.array([print])), "'edges' is damaged .*Python objects"),
    ],
)
def test_damaged_files_are_told_in_one_line(change, message, tmp_path):
    path = tmp_path / "graph.npz"
    hand_graph().save(path)
    damage_file(path, change)
    with pytest.raises(UserError, match=message) as error:
        load_graph(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "array", "fails"),
    [
        ("unknown", np.zeros(20_000_000), False),
        ("features", np.zeros((2_000_000, 3), np.int64), True),
        ("about", np.full(300_000_000, ord(" "), np.uint8), True),
        ("edges", np.zeros(20_000_000, np.float32), True),
    ],
)
def test_a_small_file_takes_little_memory(name, array, fails, tmp_path):
    path = tmp_path / "graph.npz"
    hand_graph().save(path)
    damage_file(path, lambda arrays: arrays.update({name: array}))
    assert path.stat().st_size < 400_000

    def load():
        if fails:
            with pytest.raises(UserError, match=rf"{path}: .*(expected|edges of another number of nodes)"):
                load_graph(path)
        else:
            assert_same_graph(load_graph(path), hand_graph())

    assert peak_of(load) < 3_000_000


def test_a_graph_larger_than_memory_is_refused_at_once(tmp_path, monkeypatch):
    hand_graph().save(tmp_path / "graph.npz")
    monkeypatch.setattr("jclt.memory.measure_free_host_memory", lambda: 300)
    with pytest.raises(UserError, match="graph.npz: 6 nodes: needs .* B of memory, expected at most 300 B"):
        load_graph(tmp_path / "graph.npz")


@pytest.mark.parametrize("read", [load_graph, read_circuit_tracer])
def test_files_that_are_no_archives_are_told_in_one_line(read, tmp_path):
    path = tmp_path / "graph"
    hand_graph().save(path)
    archive_bytes = path.read_bytes()
    flipped = bytearray(archive_bytes)
    flipped[len(archive_bytes) // 3] ^= 255
    for content in (b"", b"text", archive_bytes[: len(archive_bytes) // 2], bytes(flipped), pickle.dumps(1), None):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path}: ") as error:
            read(path)
        assert "\n" not in str(error.value)


def torch_file(path, content: bytes, **files: bytes):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("graph/data.pkl", content)
        for name, data in files.items():
            archive.writestr(f"graph/data/{name}", data)


class Attack:
    def __reduce__(self):
        return (print, ("it ran",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"adjacency_matrix": Attack()}, 2), "refers to '__builtin__.print', expected only"),
        (pickle.dumps(io.StringIO, 4), "refers to '_io.StringIO'"),
        (pickle.dumps([1]), "expected a dictionary"),
        (pickle.dumps({"cfg": 1}), "'activation_values' is missing|'active_features' is missing"),
        (b"\x80\x02}q", "not a file that torch saved, or damaged"),
    ],
)
def test_no_pickle_is_run(content, message, tmp_path, capsys):
    torch_file(tmp_path / "graph.pt", content)
    with pytest.raises(UserError, match=message) as error:
        read_circuit_tracer(tmp_path / "graph.pt")
    assert "\n" not in str(error.value) and "it ran" not in capsys.readouterr().out


def tensor_bytes(shape, strides, offset, numbers) -> bytes:
    """A dictionary with one tensor, as torch pickles it, written byte by byte."""

    def number(n: int) -> bytes:
        return b"J" + n.to_bytes(4, "little", signed=True)

    def text(s: str) -> bytes:
        return b"X" + len(s).to_bytes(4, "little") + s.encode()

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(numbers) + b"tQ"
    axes = b"".join(b"(" + b"".join(map(number, sizes)) + b"t" for sizes in (shape, strides))
    start = b"\x80\x02}" + text("a") + b"ctorch._utils\n_rebuild_tensor_v2\n("
    return start + storage + number(offset) + axes + b"I00\nccollections\nOrderedDict\n)RtRs."


def test_tensors_may_be_views_but_reach_past_nothing(tmp_path):
    from jclt.graphs.circuit_tracer_pt import _unpickle

    data = np.arange(12, dtype=np.float32)
    torch_file(tmp_path / "a.pt", tensor_bytes((2, 3), (1, 4), 1, 12), **{"0": data.tobytes()})
    np.testing.assert_array_equal(_unpickle(tmp_path / "a.pt")["a"], data.reshape(3, 4)[:, 1:3].T)
    for shape, strides, offset in (((2, 3), (1, 4), 3), ((200,), (1,), 0), ((12,), (-1,), 5), ((2,), (1,), -4)):
        torch_file(tmp_path / "a.pt", tensor_bytes(shape, strides, offset, 12), **{"0": data.tobytes()})
        with pytest.raises(UserError, match="reaches past its 12 numbers"):
            _unpickle(tmp_path / "a.pt")


def test_tensors_take_no_more_than_the_file(tmp_path):
    path = tmp_path / "a.pt"
    numbers = np.zeros(12, np.float32).tobytes()
    for shape, strides in (((10**5, 10**5), (0, 0)), ((13, 1), (0, 1))):
        torch_file(path, tensor_bytes(shape, strides, 0, 12), **{"0": numbers})
        with pytest.raises(UserError, match="repeats its 12 numbers"):
            read_circuit_tracer(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("graph/data.pkl", tensor_bytes((1,), (1,), 0, 1))
        archive.writestr("graph/data/0", bytes(50_000_000))
    with pytest.raises(UserError, match="'graph/data/0' unpacks to 50000000 bytes, expected at most"):
        read_circuit_tracer(path)
    torch_file(path, b"\x80\x02}r" + (2**31).to_bytes(4, "little") + b".")
    with pytest.raises(UserError, match="thing number 2147483648 in"):
        read_circuit_tracer(path)


@pytest.mark.parametrize("folder", GRAPHS)
def test_reference_graphs_are_explained_pruned_and_saved(folder, tmp_path):
    graph = golden_graph(folder)
    scores = graph.scores
    assert 0 < scores.replacement < scores.completeness < 1 and graph.missing == 0
    pruned = graph.prune()
    assert graph.counts["error"] == pruned.counts["error"]
    assert 5 * np.count_nonzero(pruned.adjacency) < np.count_nonzero(graph.adjacency)
    assert np.abs(pruned.residual).max() < 1e-5 * np.abs(graph.values).max()
    for name in ("replacement", "completeness"):
        low, high = getattr(pruned.scores, name + "_interval")
        assert low < getattr(scores, name) < high
    assert path_lengths(graph).sum() == pytest.approx(1)
    best = strongest_paths(graph, 3)
    assert len(best) == 3 and describe(graph, best[0]).startswith('"<')
    pruned.save(tmp_path / "graph.npz")
    assert_same_graph(load_graph(tmp_path / "graph.npz"), pruned)
