"""Suggested supernodes: likeness by sums over paths, groups and names by hand."""

from dataclasses import replace

import numpy as np
import pytest
from graph_lists import build_graph, hand_graph, random_graph

from jclt.errors import UserError
from jclt.graphs import add_supernodes, export_json, label_nodes, suggest_supernodes
from jclt.graphs.graph import Graph
from jclt.graphs.influence import compute_edge_shares
from jclt.graphs.names import name_of
from jclt.graphs.supernodes import compute_likeness, group_alike, name_group


def sum_paths(graph: Graph) -> np.ndarray:
    """What of each node comes from each other, by the paths one after the other."""
    shares = compute_edge_shares(graph.edges).astype(np.float64) * np.sign(graph.adjacency)
    flow = np.zeros_like(shares)

    def walk(target: int, node: int, value: float) -> None:
        for source in np.flatnonzero(shares[node]):
            flow[target, source] += value * shares[node, source]
            walk(target, int(source), value * shares[node, source])

    for target in range(len(graph)):
        walk(target, target, 1.0)
    return flow


@pytest.mark.parametrize("vectors", [False, True])
def test_likeness_is_that_of_sums_over_all_paths(vectors):
    graph = random_graph(4, features=12, rest=0.5, density=0.25 if vectors else 0.5, vectors=vectors)
    flow, visits = sum_paths(graph), graph.influence + graph.output_weights

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(max(a @ b / max(np.sqrt((a @ a) * (b @ b)), 1e-30), 0))

    want = [
        [cosine(flow[a], flow[b]) * cosine(visits * flow[:, a], visits * flow[:, b]) for b in range(12)]
        for a in range(12)
    ]
    np.testing.assert_allclose(compute_likeness(graph), want, atol=1e-9)


def two_routes() -> Graph:
    """Token 0 reaches the output by features 0, 1 and then 4; token 1 by features 2 and 3."""
    size = 5 + 2 + 1
    adjacency = np.zeros((size, size), np.float32)
    adjacency[[0, 1, 2, 3], [5, 5, 6, 6]] = 1, 2, 3, -1
    adjacency[4, [0, 1]] = 2, 1
    adjacency[7, [4, 2, 3]] = 1, 2, -2
    zeros = np.zeros(size, np.float32)
    return build_graph(
        adjacency=adjacency,
        bias=zeros,
        rest=zeros,
        rest_mass=zeros,
        values=adjacency.sum(axis=1),
        features=np.array([[0, 0, 3], [0, 0, 8], [0, 1, 2], [0, 1, 4], [1, 1, 5]]),
        activations=np.ones(5, np.float32),
        errors=np.zeros((0, 2), np.int64),
        tokens=np.array([1, 2]),
        token_texts=("a", "b"),
        positions=np.zeros(0, np.int64),
        logit_tokens=np.array([9]),
        logit_names=("out",),
        logit_positions=np.array([1]),
        logit_probabilities=np.ones(1, np.float32),
        layers=2,
    )


def test_features_of_one_route_are_grouped():
    """Features 2 and 3 read one token with different signs, so they are not alike; 0 and 1 are."""
    graph = two_routes()
    # The visits of nodes: 4: 1/5, 0: 2/15, 1: 1/15, 2 and 3: 2/5; tokens: 1/5 and 4/5; 12/5 - 1 of the output.
    (first,) = suggest_supernodes(graph)
    assert first.features == ((0, 0, 3), (0, 0, 8))
    assert first.share == pytest.approx((2 / 15 + 1 / 15) / (1 / 5 + 1 / 5 + 4 / 5 + 1 / 5 + 4 / 5), rel=1e-6)
    assert first.name == 'layer 0 feature 3 at "a" (0) and 1 more'
    # Feature 4 is fed by the same token, through them: a cosine of 1 / sqrt(1 + 4 / 9 + 1 / 9) and the same output.
    likeness = compute_likeness(graph)
    assert likeness[0, 1] == pytest.approx(1) and likeness[2, 3] == 0 and 0 < likeness[0, 4] < 0.75
    assert suggest_supernodes(graph, likeness=float(likeness[0, 4]))[0].features[0] == (1, 1, 5)


def test_average_linkage_stops_at_the_least_mean_likeness():
    likeness = np.array([[1, 0.9, 0.7], [0.9, 1, 0.5], [0.7, 0.5, 1.0]])
    assert [group.tolist() for group in group_alike(likeness, 0.95)] == []
    assert [group.tolist() for group in group_alike(likeness, 0.61)] == [[0, 1]]
    assert [group.tolist() for group in group_alike(likeness, 0.6)] == [[0, 1, 2]]


def test_names_come_from_labels():
    graph, names = two_routes(), []
    for labels in ({(1, 5): "state\n= x", (0, 3): "state = x"}, {(1, 5): "x", (0, 8): "y"}, {(1, 5): "x", (0, 3): "y"}):
        (group,) = suggest_supernodes(label_nodes(graph, labels), likeness=0.4)
        names.append(group.name)
    assert names == ["state = x", "x", "x"]
    flat = replace(graph, adjacency=np.abs(graph.adjacency))
    labels = {(0, 3): "b", (0, 8): "a", (1, 5): "c", (0, 2): "b", (0, 4): "a"}
    assert [group.name for group in suggest_supernodes(label_nodes(flat, labels))] == ["b", "b (2)"]
    labelled = label_nodes(graph, {(0, 3): "a", (0, 8): "b", (0, 2): "c"})
    assert name_group(labelled, [0, 1, 2, 3], np.array([2.0, 1.0, 3.0, 6.0, 0, 0, 0, 0])) == "c"
    assert name_group(labelled, [0, 1, 2, 3], np.array([2.0, 2.0, 3.0, 6.0, 0, 0, 0, 0])) == "c / a"
    unlabelled = np.array([2.0, 1.0, 3.0, 7.0, 0, 0, 0, 0])
    assert name_group(labelled, [3, 0, 1, 2], unlabelled) == f"{name_of(labelled, 3)} and 3 more"


def test_supernodes_go_to_the_whole_graph_and_to_viewers():
    whole = two_routes()
    pruned = whole.keep(np.array([True, True, False, True, True, True, True, True]))
    groups = suggest_supernodes(pruned, likeness=0.4)
    small, large = add_supernodes(pruned, groups), add_supernodes(whole, groups)
    assert [len(group.features) for group in groups] == [3]
    assert [small.supernodes[groups[0].name], large.supernodes[groups[0].name]] == [(3, 0, 1), (4, 0, 1)]
    for group in groups:
        for graph in (small, large):
            assert [tuple(place) for place in graph.features[list(graph.supernodes[group.name])].tolist()] == list(
                group.features
            )
    view = export_json(small)["qParams"]
    assert view["supernodes"] == [[g.name, *(f"{a}_{c}_{b}" for a, b, c in g.features)] for g in groups]
    assert set(view["pinnedIds"]) == {node_id for _, *members in view["supernodes"] for node_id in members}


def test_no_groups_of_one_and_no_wrong_likeness():
    assert suggest_supernodes(hand_graph().keep(np.arange(6) != 0)) == []
    with pytest.raises(UserError, match="likeness=0.0: expected above 0, up to 1"):
        suggest_supernodes(hand_graph(), 0.0)
