"""Influence: how much each node and each edge contributes to the outputs, and how much of the model a graph explains.

The one definition, with w the output weights and t, s the target and source of an edge:

    mass[t]               = sum over s of |adjacency[t, s]|  +  rest_mass[t]
    share[t, s]           = |adjacency[t, s]| / mass[t]
    influence             = w share + w share^2 + w share^3 + ...
    visits                = w + influence
    edge influence[t, s]  = visits[t] share[t, s]

As a random walk: walkers start at the outputs, w[t] of them at output t. From a target a walker steps to source s with
probability share[t, s], or leaves the graph with probability rest_mass[t] / mass[t]. It ends at embeddings and errors,
which have no incoming edges. A node's influence is how many walkers visit it after their start.

The replacement score is the share of these walks that ends at embeddings (`Scores` adds completeness and intervals):

    replacement  = T / (T + E + m)    T = sum of visits over embeddings, E = over errors, m = walkers that leave

Pruning, scores, paths and pictures use the functions below. `attribution/ranking.py` applies the same definition to the
rows that it has traced so far.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jclt.graphs.adjacency import Adjacency, split_all_rows, split_rows
from jclt.graphs.nodes import NodeTable
from jclt.memory import check_memory
from jclt.shapes import Float, Int

FLOOR = 1e-10
"""The least mass to divide by."""


class Edges(NamedTuple):
    """The parts of a graph that determine influence and scores."""

    adjacency: Adjacency  # row = target, column = source
    rest_mass: Float[np.ndarray, "N"]  # sum of the absolute contributions to a target from outside the graph
    nodes: NodeTable
    output_weights: Float[np.ndarray, "N"]  # 0 for nodes that are not outputs


class EdgeShares:
    """`share[t, s]` among all nodes or a subset of them, computed a few rows at a time.

    For a subset, mass counts the edges within the subset and `rest_mass`.
    """

    def __init__(self, edges: Edges, nodes: Int[np.ndarray, "n"] | None = None):
        self.adjacency, self.nodes = edges.adjacency, nodes
        self.order = edges.nodes.order if nodes is None else edges.nodes.order[nodes]
        rest_mass = edges.rest_mass if nodes is None else edges.rest_mass[nodes]
        self.mass = np.empty(len(self), np.result_type(rest_mass, np.float64))
        for rows in self.split_rows():
            self.mass[rows] = self._compute_sizes(rows).sum(axis=1, dtype=np.float64)
        self.mass = np.maximum(self.mass + rest_mass, FLOOR)
        self.rest_shares = rest_mass / self.mass

    def __len__(self) -> int:
        return len(self.order)

    def split_rows(self, rows: Int[np.ndarray, "r"] | None = None) -> Iterator[Int[np.ndarray, "_"]]:
        """Splits these rows, or all, into blocks."""
        return split_rows(len(self), self.adjacency.itemsize, np.arange(len(self)) if rows is None else rows)

    def compute_rows(self, rows: Int[np.ndarray, "r"]) -> Float[np.ndarray, "r n"]:
        """The shares of some rows. Each row sums to at most 1; a row without incoming edges is 0."""
        shares = self._compute_sizes(rows)
        shares /= self.mass[rows].astype(shares.dtype)[:, None]
        return shares

    def count_visits_after(self, start: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        """start share + start share^2 + ..., exact in one pass: every source is lower in order than its target."""
        visits = start.astype(np.float64)
        for place in np.unique(self.order)[::-1]:
            for rows in self.split_rows(np.flatnonzero((self.order == place) & (visits != 0))):
                shares = self.compute_rows(rows)
                visits += visits[rows].astype(shares.dtype) @ shares
        return (visits - start).astype(self.adjacency.dtype)

    def _compute_sizes(self, rows: Int[np.ndarray, "r"]) -> Float[np.ndarray, "r n"]:
        """|adjacency| of some rows."""
        if self.nodes is None:
            edges = self.adjacency[rows]
        elif isinstance(self.adjacency, np.ndarray):
            edges = self.adjacency[np.ix_(self.nodes[rows], self.nodes)]
        else:
            edges = self.adjacency[self.nodes[rows]][:, self.nodes]
        return np.abs(edges, out=edges)


class EdgeInfluence:
    """The influence of each edge among all nodes or a subset of them, computed a few rows at a time."""

    def __init__(self, edges: Edges, nodes: Int[np.ndarray, "n"] | None = None):
        self.shares = EdgeShares(edges, nodes)
        weights = edges.output_weights if nodes is None else edges.output_weights[nodes]
        self.visits = self.shares.count_visits_after(weights) + weights

    def compute_blocks(self) -> Iterator[tuple[Int[np.ndarray, "r"], Float[np.ndarray, "r n"]]]:
        """Blocks of rows, and the influence of each edge in these rows."""
        for rows in self.shares.split_rows():
            values = self.shares.compute_rows(rows)
            values *= self.visits[rows][:, None]
            yield rows, values

    def list_positive(self) -> Float[np.ndarray, "_"]:
        """All influences above 0, in one array."""
        counts = [int(np.count_nonzero(values > 0)) for _, values in self.compute_blocks()]
        positive, start = np.empty(sum(counts), self.visits.dtype), 0
        for (_, values), count in zip(self.compute_blocks(), counts, strict=True):
            positive[start : start + count] = values[values > 0]
            start += count
        return positive


def compute_edge_shares(edges: Edges) -> Float[np.ndarray, "N N"]:
    check_memory_for_array(edges)
    return EdgeShares(edges).compute_rows(np.arange(len(edges.nodes)))


def compute_signed_shares(edges: Edges) -> Float[np.ndarray, "N N"]:
    """The shares with the signs of the edges."""
    shares = compute_edge_shares(edges)
    for rows in split_all_rows(edges.adjacency):
        shares[rows] = np.copysign(shares[rows], edges.adjacency[rows])
    return shares


def compute_influence(edges: Edges) -> Float[np.ndarray, "N"]:
    return EdgeShares(edges).count_visits_after(edges.output_weights)


def compute_edge_influence(edges: Edges) -> Float[np.ndarray, "N N"]:
    check_memory_for_array(edges)
    influence = np.empty(edges.adjacency.shape, edges.adjacency.dtype)
    for rows, values in EdgeInfluence(edges).compute_blocks():
        influence[rows] = values
    return influence


def check_memory_for_array(edges: Edges) -> None:
    """An error of one line if an array as large as that of all edges does not fit in memory."""
    need = len(edges.nodes) ** 2 * edges.adjacency.itemsize
    check_memory(need, f"graph: the shares of edges between its {len(edges.nodes)} nodes", "prune it first", host=True)


def compute_cumulative_shares(influence: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """For each node, the share of all influence that this node and all stronger nodes have together. A small value
    means an important node.

    Rounds where circuit-tracer rounds.
    """
    order = np.argsort(-influence, kind="stable")
    sums = np.cumsum(influence[order], dtype=np.float64).astype(influence.dtype)
    shares = np.empty_like(influence)
    shares[order] = sums / (sums[-1] or 1) if len(sums) else sums
    return shares


def compute_missing_share(edges: Edges) -> float:
    """The share of the walkers that leaves the graph. In the complete graph, no node's influence is higher by more than
    this share of the total output weight."""
    visits = _count_visits(edges)
    return _divide(visits.leaving.sum(), visits.weight)


@dataclass(frozen=True)
class Scores:
    """How much of the outputs the graph explains, and intervals that hold for any completion of the graph.

    With v visits (`visits[n]` in the formulas at the head of this file) and r walkers that leave the graph:

        v[n]   visits of node n                    r[n] = v[n] rest_mass[n] / mass[n]     walkers that leave at node n
        e[n]   share of n's mass that is errors    l[n] = layer of node n
        T = sum of v over embeddings               E = sum of v over errors               m = sum of r
        S = sum of v                               C = sum of v (1 - e)                   X = sum of r (l + 1)

        replacement  = T / (T + E + m)
        completeness = (C - m) / S                 what leaves the graph counts as error

    The intervals:

    1. A walk in the complete graph equals a walk in this graph until it leaves this graph.
    2. Each of the m leaving walks may end at an embedding or at an error, so in the complete graph
           T / (T + E + m)  <=  replacement  <=  (T + m) / (T + E + m)
    3. A walk that leaves at layer l makes at least 1 and at most l + 1 further visits, because the layer falls at each
       step. All leaving walks together make y further visits, with m <= y <= X. (With heads and residual streams as
       nodes a walk visits up to 3 nodes of a layer, and X = 3 sum of r (l + 1); with one of the two kinds 2.)
    4. A further visit adds a weight 1 - e between 0 and 1 to C. The last visit of a walk is to a node without inputs
       and adds 1. So the further visits add at least m and at most y.
    5. The step out of this graph may lead to an error. C counts this step as no error, so the correction lowers C by at
       most m. Together with point 4, C changes by some x with 0 <= x <= y.
    6. So completeness in the complete graph is (C + x) / (S + y) with 0 <= x <= y <= X, and
           C / (S + X)  <=  completeness  <=  (C + X) / (S + X)

    The value `completeness` itself does not count the last visits of point 4. It can be below its interval where the
    graph explains little.
    """

    replacement: float
    replacement_interval: tuple[float, float]
    completeness: float
    completeness_interval: tuple[float, float]

    @property
    def both(self) -> dict[str, float]:
        """The scores without their intervals."""
        return {"replacement": self.replacement, "completeness": self.completeness}


def measure_scores(edges: Edges) -> Scores:
    """Replacement is the share of the walks that ends at embeddings. Completeness is the share of the inputs of all
    visited nodes that is no error; a node without inputs counts as explained. `rest` counts as error in both."""
    visits = _count_visits(edges)
    tokens = visits.counts[edges.nodes.is_kind("token", "position")].sum()
    errors = visits.counts[edges.nodes.is_kind("error")].sum()
    leaving = visits.leaving.sum()
    ends = tokens + errors + leaving
    total, explained = visits.counts.sum(), (visits.counts * (1 - visits.error_shares)).sum()
    further = (visits.leaving * (edges.nodes.layer + 1)).sum() * edges.nodes.steps_per_layer
    return Scores(
        replacement=_divide(tokens, ends),
        replacement_interval=(_divide(tokens, ends), _divide(tokens + leaving, ends)),
        completeness=_divide(explained - leaving, total),
        completeness_interval=(_divide(explained, total + further), _divide(explained + further, total + further)),
    )


@dataclass(frozen=True)
class _Visits:
    counts: Float[np.ndarray, "N"]  # influence + output weight
    leaving: Float[np.ndarray, "N"]  # how many walkers leave the graph at each node
    error_shares: Float[np.ndarray, "N"]  # of each node's mass
    weight: float  # of all outputs together


def _count_visits(edges: Edges) -> _Visits:
    shares, weights, errors = EdgeShares(edges), edges.output_weights, edges.nodes.find("error")
    counts = shares.count_visits_after(weights).astype(np.float64) + weights
    error_shares = np.zeros(len(edges.nodes))
    for rows in shares.split_rows(np.flatnonzero(counts)):
        error_shares[rows] = shares.compute_rows(rows)[:, errors].sum(axis=1, dtype=np.float64)
    return _Visits(
        counts=counts,
        leaving=counts * shares.rest_shares,
        error_shares=error_shares,
        weight=float(weights.sum(dtype=np.float64)),
    )


def _divide(part: float, total: float) -> float:
    return float(part / total) if total else 0.0
