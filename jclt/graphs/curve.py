"""How small a graph gets and how much it still explains, as it is pruned further and further."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from jclt.graphs.graph import Graph
from jclt.graphs.influence import Scores
from jclt.graphs.pruning import Rule


@dataclass(frozen=True)
class CurvePoint:
    """A pruned graph's size and what it still explains."""

    node_threshold: float
    nodes: int
    edges: int
    scores: Scores


def curve(
    graph: Graph, node_thresholds: Iterable[float], edge_threshold: float = 0.98, rule: Rule = "paper"
) -> list[CurvePoint]:
    """How small the graph gets and how much it still explains, for several node thresholds."""
    points = []
    for threshold in node_thresholds:
        pruned = graph.prune(threshold, edge_threshold, rule)
        edges = int(np.count_nonzero(pruned.adjacency))
        points.append(CurvePoint(float(threshold), len(pruned), edges, pruned.scores))
    return points
