"""The few nodes and edges that carry most of the influence on the outputs."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from jclt.errors import UserError, nearest
from jclt.graphs.influence import Edges, Steps, cumulative_share, node_influence
from jclt.graphs.nodes import Kind
from jclt.shapes import Bool, Float, Int

Rule = Literal["paper", "circuit-tracer"]
NEVER_REMOVED: dict[str, tuple[Kind, ...]] = {
    "paper": ("error", "token", "position", "output"),
    "circuit-tracer": ("token", "position", "output"),
}


class Masks(NamedTuple):
    nodes: Bool[np.ndarray, "N"]
    edges: Bool[np.ndarray, "N N"]
    cumulative: Float[np.ndarray, "N"]
    """The share of all influence that a node has together with all nodes of more influence: small is important."""


def choose_nodes_and_edges(edges: Edges, node_threshold: float, edge_threshold: float, rule: Rule) -> Masks:
    """Which nodes and edges pruning keeps. An edge counts by its share of what reaches its target from the kept nodes,
    times the target's influence through those; features that are left without inputs or outputs go too.

    Under the rule "circuit-tracer" error nodes may go as well, under "paper" they all stay.
    """
    for name, threshold in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 <= threshold <= 1:
            raise UserError(f"{name}={threshold}: expected a share between 0 and 1")
    if rule not in NEVER_REMOVED:
        raise UserError(f"rule '{rule}' is unknown; {nearest(rule, NEVER_REMOVED)}")
    influence = node_influence(edges)
    fixed = edges.nodes.is_of(*NEVER_REMOVED[rule])
    nodes = fixed | (influence >= _threshold_value(influence[influence > 0], node_threshold))

    chosen = np.flatnonzero(nodes)
    among = _EdgeScores(edges, chosen)
    least = _threshold_value(among.positive(), edge_threshold)
    kept = np.empty((len(chosen), len(chosen)), bool)
    for rows, values in among.blocks():
        kept[rows] = values >= least
    alive = _without_dead_ends(kept, fixed[chosen], edges.nodes.is_of("feature")[chosen])
    kept &= alive[:, None]
    kept &= alive
    nodes[chosen] = alive
    kept_edges = np.zeros(edges.adjacency.shape, bool)
    kept_edges[np.ix_(chosen, chosen)] = kept
    return Masks(nodes, kept_edges, cumulative_share(influence))


class _EdgeScores:
    """The influence that flows through each edge among the chosen nodes when there are no others; never all at once."""

    def __init__(self, edges: Edges, chosen: Int[np.ndarray, "c"]):
        self.steps = Steps(edges, chosen)
        weights = edges.weights[chosen]
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
