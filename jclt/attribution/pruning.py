"""The few nodes and edges that carry most of the influence on the outputs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from jclt.attribution.graph import KINDS, Graph
from jclt.attribution.influence import (
    Scores,
    Steps,
    cumulative_share,
    node_influence,
    output_weights,
    scores,
)
from jclt.errors import UserError, nearest
from jclt.shapes import Bool, Float, Int

Rule = Literal["paper", "circuit-tracer"]
NEVER_REMOVED = {
    "paper": ("error", "token", "position", "output"),
    "circuit-tracer": ("token", "position", "output"),
}


class Masks(NamedTuple):
    nodes: Bool[np.ndarray, "N"]
    edges: Bool[np.ndarray, "N N"]
    cumulative: Float[np.ndarray, "N"]
    """The share of all influence that a node has together with all nodes of more influence: small is important."""


@dataclass(frozen=True)
class CurvePoint:
    """A pruned graph's size and what it still explains."""

    node_threshold: float
    nodes: int
    edges: int
    scores: Scores


def prune(graph: Graph, node_threshold: float = 0.8, edge_threshold: float = 0.98, rule: Rule = "paper") -> Graph:
    """The graph of the nodes, then of the edges among them, that make up these shares of the influence; what the
    others brought is added to `rest`. Nodes' `whole_shares` and the scores in `provenance` are those of the whole
    graph, also where that was pruned before."""
    found = masks(graph, node_threshold, edge_threshold, rule)
    settings = {"node_threshold": float(node_threshold), "edge_threshold": float(edge_threshold), "rule": rule}
    known = graph.provenance | {"pruning_settings": settings}
    if "whole_graph_scores" not in known:
        known["whole_graph_scores"] = scores(graph).both
    shares = found.cumulative if graph.whole_shares is None else graph.whole_shares
    return replace(graph, whole_shares=shares, provenance=known).keep(found.nodes, found.edges)


def masks(graph: Graph, node_threshold: float = 0.8, edge_threshold: float = 0.98, rule: Rule = "paper") -> Masks:
    """Which nodes and edges pruning keeps. An edge counts by its share of what reaches its target from the kept nodes,
    times the target's influence through those; features that are left without inputs or outputs go too.

    Under the rule "circuit-tracer" error nodes may go as well, under "paper" they all stay.
    """
    for name, threshold in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 <= threshold <= 1:
            raise UserError(f"{name}={threshold}: expected a share between 0 and 1")
    if rule not in NEVER_REMOVED:
        raise UserError(f"rule '{rule}' is unknown; {nearest(rule, NEVER_REMOVED)}")
    influence = node_influence(graph)
    fixed = np.isin(graph.kinds, [KINDS.index(kind) for kind in NEVER_REMOVED[rule]])
    nodes = fixed | (influence >= _threshold_value(influence[influence > 0], node_threshold))

    chosen = np.flatnonzero(nodes)
    among = _EdgeScores(graph, chosen)
    least = _threshold_value(among.positive(), edge_threshold)
    edges = np.empty((len(chosen), len(chosen)), bool)
    for rows, values in among.blocks():
        edges[rows] = values >= least
    alive = _without_dead_ends(edges, fixed[chosen], graph.kinds[chosen] == KINDS.index("feature"))
    edges &= alive[:, None]
    edges &= alive
    nodes[chosen] = alive
    all_edges = np.zeros(graph.adjacency.shape, bool)
    all_edges[np.ix_(chosen, chosen)] = edges
    return Masks(nodes, all_edges, cumulative_share(influence))


def curve(
    graph: Graph, node_thresholds: Iterable[float], edge_threshold: float = 0.98, rule: Rule = "paper"
) -> list[CurvePoint]:
    """How small the graph gets and how much it still explains, for several node thresholds."""
    points = []
    for threshold in node_thresholds:
        pruned = prune(graph, threshold, edge_threshold, rule)
        edges = int(np.count_nonzero(pruned.adjacency))
        points.append(CurvePoint(float(threshold), len(pruned), edges, scores(pruned)))
    return points


class _EdgeScores:
    """The influence that flows through each edge among the chosen nodes when there are no others; never all at once."""

    def __init__(self, graph: Graph, chosen: Int[np.ndarray, "c"]):
        self.steps = Steps(graph, chosen)
        weights = output_weights(graph)[chosen]
        self.flow = self.steps.visits_below(weights) + weights

    def blocks(self) -> Iterator[tuple[Int[np.ndarray, "r"], Float[np.ndarray, "r c"]]]:
        """Some rows, and what flows through their edges."""
        for rows in self.steps.blocks():
            values = self.steps.rows(rows)
            values *= self.flow[rows][:, None]
            yield rows, values

    def positive(self) -> Float[np.ndarray, "_"]:
        counts = [int(np.count_nonzero(values > 0)) for _, values in self.blocks()]
        found, start = np.empty(sum(counts), self.flow.dtype), 0
        for (_, values), count in zip(self.blocks(), counts, strict=True):
            found[start : start + count] = values[values > 0]
            start += count
        return found


def _threshold_value(values: np.ndarray, share: float) -> float:
    """The largest of these positive values such that those not below it make up this share of the sum; at share 1 the
    least. The values are sorted in place."""
    if not len(values):
        return np.inf
    if share == 1:
        return float(values.min())
    values.sort()
    ordered = values[::-1]
    # Rounded where circuit-tracer rounds, so that the same values are the last ones in.
    total = ordered.dtype.type(0)
    for sums in _running_sums(ordered):
        total = sums[-1]
    place = 0
    for sums in _running_sums(ordered):
        sums /= total or 1
        place += int(np.searchsorted(sums, ordered.dtype.type(share)))
        if sums[-1] >= share:
            break
    return float(ordered[min(place, len(ordered) - 1)])


def _running_sums(values: Float[np.ndarray, "n"], size: int = 1 << 22) -> Iterator[Float[np.ndarray, "_"]]:
    """The sums of all values up to each one, added in double precision, a part of them at a time."""
    total = 0.0
    for start in range(0, len(values), size):
        part = values[start : start + size].astype(np.float64)
        part[0] += total
        sums = np.cumsum(part)
        total = sums[-1]
        yield sums.astype(values.dtype)


def _without_dead_ends(edges: np.ndarray, fixed: np.ndarray, features: np.ndarray) -> np.ndarray:
    """The nodes that stay when those without outputs, and features without inputs, go until all have them."""
    alive = np.ones(len(edges), bool)
    edges = edges.copy()
    while True:
        dead = alive & ~fixed & ~(edges.any(axis=0) & (edges.any(axis=1) | ~features))
        if not dead.any():
            return alive
        alive &= ~dead
        edges[dead] = False
        edges[:, dead] = False
