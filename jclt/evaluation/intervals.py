"""Figures with bootstrap intervals over prompts, their controls, and tables of them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jclt.shapes import Float

DRAWS = 2000
"""Of prompts, with replacement."""


@dataclass(frozen=True)
class Figure:
    """A mean over prompts, or a ratio of sums, with the interval in which 95% of the bootstrap's draws lie."""

    value: float
    low: float
    high: float
    prompts: int
    control: float | None = None  # the same figure where nothing should be found
    paper: str = ""  # what the method paper has, with other models

    def __str__(self) -> str:
        digits = 3 if not abs(self.value) >= 10 else 1
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def average_prompts(
    values: Sequence[float] | np.ndarray,
    *,
    control: Sequence[float] | float | None = None,
    paper: str = "",
    seed: int = 0,
) -> Figure:
    """The mean over the prompts for which there is a value (no NaN)."""
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    return divide_sums(known, np.ones(len(known)), control=control, paper=paper, seed=seed)


def divide_sums(
    parts: Sequence[float] | np.ndarray,
    totals: Sequence[float] | np.ndarray,
    *,
    control: Sequence[float] | float | None = None,
    paper: str = "",
    seed: int = 0,
) -> Figure:
    """The sum of the parts over that of the totals; NaN where the totals are 0."""
    parts, totals = np.asarray(parts, np.float64), np.asarray(totals, np.float64)
    drawn = np.random.default_rng(seed).integers(len(parts), size=(DRAWS, len(parts))) if len(parts) else None
    ratios = np.full(1, np.nan) if drawn is None else _divide_known(parts[drawn].sum(axis=1), totals[drawn].sum(axis=1))
    known = ratios[~np.isnan(ratios)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
    value = float(_divide_known(parts.sum(keepdims=True), totals.sum(keepdims=True))[0])
    with_control = None if control is None else float(np.nanmean(control))
    return Figure(value, float(low), float(high), len(parts), with_control, paper)


def _divide_known(parts: Float[np.ndarray, "n"], totals: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    return np.where(totals != 0, parts, np.nan) / np.where(totals != 0, totals, 1)


def rank(values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Ranks from 0; equal values have the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[place]


def correlate(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]) -> float:
    """Pearson's correlation; NaN where there is none."""
    x, y = (np.asarray(v, np.float64) - np.mean(v, dtype=np.float64) for v in (x, y))
    lengths = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / lengths) if len(x) > 2 and lengths > 0 else float("nan")


def correlate_ranks(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]) -> float:
    """Spearman's correlation."""
    return correlate(rank(x), rank(y)) if len(x) > 2 else float("nan")


def tabulate(title: str, tables: Mapping[str, Mapping[str, Figure]]) -> str:
    """A line for each figure: of each coder its mean and interval, of the first the control, and the paper's figure."""
    first = next(iter(tables.values()))
    width = max(len(name) for name in (title, *first))
    heads = [label if len(tables) > 1 else "mean [95% interval]" for label in tables]
    lines = [f"{title:{width}}" + "".join(f"{head[-24:]:>26}" for head in heads) + f"{'control':>10}  paper"]
    for name, figure in first.items():
        control = "-" if figure.control is None else f"{figure.control:.3f}"
        values = "".join(f"{table[name]!s:>26}" for table in tables.values())
        lines.append(f"{name:{width}}{values}{control:>10}  {figure.paper or '-'}")
    return "\n".join(lines)


def summarize_figures(figures: Mapping[str, Figure]) -> dict[str, dict[str, Any]]:
    """For a JSON file: NaN and what is absent are left out."""
    return {
        name: {key: value for key, value in asdict(figure).items() if value not in (None, "") and value == value}
        for name, figure in figures.items()
    }
