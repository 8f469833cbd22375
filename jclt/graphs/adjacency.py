"""The edges of a graph: an array, or for a large graph its rows without zeros.

Edges lead only into higher layers and into the same or later positions, and none leads into errors and embeddings. So
in a graph of many positions about four of five entries of the array are zero. `adjacency[rows]` is an array of these
rows in either form, so that what reads a few rows at a time is the same for both.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jclt.memory import check_memory
from jclt.shapes import DTypeLike, Float, Int

LARGEST_ARRAY = 1 << 30
"""The most bytes of an array of all edges: in float32 those of 16,384 nodes. A larger graph has `SparseRows`."""

BLOCK = 1 << 26
"""Bytes of edges to process at once. Scores and pruning need no second matrix of all edges."""


@dataclass(frozen=True, eq=False)
class SparseRows:
    """The edges of N nodes. Those into node n have the numbers `starts[n]` to `starts[n + 1]`, by rising source. An
    index is one of rows: `edges[rows]` is an array `[len(rows), N]`; `np.asarray(edges)` is that of all, if it fits in
    memory."""

    starts: Int[np.ndarray, "_"]  # [N + 1]
    sources: Int[np.ndarray, "e"]
    weights: np.ndarray  # [e]: numbers, or in a mask True

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), len(self)

    @property
    def dtype(self) -> np.dtype:
        return self.weights.dtype

    @property
    def itemsize(self) -> int:
        return self.weights.itemsize

    @property
    def nbytes(self) -> int:
        return self.starts.nbytes + self.sources.nbytes + self.weights.nbytes

    @property
    def targets(self) -> Int[np.ndarray, "e"]:
        """Of each edge."""
        return np.repeat(np.arange(len(self), dtype=self.sources.dtype), np.diff(self.starts))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, rows: Any) -> np.ndarray:
        numbers = np.arange(len(self))[rows]
        block = np.zeros((numbers.size, len(self)), self.dtype)
        for row, number in zip(block, numbers.ravel().tolist(), strict=True):
            edges = slice(self.starts[number], self.starts[number + 1])
            row[self.sources[edges]] = self.weights[edges]
        return block.reshape(*numbers.shape, len(self))

    def __matmul__(self, vector: np.ndarray) -> np.ndarray:
        return np.concatenate([self[rows] @ vector for rows in split_all_rows(self)] or [vector[:0]])

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        need = len(self) ** 2 * self.itemsize
        check_memory(need, f"graph: an array of the edges of its {len(self)} nodes", "prune it first", host=True)
        return self[:].astype(dtype or self.dtype, copy=False)


Adjacency = Float[np.ndarray, "N N"] | SparseRows


def is_large(size: int, itemsize: int) -> bool:
    """Whether the edges of so many nodes are kept without zeros."""
    return size * size * itemsize > LARGEST_ARRAY


def count_rows_per_block(width: int, itemsize: int) -> int:
    """How many rows of this width fit into `BLOCK` bytes; at least one."""
    return max(BLOCK // max(width * itemsize, 1), 1)


def split_rows(width: int, itemsize: int, rows: Int[np.ndarray, "r"]) -> Iterator[Int[np.ndarray, "_"]]:
    """Splits row numbers into blocks of at most `BLOCK` bytes."""
    size = count_rows_per_block(width, itemsize)
    return (rows[start : start + size] for start in range(0, len(rows), size))


def split_all_rows(adjacency: Adjacency) -> Iterator[Int[np.ndarray, "_"]]:
    return split_rows(len(adjacency), adjacency.itemsize, np.arange(len(adjacency)))


def stack_blocks(blocks: Iterable[np.ndarray], size: int, dtype: np.dtype, sparse: bool) -> np.ndarray | SparseRows:
    """The edges of so many nodes, or a mask of edges, from blocks of their rows, one after the other."""
    if sparse:
        return compress_blocks(blocks, size, dtype)
    adjacency, start = np.zeros((size, size), dtype), 0
    for block in blocks:
        adjacency[start : start + len(block)] = block
        start += len(block)
    return adjacency


def compress_blocks(blocks: Iterable[np.ndarray], size: int, dtype: np.dtype) -> SparseRows:
    """The same without zeros, however many they are."""
    counts, sources, weights = [np.zeros(1, np.int64)], [np.zeros(0, np.int32)], [np.zeros(0, dtype)]
    for block in blocks:
        rows, columns = np.nonzero(block)
        counts.append(np.bincount(rows, minlength=len(block)))
        sources.append(columns.astype(np.int32))
        weights.append(block[rows, columns])
    starts = np.cumsum(np.concatenate(counts))
    assert len(starts) == size + 1
    return SparseRows(starts, np.concatenate(sources), np.concatenate(weights))


def compress(adjacency: Adjacency) -> SparseRows:
    if isinstance(adjacency, SparseRows):
        return adjacency
    return compress_blocks((adjacency[rows] for rows in split_all_rows(adjacency)), len(adjacency), adjacency.dtype)


def place_edges(
    targets: Int[np.ndarray, "e"], sources: Int[np.ndarray, "e"], weights: np.ndarray, size: int
) -> Adjacency:
    """The edges of so many nodes from a list in any order; the last of those with the same ends counts."""
    if not is_large(size, weights.itemsize):
        adjacency = np.zeros((size, size), weights.dtype)
        adjacency[targets, sources] = weights
        return adjacency
    order = np.argsort(targets, kind="stable")
    ends = np.searchsorted(targets[order], np.arange(size + 1))

    def fill(rows: Int[np.ndarray, "r"]) -> np.ndarray:
        block, here = np.zeros((len(rows), size), weights.dtype), order[ends[rows[0]] : ends[rows[-1] + 1]]
        block[targets[here] - rows[0], sources[here]] = weights[here]
        return block

    return compress_blocks(map(fill, split_rows(size, weights.itemsize, np.arange(size))), size, weights.dtype)


def make_room(size: int, dtype: np.dtype, count: Callable[[], Int[np.ndarray, "N"]]) -> Adjacency:
    """No edges yet, and room for those that `set_row` adds: so many into each node that are not zero."""
    if not is_large(size, dtype.itemsize):
        return np.zeros((size, size), dtype)
    starts = np.concatenate([[0], np.cumsum(count())])
    return SparseRows(starts, np.zeros(starts[-1], np.int32), np.zeros(starts[-1], dtype))


def set_row(adjacency: Adjacency, row: int, columns: Int[np.ndarray, "c"], weights: np.ndarray) -> None:
    """Adds the edges into a node that has none yet, by rising source."""
    if isinstance(adjacency, np.ndarray):
        adjacency[row, columns] = weights
        return
    present, edges = np.flatnonzero(weights), slice(adjacency.starts[row], adjacency.starts[row + 1])
    adjacency.sources[edges], adjacency.weights[edges] = columns[present], weights[present]


def sum_rows(adjacency: Adjacency) -> Float[np.ndarray, "N"]:
    if isinstance(adjacency, np.ndarray):
        return adjacency.sum(axis=1, dtype=np.float64)
    return np.concatenate([adjacency[rows].sum(axis=1, dtype=np.float64) for rows in split_all_rows(adjacency)])


def count_edges(adjacency: Adjacency) -> int:
    return int(np.count_nonzero(adjacency if isinstance(adjacency, np.ndarray) else adjacency.weights))
