"""Blocks of targets (step 4): which targets go down through the layers together.

All targets of a block cost as much as the one that goes through the most layers, at the block's latest position; the
block's first layer costs little (`read_folded_layer_at`). So a prompt's targets are split by position into windows, and
sorted by layer within each; the number of windows is the one that costs least.
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

    prompt: int  # its number in the batch
    targets: Int[np.ndarray, "r"]
    stop_index: int  # in the program's `stops`: of the first one beyond all their positions


def split_targets(
    prompt: int,
    targets: Int[np.ndarray, "n"],
    steps: Int[np.ndarray, "n"],
    positions: Int[np.ndarray, "n"],
    stops: tuple[int, ...],
    size: int,
) -> list[Block]:
    """The targets of one prompt in blocks. Each goes through so many layers after its first one; positions are counted
    from the first with sources."""
    stop_indices = np.searchsorted(stops, positions + 1)
    best: list[Block] = []
    least = np.inf
    for windows in WINDOWS:
        window = stop_indices * windows // len(stops)
        order = np.lexsort((-steps, window))
        cuts = np.flatnonzero(np.diff(window[order])) + 1
        members = [inside[i : i + size] for inside in np.split(order, cuts) for i in range(0, len(inside), size)]
        blocks = [Block(prompt, targets[i], int(stop_indices[i].max())) for i in members]
        cost = sum(int(steps[i[0]]) * (stops[stop_indices[i].max()] * size + BLOCK_OVERHEAD) for i in members)
        if cost < least:
            best, least = blocks, cost
    return best
