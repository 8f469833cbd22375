"""How much each node counts for the outputs, and how much of the model's work the graph explains.

Everything here reads |edges|, divided by all that reaches their target, as a walk from the outputs down: a walker at a
node goes to each source with that share, stops at embeddings and errors, and leaves the graph into `rest`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jclt.graphs.nodes import NodeTable
from jclt.shapes import Float, Int

FLOOR = 1e-10
BLOCK = 1 << 26
"""Bytes of edges that are worked on at once, so that scores and pruning need no second matrix of all edges."""


class Edges(NamedTuple):
    """All that influence and scores read of a graph."""

    adjacency: Float[np.ndarray, "N N"]  # row = target, column = source
    rest_mass: Float[np.ndarray, "N"]  # sum of |what reaches a target from outside the graph|
    nodes: NodeTable
    weights: Float[np.ndarray, "N"]  # how many walks start at each node: an output's weight, else 0


def rows_at_once(width: int, itemsize: int) -> int:
    """How many rows make up `BLOCK` bytes; at least one."""
    return max(BLOCK // max(width * itemsize, 1), 1)


def row_blocks(width: int, itemsize: int, rows: Int[np.ndarray, "r"]) -> Iterator[Int[np.ndarray, "_"]]:
    many = rows_at_once(width, itemsize)
    return (rows[start : start + many] for start in range(0, len(rows), many))


class Steps:
    """|Edges| among some nodes, or all, each divided by all that reaches its target from these or from outside; of a
    few rows at a time."""

    def __init__(self, edges: Edges, nodes: Int[np.ndarray, "n"] | None = None):
        self.adjacency, self.nodes = edges.adjacency, nodes
        self.layers = edges.nodes.layer if nodes is None else edges.nodes.layer[nodes]
        rest_mass = edges.rest_mass if nodes is None else edges.rest_mass[nodes]
        self.mass = np.empty(len(self), np.result_type(rest_mass, np.float64))
        for rows in self.blocks():
            self.mass[rows] = self._sizes(rows).sum(axis=1, dtype=np.float64)
        self.mass = np.maximum(self.mass + rest_mass, FLOOR)
        self.rest = rest_mass / self.mass

    def __len__(self) -> int:
        return len(self.layers)

    def blocks(self, rows: Int[np.ndarray, "r"] | None = None) -> Iterator[Int[np.ndarray, "_"]]:
        return row_blocks(len(self), self.adjacency.itemsize, np.arange(len(self)) if rows is None else rows)

    def rows(self, rows: Int[np.ndarray, "r"]) -> Float[np.ndarray, "r n"]:
        """Each row's shares, which sum to at most 1; nothing where nothing reaches the target."""
        shares = self._sizes(rows)
        shares /= self.mass[rows].astype(shares.dtype)[:, None]
        return shares

    def visits_below(self, start: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        """start A + start A^2 + ..., exact in one pass: every source lies in a lower layer than its target."""
        visits = start.astype(np.float64)
        for layer in np.unique(self.layers)[::-1]:
            for rows in self.blocks(np.flatnonzero((self.layers == layer) & (visits != 0))):
                shares = self.rows(rows)
                visits += visits[rows].astype(shares.dtype) @ shares
        return (visits - start).astype(self.adjacency.dtype)

    def _sizes(self, rows: Int[np.ndarray, "r"]) -> Float[np.ndarray, "r n"]:
        found = self.adjacency[rows] if self.nodes is None else self.adjacency[np.ix_(self.nodes[rows], self.nodes)]
        return np.abs(found, out=found)


def normalize(edges: Edges) -> Float[np.ndarray, "N N"]:
    """|Edges|, each divided by all that reaches its target, from the graph or from outside."""
    return Steps(edges).rows(np.arange(len(edges.nodes)))


def node_influence(edges: Edges) -> Float[np.ndarray, "N"]:
    """How often walks from the outputs, as many as each output's weight, come to each node."""
    return Steps(edges).visits_below(edges.weights)


def cumulative_share(influence: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """For each node the share of all influence that it and the stronger ones have: the smaller, the more important.

    Rounded where circuit-tracer rounds.
    """
    order = np.argsort(-influence, kind="stable")
    sums = np.cumsum(influence[order], dtype=np.float64).astype(influence.dtype)
    shares = np.empty_like(influence)
    shares[order] = sums / (sums[-1] or 1) if len(sums) else sums
    return shares


def missing_share(edges: Edges) -> float:
    """The part of the walks from the outputs that leaves the graph: no node's influence is further below what the
    whole graph would give it, as a share of the outputs' weight."""
    flow = _flow(edges)
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

    @property
    def both(self) -> dict[str, float]:
        """Without the intervals."""
        return {"replacement": self.replacement, "completeness": self.completeness}


def measure_scores(edges: Edges) -> Scores:
    """Replacement: of the walks from the outputs, the part that ends at embeddings. Completeness: of the inputs of all
    visited nodes, the part that is no error; a node without inputs counts as explained. `rest` counts as error."""
    flow = _flow(edges)
    tokens = flow.visits[edges.nodes.is_of("token", "position")].sum()
    errors = flow.visits[edges.nodes.is_of("error")].sum()
    left = flow.left.sum()
    ends = tokens + errors + left
    visits, explained = flow.visits.sum(), (flow.visits * (1 - flow.error_shares)).sum()
    further = (flow.left * (edges.nodes.layer + 1)).sum()
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


def _flow(edges: Edges) -> _Flow:
    steps, weights, errors = Steps(edges), edges.weights, edges.nodes.of("error")
    visits = steps.visits_below(weights).astype(np.float64) + weights
    error_shares = np.zeros(len(edges.nodes))
    for rows in steps.blocks(np.flatnonzero(visits)):
        error_shares[rows] = steps.rows(rows)[:, errors].sum(axis=1, dtype=np.float64)
    return _Flow(visits, visits * steps.rest, error_shares, float(weights.sum(dtype=np.float64)))


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
