"""Pruning: which nodes and edges have most of the influence on the outputs."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from jclt.errors import UserError, suggest_name
from jclt.graphs.adjacency import SparseRows, split_rows, stack_blocks
from jclt.graphs.influence import EdgeInfluence, Edges, compute_cumulative_shares, compute_influence
from jclt.graphs.nodes import Kind
from jclt.shapes import Bool, Float, Int

Rule = Literal["paper", "circuit-tracer"]
NEVER_REMOVED: dict[str, tuple[Kind, ...]] = {
    "paper": ("error", "token", "position", "output"),
    "circuit-tracer": ("token", "position", "output"),
}


EdgeMask = Bool[np.ndarray, "N N"] | SparseRows


class Masks(NamedTuple):
    """What pruning keeps."""

    nodes: Bool[np.ndarray, "N"]
    edges: EdgeMask
    cumulative: Float[np.ndarray, "N"]
    """For each node, the share of all influence that this node and all stronger nodes have together."""


def choose_nodes_and_edges(edges: Edges, node_threshold: float, edge_threshold: float, rule: Rule) -> Masks:
    """Chooses the nodes and edges that pruning keeps.

    1. Keep the strongest nodes that together have `node_threshold` of all node influence, and every node of a kind that
       the rule never removes: "paper" keeps all errors, "circuit-tracer" does not.
    2. Compute edge influence in the graph of these nodes alone. Keep the strongest edges that together have
       `edge_threshold` of it.
    3. Remove features, heads and residual streams without incoming edges, and these or errors without outgoing edges,
       until none is left.
    """
    for name, threshold in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 <= threshold <= 1:
            raise UserError(f"{name}={threshold}: expected a share between 0 and 1")
    if rule not in NEVER_REMOVED:
        raise UserError(f"rule '{rule}' is unknown; {suggest_name(rule, NEVER_REMOVED)}")
    influence = compute_influence(edges)
    never_removed = edges.nodes.is_kind(*NEVER_REMOVED[rule])
    node_mask = never_removed | (influence >= _find_cutoff(influence[influence > 0], node_threshold))

    chosen = np.flatnonzero(node_mask)
    edge_influence = EdgeInfluence(edges, chosen)
    cutoff = _find_cutoff(edge_influence.list_positive(), edge_threshold)
    blocks = (values >= cutoff for _, values in edge_influence.compute_blocks())
    is_sparse, dtype = isinstance(edges.adjacency, SparseRows), np.dtype(bool)
    is_kept = stack_blocks(blocks, len(chosen), dtype, is_sparse)
    needs_inputs = edges.nodes.is_kind("feature", "head", "stream")[chosen]
    connected = _remove_dead_ends(is_kept, never_removed[chosen], needs_inputs)
    node_mask[chosen] = connected
    edge_mask = stack_blocks(_spread(is_kept, connected, chosen, len(node_mask)), len(node_mask), dtype, is_sparse)
    return Masks(nodes=node_mask, edges=edge_mask, cumulative=compute_cumulative_shares(influence))


def _spread(
    edges: EdgeMask, connected: Bool[np.ndarray, "n"], chosen: Int[np.ndarray, "n"], size: int
) -> Iterator[Bool[np.ndarray, "_ N"]]:
    """Blocks of rows of a mask of the edges among all nodes, given that among the chosen ones, and which of these are
    connected."""
    place = np.full(size, -1)
    place[chosen[connected]] = np.flatnonzero(connected)
    for rows in split_rows(size, 1, np.arange(size)):
        block, inside = np.zeros((len(rows), size), bool), np.flatnonzero(place[rows] >= 0)
        block[np.ix_(inside, chosen)] = edges[place[rows[inside]]] & connected
        yield block


def _find_cutoff(values: np.ndarray, share: float) -> float:
    """The largest cutoff such that the values at or above it sum to at least this share of the total. All values are
    positive; they are sorted in place."""
    if not len(values):
        return np.inf
    if share == 1:
        return float(values.min())
    values.sort()
    descending = values[::-1]
    # Rounds where circuit-tracer rounds, so that both find the same cutoff.
    total = descending.dtype.type(0)
    for sums in _iterate_running_sums(descending):
        total = sums[-1]
    count = 0
    for sums in _iterate_running_sums(descending):
        sums /= total or 1
        count += int(np.searchsorted(sums, descending.dtype.type(share)))
        if sums[-1] >= share:
            break
    return float(descending[min(count, len(descending) - 1)])


def _iterate_running_sums(values: Float[np.ndarray, "n"], size: int = 1 << 22) -> Iterator[Float[np.ndarray, "_"]]:
    """The cumulative sum of the values, added in double precision, `size` values at a time."""
    total = 0.0
    for start in range(0, len(values), size):
        block = values[start : start + size].astype(np.float64)
        block[0] += total
        sums = np.cumsum(block)
        total = sums[-1]
        yield sums.astype(values.dtype)


def _remove_dead_ends(
    edges: EdgeMask, never_removed: Bool[np.ndarray, "n"], needs_inputs: Bool[np.ndarray, "n"]
) -> Bool[np.ndarray, "n"]:
    """A mask of the nodes that are left when nodes without outgoing edges, and those without needed inputs, are
    removed again and again until there are none."""
    connected = np.ones(len(edges), bool)
    while True:
        feeds, is_fed = np.zeros((2, len(edges)), bool)
        for rows in split_rows(len(edges), 1, np.flatnonzero(connected)):
            block = edges[rows]
            feeds |= block.any(axis=0)
            is_fed[rows] = (block & connected).any(axis=1)
        dead = connected & ~never_removed & ~(feeds & (is_fed | ~needs_inputs))
        if not dead.any():
            return connected
        connected &= ~dead
