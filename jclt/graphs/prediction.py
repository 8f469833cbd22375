"""What a graph predicts when features change: from its edges alone, without the model.

An edge is proportional to its source's activation. So if a feature's activation is multiplied by 1 + r, each of its
edges changes by r times the edge:

    direct effect on a target  = sum over changed sources s: edge(s -> target) r(s)

A feature downstream is changed too, by r(target) = effect / value, and passes this on to its own targets. The sum over
all such paths is the total effect.

The prediction is linear: no feature switches on or off, and attention and norms stay frozen. Features and errors that
are not in the graph are assumed not to change. Heads and residual streams that are nodes are no features: what they
pass on belongs to direct effects, too.
"""

from collections.abc import Mapping

import numpy as np

from jclt.graphs.graph import Graph
from jclt.shapes import Float


def predict_changes(graph: Graph, changes: Mapping[int, float], *, total: bool) -> Float[np.ndarray, "N"]:
    """The change of each node's value when the features and errors in `changes` (numbers of nodes) change by these
    shares of themselves: -1 takes one away. With `total` also through other features, which are recomputed."""
    nodes, values = graph.nodes, graph.values
    relative = np.zeros(len(graph))
    relative[list(changes)] = list(changes.values())
    passing = nodes.is_kind("head", "stream")
    if total:
        passing |= nodes.is_kind("feature")
    imposed = np.zeros(len(graph), bool)
    imposed[list(changes)] = True
    passing &= ~imposed & (values != 0)
    for place in np.unique(nodes.order[passing]):
        targets = np.flatnonzero(passing & (nodes.order == place))
        relative[targets] = graph.adjacency[targets] @ relative / values[targets]
    return graph.adjacency @ relative
