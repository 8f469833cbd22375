"""Targets are split in the blocks that cost least: beside every way to cut the positions into windows."""

from itertools import combinations

import numpy as np
import pytest

from jclt.attribution.sweep.blocks import BLOCK_OVERHEAD, Block, split_targets

STOPS, SIZE = (2, 4, 6, 8), 8


def draw_targets(count: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(count)
    return random.integers(0, 6, count), random.integers(0, STOPS[-1], count)


def count_cost(blocks: list[Block], steps: np.ndarray) -> int:
    """Of blocks of targets 0, 1, 2, ...: each costs as much as its worst target, times the size."""
    return sum(int(steps[b.targets].max()) * (STOPS[b.stop_index] * SIZE + BLOCK_OVERHEAD) for b in blocks)


@pytest.mark.parametrize("count", [0, 3, 8, 9, 40, 150])
def test_each_target_is_in_one_block_that_reaches_its_position(count):
    steps, positions = draw_targets(count)
    blocks = split_targets(0, np.arange(count), steps, positions, STOPS, SIZE)
    members = np.concatenate([np.zeros(0, int), *(block.targets for block in blocks)])
    np.testing.assert_array_equal(np.sort(members), np.arange(count))
    for block in blocks:
        assert len(block.targets) <= SIZE and positions[block.targets].max() < STOPS[block.stop_index]
        assert (np.diff(steps[block.targets]) <= 0).all()  # from high layers to low


@pytest.mark.parametrize("count", [9, 40, 150])
def test_no_other_windows_cost_less(count):
    steps, positions = draw_targets(count)
    costs = []
    for inner in (c for n in range(len(STOPS)) for c in combinations(STOPS[:-1], n)):
        blocks = list[Block]()
        for start, end in zip((0, *inner), (*inner, STOPS[-1]), strict=True):
            inside = np.flatnonzero((positions >= start) & (positions < end))
            inside = inside[np.argsort(-steps[inside], kind="stable")]
            for first in range(0, len(inside), SIZE):
                some = inside[first : first + SIZE]
                blocks.append(Block(0, some, int(np.searchsorted(STOPS, positions[some].max() + 1))))
        costs.append(count_cost(blocks, steps))
    best = count_cost(split_targets(0, np.arange(count), steps, positions, STOPS, SIZE), steps)
    assert best == min(costs) < max(costs)
