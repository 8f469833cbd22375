"""What patching measured: an array with named axes, beside the clean and the corrupted run."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from jclt.errors import UserError
from jclt.interventions.patching.metrics import Measures, Metric, check_metric, compute_metric, list_warnings
from jclt.interventions.patching.pairs import PromptPairs
from jclt.shapes import Float

Run = Literal["clean", "corrupted"]
SHOWN_PLACES = 10


@dataclass(frozen=True, eq=False, repr=False)
class PatchingResult:
    """The effect of each place of a grid on the next token."""

    axes: dict[str, tuple[str | int, ...]]  # names of the axes of `values`, with the labels of their entries
    metric: Metric
    method: str  # in words
    changed: Run  # which run the rows of the grid change
    pairs: PromptPairs
    measures: Measures  # of every row: [pairs, *axes]
    clean_measures: Measures  # [pairs]
    corrupted_measures: Measures | None  # [pairs]; None: the method has no corrupted run

    @cached_property
    def _computed(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        clean, corrupted = self.clean_measures, self.corrupted_measures
        of_runs = {"clean": clean, "corrupted": clean if corrupted is None else corrupted}
        runs = of_runs | {"rows": self.measures}
        return {name: compute_metric(self.metric, x, clean, of_runs["corrupted"]) for name, x in runs.items()}

    @property
    def values(self) -> Float[np.ndarray, "..."]:
        """The metric at every place, averaged over pairs; of `normalised`, the ratio of the averages."""
        return self._computed["rows"][1]

    @property
    def per_pair(self) -> Float[np.ndarray, "..."]:
        """The metric at every place for each pair, which is the first axis."""
        return self._computed["rows"][0]

    @property
    def clean(self) -> float:
        """The metric of the clean run."""
        return float(self._computed["clean"][1])

    @property
    def corrupted(self) -> float:
        """The metric of the corrupted run; NaN if the method has none."""
        return float(self._computed["corrupted"][1]) if self.corrupted_measures is not None else float("nan")

    @property
    def total_effect(self) -> float:
        """Clean minus corrupted."""
        return self.clean - self.corrupted

    @property
    def effects(self) -> Float[np.ndarray, "..."]:
        """How much each place moves the metric of the run that it changes: the indirect effect."""
        return self.values - (self.clean if self.changed == "clean" else self.corrupted)

    @property
    def warnings(self) -> tuple[str, ...]:
        return list_warnings(self.metric, self.pairs.names, self.clean_measures, self.corrupted_measures)

    def use_metric(self, metric: Metric) -> "PatchingResult":
        """The same passes by another metric."""
        check_metric(metric, self.pairs)
        if metric == "normalised" and self.corrupted_measures is None:
            raise UserError("metric 'normalised': the method has no corrupted run, expected another metric")
        return replace(self, metric=metric)

    def __repr__(self) -> str:
        sizes = ((len(labels), name) for name, labels in self.axes.items())
        shape = " x ".join(f"{size} {name}{'' if size == 1 else 's'}" for size, name in sizes)
        return f"<PatchingResult: {self.method}, {shape}, {self.metric} over {len(self.pairs)} pairs>"

    def summarize(self, shown: int = SHOWN_PLACES) -> str:
        """The places with the largest effects, as text."""
        corrupted = "" if self.corrupted_measures is None else f", corrupted {self.corrupted:.4g}"
        lines = [repr(self), f"clean {self.clean:.4g}{corrupted}", *self.warnings]
        order = np.argsort(-np.abs(self.effects), axis=None, kind="stable")[:shown]
        for place in zip(*np.unravel_index(order, self.values.shape), strict=True):
            at = zip(self.axes.items(), place, strict=True)
            labels = ", ".join(f"{name} {entries[i]}" for (name, entries), i in at)
            lines.append(f"  {self.values[place]:9.4f} ({self.effects[place]:+.4f})  {labels}")
        return "\n".join(lines)
