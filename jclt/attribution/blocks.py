"""Blocks of targets (step 4): which targets go down through the layers together.

All targets of a part of a block cost as much as its highest one at the block's latest position. So a prompt's targets
are split by position into windows, and sorted by layer within each; the number of windows is the one that costs least.
"""

from typing import NamedTuple

import numpy as np

from jclt.shapes import Int

WINDOWS = (1, 2, 4, 8)
"""The numbers of windows of positions to choose from."""
BLOCK_OVERHEAD = 256
"""What a layer costs for each block beside its targets: as much as so many targets at one position."""


class Block(NamedTuple):
    """Targets of one prompt of a batch, from high layers to low."""

    row: int  # of the prompt
    targets: Int[np.ndarray, "r"]
    top: int  # the highest layer in which one of them reads
    stop: int  # which of the program's numbers of positions reaches all of them


class BlockShape(NamedTuple):
    """The sizes of a block."""

    parts: int
    size: int  # targets of a part


def split_targets(
    row: int,
    targets: Int[np.ndarray, "n"],
    layers: Int[np.ndarray, "n"],
    positions: Int[np.ndarray, "n"],
    stops: tuple[int, ...],
    shape: BlockShape,
) -> list[Block]:
    """The targets of one prompt in blocks; positions are counted from the first with sources."""
    window = np.searchsorted(stops, positions + 1)  # the first stop that reaches each target
    best: list[Block] = []
    least = np.inf
    whole = shape.parts * shape.size
    for windows in WINDOWS:
        group = window * windows // len(stops)
        order = np.lexsort((-layers, group))
        cuts = np.flatnonzero(np.diff(group[order])) + 1
        members = [part[i : i + whole] for part in np.split(order, cuts) for i in range(0, len(part), whole)]
        blocks = [Block(row, targets[part], int(layers[part].max()), int(window[part].max())) for part in members]
        cost = 0
        for block, part in zip(blocks, members, strict=True):
            levels = int(layers[part][:: shape.size].sum())  # of all parts together
            cost += levels * stops[block.stop] * shape.size + block.top * BLOCK_OVERHEAD
        if cost < least:
            best, least = blocks, cost
    return best
