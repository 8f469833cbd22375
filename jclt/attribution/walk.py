"""The walk from the outputs through rows of edges, whose visits are the influence of each source (`ranking.py`)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jclt.shapes import Float, Int


class Rows(NamedTuple):
    """Edges into some targets of one kind and layer, from the sources that can reach them."""

    order: int  # as in a graph's `NodeTable`
    targets: Int[np.ndarray, "r"]
    columns: Int[np.ndarray, "c"]
    edges: Float[np.ndarray, "r c"]

    @property
    def layer(self) -> int:
        return self.order // 3


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
