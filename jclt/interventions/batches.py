"""Batches of rows: passes that each change one place of a kept pass, which run together from the first such place on.

Rows are put together by position, then sorted by layer. A batch begins at one of a few positions, and at the layer of
its first row: what lies before is not computed again (`resume.py`).
"""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from jclt.models import ModelConfig
from jclt.shapes import Int

BATCH_TOKENS = {"cpu": 1024, "gpu": 32768, "tpu": 32768}
"""Tokens of a batch on one device: enough for efficient products, few enough to skip many layers."""
BATCH_LOGITS = 2**26
"""The largest number of logits of a batch on one device."""
STARTING_POSITIONS = 4
"""The largest number of positions at which batches may start, evenly spaced. Each has a program of its own."""
WORTH_A_PROGRAM = 1e12
"""There is one more starting position for each of this number of operations: with fewer, compiling would take longer
than it saves."""
SIZES = 8
"""Batches have one of this many sizes, so that calls with a few more rows need no program of their own."""


def choose_starts(config: ModelConfig, rows: int, length: int) -> tuple[int, ...]:
    """The positions at which batches of all these rows may start."""
    weights = config.layers * config.width * (4 * config.width + 3 * config.mlp_width)
    count = min(STARTING_POSITIONS, 1 + int(2.0 * weights * rows * length / WORTH_A_PROGRAM))
    return tuple(np.unique(np.arange(count) * length // count).tolist())


def limit_rows(config: ModelConfig, length: int) -> int:
    """The largest number of rows of this length that run at once on a device."""
    tokens = BATCH_TOKENS.get(jax.default_backend(), 1024)
    return max(min(tokens // length, BATCH_LOGITS // config.vocabulary), 1)


def choose_size(rows: int, most: int, devices: int) -> int:
    """The number of rows of each batch: at most `most`, a multiple of the devices; few places are left over."""
    count = -(-rows // most)
    step = -(-most // (SIZES * devices)) * devices
    return min(-(-rows // (count * step)) * step, most)


def split_rows(
    first_positions: Int[np.ndarray, "R"],
    first_layers: Int[np.ndarray, "R"],
    starts: tuple[int, ...],
    most: Callable[[int], int],
    devices: int,
) -> Iterator[tuple[int, Int[np.ndarray, "n"]]]:
    """The start of each batch, and the numbers of its rows. The last batch of a start repeats rows to be full.

    `most` gives the largest number of rows of a batch that starts at a position."""
    bucket = np.searchsorted(starts, first_positions, side="right") - 1
    for number, start in enumerate(starts):
        rows = np.flatnonzero(bucket == number)
        if not len(rows):
            continue
        rows = rows[np.argsort(first_layers[rows], kind="stable")]
        size = choose_size(len(rows), most(start), devices)
        for first in range(0, len(rows), size):
            yield start, np.resize(rows[first : first + size], size)
