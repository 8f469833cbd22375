"""How well a label tells where its feature fires, on windows that did not make it.

    detection    does the feature fire in this window? The balanced accuracy of what the label says
    fuzzing      are these highlighted tokens those at which it fires? The same, on windows in which it fires
    simulation   the correlation of what the label says of each token with the activations, over all tokens

A label that says nothing gives 0.5, 0.5 and 0.
"""

from typing import NamedTuple

import numpy as np

from jclt.features.rules import balance_accuracy
from jclt.features.windows import Windows
from jclt.shapes import Bool, Int

HIGHLIGHT_SHARE = 0.3
"""Tokens are highlighted where the activation is at least this share of the window's highest."""


class Highlights(NamedTuple):
    """Windows in which the feature fires, each twice: with the right tokens highlighted, and with others."""

    window: Int[np.ndarray, "N"]  # its number
    marked: Bool[np.ndarray, "N W"]
    right: Bool[np.ndarray, "N"]


def draw_highlights(windows: Windows, seed: int = 0) -> Highlights:
    """The wrong tokens are drawn at random among those at which it does not fire, as many in each window as are right
    on average, rounded up."""
    firing = np.flatnonzero(windows.fires)
    a, valid = windows.activations[firing], windows.valid[firing]
    right = (a > 0) & (a >= HIGHLIGHT_SHARE * a.max(axis=1, keepdims=True, initial=0))
    count = int(np.ceil(right.sum(axis=1).mean())) if len(a) else 0
    order = np.where(valid & (a <= 0), np.random.default_rng(seed).random(a.shape), np.inf)
    wrong = (order.argsort(axis=1).argsort(axis=1) < count) & np.isfinite(order)
    some = np.flatnonzero(wrong.any(axis=1))
    marked = np.concatenate([right, wrong[some]])
    return Highlights(np.concatenate([firing, firing[some]]), marked, np.arange(len(marked)) < len(a))


def score_prediction(said: Bool[np.ndarray, "N W"], windows: Windows, seed: int = 0) -> dict[str, float]:
    """The scores of a label that says of each token whether the feature fires there."""
    highlights = draw_highlights(windows, seed)
    scores = {"detection": balance_accuracy(np.any(said, axis=1), windows.fires)}
    if not highlights.right.all():  # else it fires at every token, and there are no wrong ones
        share = (said[highlights.window] & highlights.marked).sum(axis=1) / highlights.marked.sum(axis=1)
        scores["fuzzing"] = balance_accuracy(share >= 0.5, highlights.right)
    scores["simulation"] = correlate(said[windows.valid].astype(float), windows.activations[windows.valid])
    return scores


def correlate(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation; 0 if one of them is constant."""
    a, b = a - a.mean(), b - b.mean(dtype=np.float64)
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale > 0 else 0.0
