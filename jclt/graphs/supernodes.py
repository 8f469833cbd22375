"""Supernodes that a graph suggests: groups of features that are fed alike and do alike.

With S[t, s] = sign(adjacency[t, s]) share[t, s] (`share` and `visits` are defined in `influence.py`) and

    M = S + S^2 + S^3 + ...            M[t, s]: what of t comes from s, over all paths, with signs

each feature n has two profiles:

    inputs[n]   M[n, s] over all nodes s below
    effects[n]  visits[t] M[t, n] over all nodes t above

The likeness of two features is the cosine of their inputs times the cosine of their effects; a negative cosine counts
as 0. Groups are joined as long as the mean likeness between their members is at least `likeness` (average linkage).
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from jclt.errors import UserError
from jclt.graphs.graph import Graph
from jclt.graphs.influence import FLOOR, compute_signed_shares
from jclt.graphs.names import name_apart, name_of
from jclt.graphs.paths import with_supernodes
from jclt.memory import check_memory
from jclt.shapes import Float

LIKENESS = 0.75


class Supernode(NamedTuple):
    """A suggested group."""

    name: str
    features: tuple[tuple[int, int, int], ...]  # layer, position and number; those with most influence first
    share: float  # of all influence
    scores: Mapping[str, float] = MappingProxyType({})  # of the name, where it is scored


def suggest_supernodes(graph: Graph, likeness: float = LIKENESS) -> list[Supernode]:
    """Groups of at least two features, those with most influence first. Meant for pruned graphs."""
    if not 0 < likeness <= 1:
        raise UserError(f"likeness={likeness}: expected above 0, up to 1")
    features, influence = graph.nodes.find("feature"), graph.influence.astype(np.float64)
    if len(features) < 2:
        return []
    groups = [features[group] for group in group_alike(compute_likeness(graph), likeness)]
    groups = [group[np.argsort(-influence[group], kind="stable")].tolist() for group in groups]
    groups.sort(key=lambda group: -influence[group].sum())
    names = name_apart([name_group(graph, group, influence) for group in groups])
    places, total = list(map(tuple, graph.features.tolist())), influence.sum() or 1.0
    return [
        Supernode(name, tuple(places[node] for node in group), float(influence[group].sum() / total))
        for name, group in zip(names, groups, strict=True)
    ]


def add_supernodes(graph: Graph, supernodes: Iterable[Supernode]) -> Graph:
    """A copy of the graph, or of the graph that it was pruned from, with these supernodes instead of its present ones.
    Viewers show them too."""
    groups = list(supernodes)
    return with_supernodes(graph, dict(zip([group.name for group in groups], find_members(graph, groups), strict=True)))


def find_members(graph: Graph, supernodes: Iterable[Supernode]) -> list[tuple[int, ...]]:
    """The nodes of each supernode that the graph has."""
    number = {tuple(place): node for node, place in enumerate(graph.features.tolist())}
    return [tuple(number[place] for place in group.features if place in number) for group in supernodes]


def compute_likeness(graph: Graph) -> Float[np.ndarray, "n n"]:
    """Of each pair of features."""
    features, order = graph.nodes.find("feature"), graph.nodes.order
    check_memory(4 * 8 * len(graph) ** 2, f"supernodes of {len(graph)} nodes", "prune the graph first", host=True)
    steps = compute_signed_shares(graph.edges).astype(np.float64)
    flow = np.zeros_like(steps)
    for place in np.unique(order):  # upward: all that a node comes from lies below it
        targets = np.flatnonzero(order == place)
        flow[targets] = steps[targets] + steps[targets] @ flow
    visits = graph.influence.astype(np.float64) + graph.output_weights
    return _compute_cosines(flow[features]) * _compute_cosines((visits[:, None] * flow[:, features]).T)


def _compute_cosines(rows: Float[np.ndarray, "n m"]) -> Float[np.ndarray, "n n"]:
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), FLOOR)
    return np.maximum(unit @ unit.T, 0)


def group_alike(likeness: Float[np.ndarray, "n n"], least: float) -> list[np.ndarray]:
    """The groups of at least two: average linkage, down to this mean likeness."""
    from scipy.cluster.hierarchy import fcluster, linkage

    apart = np.maximum(1 - likeness[np.triu_indices(len(likeness), 1)], 0)
    numbers = fcluster(linkage(apart, "average"), 1 - least + 1e-9, "distance")
    groups = [np.flatnonzero(numbers == number) for number in np.unique(numbers)]
    return [group for group in groups if len(group) > 1]


def name_group(graph: Graph, nodes: Sequence[int], influence: Float[np.ndarray, "N"]) -> str:
    """The label that carries at least half of what the labelled members carry, or else the two that carry most. Where
    members without a label carry more than those with one, the strongest node's name."""
    weights: dict[str, float] = {}
    for node in nodes:
        if text := " ".join(graph.labels[node].split()) if graph.labels else "":
            weights[text] = weights.get(text, 0.0) + float(influence[node])
    ranked = sorted(weights, key=lambda text: -weights[text])
    if not ranked or 2 * sum(weights.values()) < influence[list(nodes)].sum():
        return f"{name_of(graph, nodes[0])} and {len(nodes) - 1} more"
    return ranked[0] if 2 * weights[ranked[0]] >= sum(weights.values()) else " / ".join(ranked[:2])
