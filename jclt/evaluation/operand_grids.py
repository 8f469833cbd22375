"""What a feature is in addition: its activation at `=` for every pair of operands, as a picture, with a label.

With G[a, b] the activation and "explained" the share of its variance:

    mostly active   active for at least 80% of the pairs
    bar             the mean over one operand explains at least 70%: a feature of the other operand alone
    diagonal        the mean over all pairs with the same sum explains at least 70%
    grid            a product f(a) g(b) has at least 70% of the square of G: a condition on a and one on b
    other           none of these

The first that fits counts.
"""

from typing import Literal, NamedTuple

import numpy as np

from jclt.coders import Coder
from jclt.errors import UserError
from jclt.models import Model, run
from jclt.shapes import Float, Int

Shape = Literal["mostly active", "bar", "diagonal", "grid", "other"]
OFTEN, EXPLAINED = 0.8, 0.7
LEAST = 10
"""Pairs on which a feature must be active."""
BATCH = 250


class OperandGrids(NamedTuple):
    features: Int[np.ndarray, "m 2"]  # layer, number
    grids: Float[np.ndarray, "m A B"]  # activations at the last token
    shapes: tuple[Shape, ...]

    def count_shapes(self) -> dict[str, int]:
        return {shape: self.shapes.count(shape) for shape in ("bar", "diagonal", "grid", "mostly active", "other")}


def measure_operand_grids(
    model: Model, coder: Coder, form: str = "calc: {a}+{b}=", operands: range = range(100)
) -> OperandGrids:
    """The features that are active at the last token of at least ten prompts."""
    pairs = [(a, b) for a in operands for b in operands]
    prompts = [model.encode(form.format(a=a, b=b)) for a, b in pairs]
    if len({len(prompt) for prompt in prompts}) > 1:
        raise UserError(f"form '{form}': prompts of different lengths, expected as many tokens for all operands")
    reads, covered = coder.config.reads, coder.config.covered
    active = np.zeros((len(pairs), len(covered), coder.config.features), np.float32)
    for start in range(0, len(pairs), BATCH):
        rows = np.resize(np.asarray(prompts[start : start + BATCH], np.int32), (BATCH, len(prompts[0])))
        _, seen = run(model, rows, capture=(reads,))
        for index, layer in enumerate(covered):
            encoded = np.asarray(coder.encode(index, seen[reads][layer][:, -1]))
            active[start : start + BATCH, index] = encoded[: len(pairs) - start]
    index, number = np.nonzero((active > 0).sum(axis=0) >= LEAST)
    grids = np.moveaxis(active[:, index, number], 1, 0).reshape(-1, len(operands), len(operands))
    features = np.stack([np.asarray(covered)[index], number], axis=1)
    return OperandGrids(features, grids, tuple(label_grid(grid) for grid in grids))


def label_grid(grid: Float[np.ndarray, "A B"]) -> Shape:
    """The first label of those at the head of this file that fits."""
    grid = grid.astype(np.float64)
    spread = float(np.square(grid - grid.mean()).sum())
    if (grid > 0).mean() >= OFTEN:
        return "mostly active"
    if spread == 0:
        return "other"
    a, b = (np.asarray(operand) for operand in np.indices(grid.shape))
    explained = [explain(grid, places) / spread for places in (a, b, a + b)]
    if max(explained[:2]) >= EXPLAINED:
        return "bar"
    if explained[2] >= EXPLAINED:
        return "diagonal"
    singular = np.linalg.svd(grid, compute_uv=False)
    return "grid" if singular[0] ** 2 >= EXPLAINED * np.sum(singular**2) else "other"


def explain(grid: Float[np.ndarray, "A B"], places: Int[np.ndarray, "A B"]) -> float:
    """The sum of squares, around the mean, of the means of the cells with the same place."""
    counts, sums = np.bincount(places.ravel()), np.bincount(places.ravel(), grid.ravel())
    means = sums / np.maximum(counts, 1)
    return float(counts @ np.square(means - grid.mean()))
