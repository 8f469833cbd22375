"""The cut of a prompt: the layer where its sources and targets meet (`columns.py`), chosen by counting operations.

Carrying one target or source through a layer takes the same number of operations at each position that it reaches. In
its first layer it comes from one position, which takes few of them, so that layer is not counted. With a cut at layer
m, targets above it go down to m over the positions before them, and sources below it go up to m over the positions
after them. There each pair is one product of two vectors at each position that both reach.
"""

from typing import NamedTuple

import numpy as np

from jclt.models import ModelConfig
from jclt.shapes import Float

COLUMN_BYTES = {"cpu": 1 << 29, "gpu": 1 << 32, "tpu": 1 << 31}
"""The most bytes of columns that a device keeps for the prompts that are traced together."""
CUTS = 6
"""The cut is a multiple of so many parts of the layers, so that few programs are compiled."""
LEAST_SAVED, LEAST_OPERATIONS = 0.15, 3e10
"""A cut must save this share of the operations, and so many of them: its program takes seconds to compile."""


class Work(NamedTuple):
    """What is carried on one prompt; positions are counted from the first with sources."""

    features: Float[np.ndarray, "L T"]  # active in each layer
    traced: float  # the share of them that get incoming edges
    outputs: int
    writes_on: bool  # whether features write to later layers, too


def choose_cut(model: ModelConfig, work: Work, most_numbers: int) -> int:
    """The cut that takes the fewest operations, with columns of at most so many numbers; 0 for none."""
    length = work.features.shape[1]
    whole = count_operations(model, work, 0)
    best, least = 0, min(whole * (1 - LEAST_SAVED), whole - LEAST_OPERATIONS)
    if least <= 0:  # all edges take too few operations to save so many
        return 0
    step = -(-model.layers // CUTS)
    for cut in range(step, model.layers, step):
        columns = work.features[:cut].sum() + cut * length
        operations = count_operations(model, work, cut)
        if operations < least and columns * length * model.width <= most_numbers:
            best, least = cut, operations
    return best


def count_operations(model: ModelConfig, work: Work, cut: int) -> float:
    """The floating-point operations of all edges but those from embeddings."""
    layers, length = work.features.shape
    positions, numbers = np.arange(length), np.arange(layers)
    carry = 4 * model.width * (model.heads + model.key_heads) // 2 * model.head_size  # through one layer at a position
    targets = np.vstack([work.features * work.traced, np.zeros(length)])
    targets[layers, -1] = work.outputs
    above, floor = np.arange(cut, layers + 1), max(cut, 1)
    steps = np.maximum(above - floor, 0)
    pulled = (targets[cut:] * steps[:, None] * (positions + 1)).sum()
    sources = work.features + 1  # each layer has an error at each position
    pushed = (sources[:cut] * np.maximum(cut - 2 - np.arange(cut), 0)[:, None] * (length - positions)).sum()
    # Products: of gradients with all that is written in each layer that they pass, of columns with targets below the
    # cut, and of gradients with columns at the cut.
    written = np.cumsum(np.cumsum(work.features, axis=0) + 1 if work.writes_on else sources, axis=1)
    passed = (numbers >= cut) & (numbers < above[:, None])
    compared = (targets[cut:] * (passed @ written)).sum()
    before = np.cumsum(np.cumsum(sources[:cut], axis=0) - sources[:cut], axis=1)
    read = (work.features[:cut] * before).sum()
    met = (targets[cut:] * np.cumsum(np.cumsum(sources[:cut].sum(axis=0)))).sum()
    return float(carry * (pulled + pushed) + 2 * model.width * (compared + read + met))
