"""Rows of edges: the walk from the outputs through them, whose visits are the influence of each source (`ranking.py`),
and the graph's edges from them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jclt.graphs.adjacency import Adjacency, make_room, set_row
from jclt.graphs.nodes import find_layer
from jclt.shapes import Float, Int


class Rows(NamedTuple):
    """Edges into some targets of one kind and layer, from the sources that can reach them."""

    order: int  # as in a graph's `NodeTable`
    targets: Int[np.ndarray, "r"]
    columns: Int[np.ndarray, "c"]
    edges: Float[np.ndarray, "r c"]

    @property
    def layer(self) -> int:
        return find_layer(self.order)


def walk(
    all_rows: Sequence[Rows], size: int, sources: Int[np.ndarray, "targets"], weights: Float[np.ndarray, "targets"]
) -> Float[np.ndarray, "size"]:
    """How many walkers visit each of so many sources. `sources` gives the source that each target is, too, or -1 for an
    output, at which so many walkers start as `weights` says."""
    influence = np.zeros(size)
    for rows in sorted(all_rows, key=lambda rows: -rows.order):
        of_targets = sources[rows.targets]
        walkers = np.where(of_targets < 0, weights[rows.targets], influence[of_targets])
        influence[rows.columns] += move_walkers(rows.edges, walkers)
    return influence


def move_walkers(rows: Float[np.ndarray, "r c"], walkers: Float[np.ndarray, "r"]) -> Float[np.ndarray, "c"]:
    """How many of the walkers at the targets of these rows go on to each source."""
    sizes = np.abs(rows)
    shares = walkers / np.maximum(sizes.sum(axis=1, dtype=np.float64), 1e-30)
    return (shares.astype(sizes.dtype) @ sizes).astype(np.float64)


class GraphEdges(NamedTuple):
    adjacency: Adjacency
    rest: Float[np.ndarray, "N"]
    rest_mass: Float[np.ndarray, "N"]


def move_to_graph(
    all_rows: list[Rows],
    source_nodes: Int[np.ndarray, "sources"],
    target_nodes: Int[np.ndarray, "targets"],
    size: int,
    dtype: np.dtype,
) -> GraphEdges:
    """The edges of a graph of so many nodes, given the node of each source and target, -1 for a source that is none:
    it counts as rest. Each row is dropped as soon as it has been copied."""

    def count() -> Int[np.ndarray, "N"]:
        counts = np.zeros(size, np.int64)
        for rows in all_rows:
            kept = source_nodes[rows.columns] >= 0
            counts[target_nodes[rows.targets]] = [np.count_nonzero(row[kept]) for row in rows.edges]
        return counts

    edges = GraphEdges(make_room(size, dtype, count), *np.zeros((2, size), dtype))
    while all_rows:
        rows = all_rows.pop()
        nodes, columns, block = target_nodes[rows.targets], source_nodes[rows.columns], rows.edges
        del rows  # so that the edges below are dropped when they have been copied
        if (columns < 0).any():
            untraced = block[:, columns < 0]
            edges.rest[nodes], edges.rest_mass[nodes] = untraced.sum(axis=1), np.abs(untraced).sum(axis=1)
            block, columns = block[:, columns >= 0], columns[columns >= 0]
        for node, row in zip(nodes.tolist(), block, strict=True):
            set_row(edges.adjacency, node, columns, row)
    return edges
