"""Windows of text on which labels are found and judged: some in which a feature fires, as many in which it does not.

Labels are found on the windows of every second row, and judged on those of the others.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jclt.coders import Coder
from jclt.errors import UserError
from jclt.features.block_events import BlockLister
from jclt.features.rows import DataRows, count_block_rows, iterate_blocks
from jclt.models import Model
from jclt.shapes import Bool, Float, Int

WINDOW_TOKENS, WINDOW_COUNT, LEAST_WINDOWS = 32, 50, 5
"""Tokens of a window; windows of each kind; with fewer nothing is said of a feature."""


class Windows(NamedTuple):
    """N windows of W tokens, and one token more on each side; -1 stands outside of the row."""

    tokens: Int[np.ndarray, "N W_2"]
    activations: Float[np.ndarray, "N W"]  # 0 where it does not fire
    valid: Bool[np.ndarray, "N W"]  # tokens that count
    start: Int[np.ndarray, "N"]  # the position of the first token in its row

    @property
    def fires(self) -> Bool[np.ndarray, "N"]:
        return np.any(self.activations > 0, axis=1)

    @property
    def enough(self) -> bool:
        return bool(min(self.fires.sum(), (~self.fires).sum()) >= LEAST_WINDOWS)


class WindowPair(NamedTuple):
    explaining: Windows
    held_out: Windows


class FiringPlaces(NamedTuple):
    """Where one feature fires in the rows read, sorted."""

    place: Int[np.ndarray, "E"]  # row * length + position
    value: Float[np.ndarray, "E"]


class ReadRows(NamedTuple):
    tokens: Int[np.ndarray, "n T"]
    valid: Bool[np.ndarray, "n T"]
    firing: Mapping[tuple[int, int], FiringPlaces]


def collect_windows(
    model: Model,
    coder: Coder,
    data: DataRows,
    places: Sequence[tuple[int, int]],
    *,
    share: float | None = None,
    count: int = WINDOW_COUNT,
    seed: int = 0,
) -> dict[tuple[int, int], WindowPair]:
    """The windows of these features, by layer and number."""
    for layer, feature in places:
        if coder.config.index(layer) is None or not 0 <= feature < coder.config.features:
            raise UserError(f"feature {layer}/{feature}: the coder has none, expected LAYER/FEATURE")
    read = read_firing(model, coder, data, places, share)
    return {place: cut_windows(read, read.firing[place], count, (seed, *place)) for place in places}


def read_firing(
    model: Model, coder: Coder, data: DataRows, places: Sequence[tuple[int, int]], share: float | None
) -> ReadRows:
    """Runs the model on all rows of the data, and keeps where these features fire."""
    first, length = coder.config.first_position, data.length
    lister = BlockLister(model, coder, length, min(count_block_rows(length), len(data.numbers)))
    wanted = {
        i: np.array([f for layer, f in places if layer == number]) for i, number in enumerate(coder.config.covered)
    }
    tokens, valid, done = [], [], 0
    found: dict[tuple[int, int], list[FiringPlaces]] = {place: [] for place in places}
    for block in iterate_blocks(data, first):
        if done == 0:
            lister.thresholds = [jnp.asarray(x) for x in lister.measure_thresholds(block, share)]
        block, events = lister.list_events(block, [index for index, features in wanted.items() if len(features)])
        for index, layer in enumerate(coder.config.covered):
            starts = np.searchsorted(events[index].feature, wanted[index])
            ends = np.searchsorted(events[index].feature, wanted[index], side="right")
            for feature, start, end in zip(wanted[index].tolist(), starts, ends, strict=True):
                of_feature = slice(start, end)
                place = events[index].place[of_feature] + done * length
                found[layer, feature].append(FiringPlaces(place, events[index].value[of_feature]))
        tokens.append(block.tokens)
        valid.append(block.valid)
        done += len(block.rows)
    firing = {
        place: FiringPlaces(*(np.concatenate(part) for part in zip(*parts, strict=True)))
        for place, parts in found.items()
    }
    return ReadRows(np.concatenate(tokens), np.concatenate(valid), firing)


def cut_windows(read: ReadRows, firing: FiringPlaces, count: int, seed: Sequence[int]) -> WindowPair:
    """Each window is around a token drawn at random: one at which the feature fires, or one of a window without any."""
    random, length = np.random.default_rng(seed), read.tokens.shape[1]
    halves = []
    for half in (0, 1):
        fired = firing.place[firing.place // length % 2 == half]
        fired = random.permutation(fired)[:count]
        counting = np.flatnonzero(read.valid)
        counting = counting[counting // length % 2 == half]
        others = random.choice(counting, min(8 * count, len(counting)), replace=False) if len(counting) else counting
        windows = _read_windows(read, firing, np.concatenate([fired, others]))
        silent = np.flatnonzero(~windows.fires[len(fired) :])[:count] + len(fired)
        kept = np.concatenate([np.arange(len(fired)), silent])
        halves.append(Windows(*(part[kept] for part in windows)))
    return WindowPair(*halves)


def _read_windows(read: ReadRows, firing: FiringPlaces, centres: Int[np.ndarray, "N"]) -> Windows:
    length = read.tokens.shape[1]
    size = min(WINDOW_TOKENS, length)
    row, position = np.divmod(centres, length)
    start = np.clip(position - size // 2, 0, length - size)
    inside = start[:, None] + np.arange(-1, size + 1)
    tokens = np.where((inside >= 0) & (inside < length), read.tokens[row[:, None], inside.clip(0, length - 1)], -1)
    places = (row * length + start)[:, None] + np.arange(size)
    at = np.searchsorted(firing.place, places).clip(max=max(0, len(firing.place) - 1))
    activations = np.zeros(places.shape, np.float32)
    if len(firing.place):
        activations = np.where(firing.place[at] == places, firing.value[at], 0)
    return Windows(tokens, activations, read.valid[row[:, None], inside[:, 1:-1]], start)
