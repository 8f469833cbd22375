"""Blocks of targets (step 4): which targets go down through the layers together.

All targets of a block cost as much as the one that goes through the most layers, at the block's latest position; the
block's first layer costs little (`read_folded_layer_at`). So a prompt's targets are split by position into windows, and
sorted by layer within each. Where the windows end is chosen by dynamic programming, so that all blocks together cost
the least.
"""

from typing import NamedTuple

import numpy as np

from jclt.shapes import Int

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
    if not len(targets):
        return []
    stop_indices = np.searchsorted(stops, positions + 1)
    order = np.argsort(-steps, kind="stable")
    ends = np.unique(stop_indices) + 1 if len(targets) > size else [len(stops)]
    least: dict[int, tuple[float, list[Block]]] = {0: (0, [])}  # of all targets before the end of a window
    for end in ends:
        splits = list[tuple[float, list[Block]]]()
        for start, (before, blocks) in least.items():
            window = order[(stop_indices[order] >= start) & (stop_indices[order] < end)]
            firsts = np.arange(0, len(window), size)
            latest = np.maximum.reduceat(stop_indices[window], firsts)
            cost = (steps[window[firsts]] * (np.array(stops)[latest] * size + BLOCK_OVERHEAD)).sum()
            more = [
                Block(prompt, targets[window[i : i + size]], int(stop)) for i, stop in zip(firsts, latest, strict=True)
            ]
            splits.append((before + cost, blocks + more))
        least[int(end)] = min(splits, key=lambda split: split[0])
    return least[max(least)][1]
