"""How much each node counts for the outputs, and how much of the model's work the graph explains.

Everything here reads |edges|, divided by all that reaches their target, as a walk from the outputs down: a walker at a
node goes to each source with that share, stops at embeddings and errors, and leaves the graph into `rest`.
"""

from dataclasses import dataclass

import numpy as np

from jclt.attribution.graph import Graph
from jclt.shapes import Float, Int

FLOOR = 1e-10


def output_weights(graph: Graph) -> Float[np.ndarray, "N"]:
    """What each node counts by itself: outputs their weight, others nothing."""
    weights = np.zeros(len(graph), graph.adjacency.dtype)
    weights[graph.nodes("output")] = graph.logit_probabilities if graph.logit_weights is None else graph.logit_weights
    return weights


def shares_of_rows(
    adjacency: Float[np.ndarray, "N N"], rest_mass: Float[np.ndarray, "N"]
) -> tuple[Float[np.ndarray, "N N"], Float[np.ndarray, "N"]]:
    """Each edge's and the rest's share of the absolute values that reach a target; nothing where nothing does."""
    shares = np.abs(adjacency)
    mass = np.maximum(shares.sum(axis=1, dtype=np.float64) + rest_mass, FLOOR)
    shares /= mass.astype(shares.dtype)[:, None]
    return shares, rest_mass / mass


def visits_below(
    shares: Float[np.ndarray, "N N"], layers: Int[np.ndarray, "N"], start: Float[np.ndarray, "N"]
) -> Float[np.ndarray, "N"]:
    """start A + start A^2 + ..., exact in one pass: every source lies in a lower layer than its target."""
    visits = start.astype(np.float64)
    for layer in np.unique(layers)[::-1]:
        rows = np.flatnonzero((layers == layer) & (visits != 0))
        if len(rows):
            visits += visits[rows].astype(shares.dtype) @ shares[rows]
    return (visits - start).astype(shares.dtype)


def normalized(graph: Graph) -> Float[np.ndarray, "N N"]:
    """|Edges|, each divided by all that reaches its target, from the graph or from outside."""
    return shares_of_rows(graph.adjacency, graph.rest_mass)[0]


def node_influence(graph: Graph) -> Float[np.ndarray, "N"]:
    """How often walks from the outputs, as many as each output's probability, come to each node."""
    return visits_below(normalized(graph), graph.node_layers, output_weights(graph))


def missing(graph: Graph) -> float:
    """The part of the walks from the outputs that leaves the graph: no node's influence is further below what the
    whole graph would give it, as a share of the outputs' weight."""
    flow = _flow(graph)
    return _ratio(flow.left.sum(), flow.weight)


@dataclass(frozen=True)
class Scores:
    """What part of the outputs' making the graph explains, and what the graph with nothing in `rest` could have said.

    The intervals hold because walks in the whole graph are the walks here up to where these leave. Of those that leave
    (a weight m in all), any part may end at tokens, any at errors: the bounds of `replacement`. For completeness,
    visits are counted, S in all, C of them weighted by what is not error. A walk that leaves a node in layer l makes 1
    to l + 1 visits more, for layers fall at each: X in all at most, each weighted between 0 and 1. Its last visit is to
    a node without inputs and counts in full, which makes up for what the step out may have been of error. So the whole
    graph has C + x visits in S + y, with 0 <= x <= y <= X. Completeness itself takes what is in `rest` for error
    without such a last visit; where little is explained it can lie below its interval.
    """

    replacement: float
    replacement_interval: tuple[float, float]
    completeness: float
    completeness_interval: tuple[float, float]


def scores(graph: Graph) -> Scores:
    """Replacement: of the walks from the outputs, the part that ends at embeddings. Completeness: of the inputs of all
    visited nodes, the part that is no error; a node without inputs counts as explained. `rest` counts as error."""
    flow = _flow(graph)
    tokens = flow.visits[graph.nodes("token", "position")].sum()
    errors = flow.visits[graph.nodes("error")].sum()
    left = flow.left.sum()
    ends = tokens + errors + left
    visits, explained = flow.visits.sum(), (flow.visits * (1 - flow.error_shares)).sum()
    further = (flow.left * (graph.node_layers + 1)).sum()
    return Scores(
        replacement=_ratio(tokens, ends),
        replacement_interval=(_ratio(tokens, ends), _ratio(tokens + left, ends)),
        completeness=_ratio(explained - left, visits),
        completeness_interval=(_ratio(explained, visits + further), _ratio(explained + further, visits + further)),
    )


@dataclass(frozen=True)
class _Flow:
    visits: Float[np.ndarray, "N"]  # influence, and for outputs their own weight
    left: Float[np.ndarray, "N"]  # of the visits to a node those that leave the graph there
    error_shares: Float[np.ndarray, "N"]
    weight: float  # of all outputs


def _flow(graph: Graph) -> _Flow:
    shares, rest_shares = shares_of_rows(graph.adjacency, graph.rest_mass)
    weights = output_weights(graph)
    visits = visits_below(shares, graph.node_layers, weights).astype(np.float64) + weights
    error_shares = shares[:, graph.nodes("error")].sum(axis=1, dtype=np.float64)
    return _Flow(visits, visits * rest_shares, error_shares, float(weights.sum(dtype=np.float64)))


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
