"""Describes a run in words: a line per step, and conclusions at its end."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jclt.coders import CoderConfig, misread_by_circuit_tracer
from jclt.training.metrics import describe_evaluation, is_finite

MANY_DEAD = 0.5
"""A larger share of dead features is reported."""
STARVED = 0.02
"""A layer with a smaller share of the mean number of active features is reported."""


def list_conclusions(coder: CoderConfig, last: Mapping[str, dict[str, Any]]) -> list[str]:
    """Conclusions at the end of a run, one per line, from its last metrics and its finished coder."""
    lines = []
    if evaluation := last.get("evaluation"):
        lines.append(describe_evaluation(evaluation))
    step = last.get("step", {})
    dead, layers_l0 = step.get("dead"), step.get("layers_l0")
    if is_finite(dead) and dead > MANY_DEAD:
        lines.append(f"{dead:.0%} of the features are dead: fewer of them, or more steps, would do")
    if layers_l0 and all(map(is_finite, layers_l0)):
        starved = [
            layer for layer, l0 in zip(coder.covered, layers_l0, strict=True) if l0 < STARVED * np.mean(layers_l0)
        ]
        if starved:
            lines.append(f"hardly a feature is active in layer {', '.join(map(str, starved))}")
    if misread := misread_by_circuit_tracer(coder):
        lines.append(f"circuit-tracer would read another coder out of these files: {misread}")
    return lines


def describe_step(values: dict[str, Any]) -> str:
    """A step's metrics in one short line."""
    skipped = f" skipped {values['skipped']}" if values["skipped"] else ""
    path = "" if "overflow" not in values else f" sparse, {values['overflow']:.0%} over capacity"
    dead = f"{values['dead']:.0%}" if is_finite(values["dead"]) else "-"  # unknown in the first steps
    return f"nmse {values['nmse']:.4f} L0 {values['l0']:.1f} dead {dead}{path}{skipped}"
