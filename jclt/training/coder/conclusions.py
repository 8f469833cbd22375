"""What is said of a run, while it goes on and at its end."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jclt.coders import CoderConfig, misread_by_circuit_tracer
from jclt.training.metrics import describe_evaluation, is_finite


def conclusions(coder: CoderConfig, trained_by: str, last: Mapping[str, dict[str, Any]]) -> list[str]:
    """What there is to say at the end of a run: of its last metrics, and of the coder that came out of it."""
    lines = []
    if evaluation := last.get("evaluation"):
        lines.append(describe_evaluation(evaluation))
    step = last.get("step", {})
    share, each = step.get("dead"), step.get("layers_l0")
    if is_finite(share) and share > MANY_DEAD:
        lines.append(f"{share:.0%} of the features are dead: fewer of them, or more steps, would do")
    if trained_by == "batchtopk" and each and all(map(is_finite, each)):
        starved = [layer for layer, own in zip(coder.covered, each, strict=True) if own < STARVED * np.mean(each)]
        if starved:
            lines.append(
                f"hardly a feature is active in layer {', '.join(map(str, starved))}: under batchtopk all layers share "
                "coder.k, which activation topk gives to each of them"
            )
    if misread := misread_by_circuit_tracer(coder):
        lines.append(f"circuit-tracer would read another coder out of these files: {misread}")
    return lines


MANY_DEAD = 0.5


STARVED = 0.02
"""The share of the mean number of active features below which a layer goes without."""


def describe(values: dict[str, Any]) -> str:
    skipped = f" skipped {values['skipped']}" if values["skipped"] else ""
    path = "" if "overflow" not in values else f" sparse, {values['overflow']:.0%} without room"
    dead = f"{values['dead']:.0%}" if is_finite(values["dead"]) else "-"  # not known before features could have fired
    return f"nmse {values['nmse']:.4f} L0 {values['l0']:.1f} dead {dead}{path}{skipped}"
