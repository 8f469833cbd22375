"""The size of a pruned graph against how much it still explains."""

from collections.abc import Iterable
from dataclasses import dataclass

from jclt.graphs.adjacency import count_edges
from jclt.graphs.graph import Graph
from jclt.graphs.influence import Scores
from jclt.graphs.pruning import Rule


@dataclass(frozen=True)
class CurvePoint:
    """The size and the scores of a graph pruned at one threshold."""

    node_threshold: float
    nodes: int
    edges: int
    scores: Scores


def curve(
    graph: Graph, node_thresholds: Iterable[float], edge_threshold: float = 0.98, rule: Rule = "paper"
) -> list[CurvePoint]:
    """Prunes the graph at each node threshold and measures its size and scores."""
    points = []
    for threshold in node_thresholds:
        pruned = graph.prune(threshold, edge_threshold, rule)
        edges = count_edges(pruned.adjacency)
        points.append(CurvePoint(float(threshold), len(pruned), edges, pruned.scores))
    return points
