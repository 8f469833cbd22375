"""Graphs as data: means and differences over prompts, and influence by layer, position class and label.

What a graph says is linear in its edges: value = sum of edges + bias + rest. So a weighted sum of graphs over the union
of their nodes, where a node or edge that a graph lacks counts as 0, obeys the same law, and is a graph like any other,
for the page and for files.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jclt.errors import UserError
from jclt.graphs.adjacency import split_all_rows
from jclt.graphs.graph import Graph
from jclt.graphs.nodes import KINDS, NodeTable
from jclt.memory import check_memory
from jclt.shapes import Float, Int

Key = tuple[int, int, int, int]
"""Kind, layer, position and index of a node; tokens are told apart by their positions alone."""


def average_graphs(graphs: Sequence[Graph]) -> Graph:
    """The mean graph of prompts with as many tokens."""
    return _add_graphs(graphs, np.full(len(graphs), 1 / max(len(graphs), 1)))


def subtract_graphs(graphs: Sequence[Graph], others: Sequence[Graph]) -> Graph:
    """The mean of some graphs minus that of others, such as those of clean and of corrupted prompts. An edge is by how
    much it is stronger in the first; influence is that of the differences' sizes."""
    sizes = np.repeat([1 / max(len(graphs), 1), -1 / max(len(others), 1)], [len(graphs), len(others)])
    return _add_graphs([*graphs, *others], sizes)


def _add_graphs(graphs: Sequence[Graph], factors: Float[np.ndarray, "g"]) -> Graph:
    if not graphs:
        raise UserError("graphs: none, expected at least one")
    first = graphs[0]
    for graph in graphs:
        if len(graph.tokens) != len(first.tokens) or graph.layers != first.layers:
            sizes = f"{len(graph.tokens)} tokens and {graph.layers} layers"
            raise UserError(f"graphs: {sizes}, expected {len(first.tokens)} and {first.layers}, as the first one has")
    keys = [list_keys(graph) for graph in graphs]
    union = sorted(set().union(*keys))
    place = {key: number for number, key in enumerate(union)}
    where = [np.array([place[key] for key in of_graph]) for of_graph in keys]
    dtype = first.adjacency.dtype
    need = len(union) ** 2 * dtype.itemsize
    check_memory(need, f"graphs: those of {len(union)} nodes together", "prune them first", host=True)
    adjacency = np.zeros((len(union), len(union)), dtype)
    columns = {name: np.zeros(len(union), dtype) for name in ("bias", "rest", "rest_mass", "value", "active", "weight")}
    labels, names = [""] * len(union), dict[Key, str]()
    for graph, to, factor in zip(graphs, where, factors.tolist(), strict=True):
        for rows in split_all_rows(graph.adjacency):
            adjacency[np.ix_(to[rows], to)] += dtype.type(factor) * graph.adjacency[rows]
        features, outputs = to[graph.nodes.find("feature")], to[graph.nodes.find("output")]
        columns["bias"][to] += factor * graph.bias
        columns["rest"][to] += factor * graph.rest
        columns["rest_mass"][to] += abs(factor) * graph.rest_mass
        columns["value"][to] += factor * graph.values
        columns["active"][features] += factor * graph.activations
        columns["weight"][outputs] += abs(factor) * graph.output_weights[graph.nodes.find("output")]
        names |= {union[node]: name for node, name in zip(outputs.tolist(), graph.logit_names, strict=True)}
        for node, label in zip(to.tolist(), graph.labels, strict=False):
            labels[node] = labels[node] or label
    kind, layer, position, index = np.array(union, np.int64).T
    tokens = [{int(graph.tokens[at]) for graph in graphs} for at in range(len(first.tokens))]
    index[kind == KINDS.index("token")] = [same.pop() if len(same) == 1 else -1 for same in tokens]
    texts = [dict.fromkeys(graph.token_texts[at] for graph in graphs) for at in range(len(first.tokens))]
    nodes = NodeTable(np.array(KINDS)[kind], layer, position, index, columns["value"])
    return Graph(
        adjacency=adjacency,
        nodes=nodes,
        bias=columns["bias"],
        rest=columns["rest"],
        rest_mass=columns["rest_mass"],
        activations=columns["active"][nodes.find("feature")],
        token_texts=tuple("|".join(of_position) for of_position in texts),
        logit_names=tuple(names[union[node]] for node in nodes.find("output")),
        logit_probabilities=columns["weight"][nodes.find("output")],
        layers=first.layers,
        provenance={"combined": len(graphs), "factors": factors.tolist()},
        labels=tuple(labels) if any(labels) else (),
    )


def list_keys(graph: Graph) -> list[Key]:
    """The key of each node."""
    nodes = graph.nodes
    kind = np.array([KINDS.index(name) for name in nodes.kind.tolist()])
    index = np.where(nodes.kind == "token", -1, nodes.index)
    return list(zip(kind.tolist(), nodes.layer.tolist(), nodes.position.tolist(), index.tolist(), strict=True))


def tabulate_influence(
    graphs: Sequence[Graph],
    classes: Sequence[Sequence[str]] | None = None,
    labels: Mapping[tuple[int, int], str] | None = None,
) -> dict[tuple[int, str, str], Float[np.ndarray, "g"]]:
    """The share of the features' influence by layer, position class and label, in each graph: an array over graphs.

    classes    of each graph a name for each position, such as "city"; by default the tokens' texts
    labels     by layer and number of a feature; by default those of the graphs
    """
    table: dict[Any, np.ndarray] = defaultdict(lambda: np.zeros(len(graphs)))
    for row, graph in enumerate(graphs):
        n = len(graph.features)
        influence = graph.influence[:n].astype(np.float64)
        names = graph.token_texts if classes is None else classes[row]
        for node, (layer, position, number) in enumerate(graph.features.tolist()):
            own = graph.labels[node] if graph.labels else ""
            label = own if labels is None else labels.get((layer, number), "")
            table[layer, names[position], label][row] += influence[node] / (influence.sum() or 1)
    return dict(table)


def find_shared_features(graphs: Sequence[Graph], least: float = 0.5) -> tuple[Int[np.ndarray, "m 2"], np.ndarray]:
    """Layer and number of the features that are in at least this share of the graphs, at whatever position, and their
    mean share of the influence; the most influential first. Meant for pruned graphs."""
    names = [tuple("any" for _ in graph.tokens) for graph in graphs]
    unlabelled = [replace(graph, labels=()) for graph in graphs]
    numbered = {(layer, number): f"{number}" for g in graphs for layer, _, number in g.features.tolist()}
    table = tabulate_influence(unlabelled, names, numbered)
    shares = {(layer, int(label)): row for (layer, _, label), row in table.items()}
    present = {key: sum(key in set(map(tuple, g.features[:, ::2].tolist())) for g in graphs) for key in shares}
    kept = [key for key in shares if present[key] >= least * len(graphs)]
    kept.sort(key=lambda key: -float(shares[key].mean()))
    means = np.array([shares[key].mean() for key in kept])
    return np.array(kept, np.int64).reshape(-1, 2), means
