"""Strongest paths, lengths of paths, and supernodes (named sets of nodes)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jclt.errors import UserError
from jclt.graphs.graph import Graph
from jclt.graphs.influence import FLOOR, compute_edge_shares, compute_signed_shares
from jclt.graphs.names import check_node, name_of
from jclt.graphs.nodes import Kind
from jclt.shapes import Float


@dataclass(frozen=True)
class Path:
    """A path from a source node up to an output."""

    nodes: tuple[int, ...]  # from the source to the output
    share: float  # of all walks from the outputs (see influence.py), the share along this path
    sign: int  # 1 or -1: the product of the edges' signs


def describe(graph: Graph, path: Path) -> str:
    """The path's nodes and share in one line."""
    names = " -> ".join(name_of(graph, node) for node in path.nodes)
    return f"{names} {path.share:.1%}{', against it' if path.sign < 0 else ''}"


def path_lengths(graph: Graph, kinds: Sequence[Kind] = ("token", "position", "error")) -> Float[np.ndarray, "l"]:
    """The distribution of path lengths: of all walks from the outputs that end at nodes of these kinds, the share that
    has 0, 1, 2 ... edges."""
    shares, ends = compute_edge_shares(graph.edges), graph.nodes.find(*kinds)
    lengths = np.zeros(graph.layers * graph.nodes.steps_per_layer + 2)
    walkers = graph.output_weights
    for length in range(1, len(lengths)):
        walkers = walkers @ shares
        lengths[length] = walkers[ends].sum(dtype=np.float64)
    return lengths / (lengths.sum() or 1)


def strongest_paths(
    graph: Graph, count: int = 5, target: int | None = None, kinds: Sequence[Kind] = ("token",)
) -> list[Path]:
    """The `count` strongest paths from nodes of these kinds to the outputs, or to one target node, strongest first.

    A path's strength is the product of its edges' shares and, if it ends at an output, the output's share of all output
    weights. The search is exact: layer by layer downward, it finds the `count` strongest partial paths from the top to
    each node. They all extend partial paths that are among the `count` strongest to their node.
    """
    if count < 1:
        raise UserError(f"count={count}: expected at least 1 path")
    start = _find_start(graph, target)
    shares, order = compute_edge_shares(graph.edges), graph.nodes.order
    best = np.zeros((len(graph), count))  # strength of the strongest partial paths down to each node, in order
    best[:, 0] = start
    previous = np.full((len(graph), count), -1)  # the node before on each partial path, -1 at its top
    rank = np.zeros((len(graph), count), int)  # which partial path of the previous node it extends
    for place in np.unique(order[order < order[start > 0].max(initial=-1)])[::-1]:
        columns = np.flatnonzero(order == place)
        targets = np.flatnonzero((best[:, 0] > 0) & (order > place))
        # The `count` strongest paths to a column go through the `count` targets whose strongest paths are best.
        strongest = best[targets, 0][:, None] * shares[np.ix_(targets, columns)]
        width = min(count, len(targets))
        via = targets[np.argpartition(-strongest, width - 1, axis=0)[:width]].T
        products = best[via] * shares[via, columns[:, None]][:, :, None]
        products = products.reshape(len(columns), width * count)
        first = np.argsort(-products, axis=1, kind="stable")[:, :count]
        best[columns] = np.take_along_axis(products, first, axis=1)
        previous[columns] = np.where(best[columns] > 0, np.take_along_axis(via, first // count, axis=1), -1)
        rank[columns] = first % count
    sources = graph.nodes.find(*kinds)
    values = np.where(previous[sources] >= 0, best[sources], 0).ravel()
    return [
        _trace_path(graph, best, previous, rank, int(sources[index // count]), index % count)
        for index in np.argsort(-values, kind="stable")[:count].tolist()
        if values[index] > 0
    ]


def with_supernodes(graph: Graph, groups: Mapping[str, Iterable[int]]) -> Graph:
    """A copy of the graph with these supernodes instead of its present ones. A node may be in one supernode at most."""
    owner: dict[int, str] = {}
    members = {name: tuple(int(node) for node in nodes) for name, nodes in groups.items()}
    for name, nodes in members.items():
        for node in nodes:
            check_node(graph, node, f"supernode '{name}': ")
            if node in owner:
                raise UserError(f"supernode '{name}': node {node} is in '{owner[node]}' already, expected it once")
            owner[node] = name
    return replace(graph, supernodes=members)


def between_supernodes(graph: Graph, others: bool = False) -> tuple[list[str], Float[np.ndarray, "S S"]]:
    """The supernodes' names, and the edges between supernodes (row = target). With `others`, each node outside all
    supernodes counts as a supernode.

    With t the members of target group P, s the members of source group Q:

        edge[P, Q] = sum over t of weight[t] (sum over s of sign(adjacency[t, s]) share[t, s])
        weight[t]  = visits[t] / (sum of visits in P);  equal weights if the sum is 0

    `share` and `visits` are defined in `influence.py`. The absolute values of a row sum to at most 1.
    """
    groups = dict(graph.supernodes)
    if others:
        grouped = {node for members in groups.values() for node in members}
        single = [node for node in range(len(graph)) if node not in grouped]
        names, sets = [*groups, *(name_of(graph, node) for node in single)], [*groups.values(), *((n,) for n in single)]
    else:
        names, sets = list(groups), list(groups.values())
    is_member = np.zeros((len(sets), len(graph)))
    for row, nodes in zip(is_member, sets, strict=True):
        row[list(nodes)] = 1
    weights = is_member * (graph.influence + graph.output_weights)
    weights = np.where(weights.sum(axis=1, keepdims=True) > 0, weights, is_member)
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), FLOOR)
    return names, weights @ (compute_signed_shares(graph.edges) @ is_member.T)


def _find_start(graph: Graph, target: int | None) -> np.ndarray:
    """The weight of each node at which paths may end: the outputs' shares of their weights, or 1 for the one target."""
    if target is None:
        weights = graph.output_weights.astype(np.float64)
        return weights / (weights.sum() or 1)
    check_node(graph, target)
    start = np.zeros(len(graph))
    start[target] = 1
    return start


def _trace_path(graph: Graph, best: np.ndarray, previous: np.ndarray, rank: np.ndarray, node: int, place: int) -> Path:
    """The path number `place` of this node, followed up to its top."""
    share, nodes = float(best[node, place]), [node]
    while (target := int(previous[node, place])) >= 0:
        place = int(rank[node, place])
        node = target
        nodes.append(node)
    negative = sum(int(graph.adjacency[b][a] < 0) for a, b in zip(nodes, nodes[1:], strict=False))
    return Path(tuple(nodes), share, -1 if negative % 2 else 1)
