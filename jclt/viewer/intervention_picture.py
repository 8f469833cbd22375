"""Draws an intervention: what the graph predicted against what was measured, and the changed probabilities."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jclt.files import create_file
from jclt.interventions import Intervention
from jclt.viewer.picture_files import find_picture_type, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OF_FEATURES, AFTER, OF_OUTPUTS = "#2a6fb0", "#d1602c", "#3f7d5c"
BARS = 10


def draw_intervention(result: Intervention, path: str | Path, shares: Mapping[str, float] | None = None) -> None:
    """The ending of the file's name is the file type. With the `shares` of supernodes (`measure_shares`) there is a
    panel of them."""
    from matplotlib.figure import Figure

    path = Path(path)
    kind = find_picture_type(path)
    panels = 3 if shares else 2
    figure = Figure(figsize=(5.5 * panels, 4.6), layout="constrained")
    axes = figure.subplots(1, panels)
    draw_predictions(axes[0], result)
    draw_probabilities(axes[1], result)
    if shares:
        draw_shares(axes[2], shares)
    prompt = "".join(result.token_texts).replace("\n", "⏎").replace("$", r"\$")
    figure.suptitle(f"{prompt[-90:]}\n{result.setting}", fontsize=9)
    with create_file(path) as partial:
        save_figure(figure, partial, kind)


def draw_predictions(axes: "Axes", result: Intervention) -> None:
    """A point for each feature and output: the predicted change across, the measured change upward."""
    f, o = result.features, result.outputs
    known = ~np.isnan(f.preactivation_predicted) & ~f.edited
    x, y = (
        (f.preactivation_predicted - f.preactivation_before)[known],
        (f.preactivation_after - f.preactivation_before)[known],
    )
    axes.scatter(x, y, s=10, color=OF_FEATURES, alpha=0.6, label="features (pre-activation)", linewidths=0)
    known_outputs = ~np.isnan(o.predicted)
    u, v = (o.predicted - o.before)[known_outputs], (o.after - o.before)[known_outputs]
    axes.scatter(u, v, s=28, color=OF_OUTPUTS, marker="s", label="outputs (logit - mean)", linewidths=0)
    every = np.concatenate([x, y, u, v, [0.0]])
    low, high = float(every.min()), float(every.max())
    margin = 0.05 * (high - low or 1)
    axes.plot([low - margin, high + margin], [low - margin, high + margin], color="#999999", linewidth=0.8, zorder=0)
    axes.set_xlabel("change predicted by the graph")
    axes.set_ylabel("change measured")
    if len(x) + len(u):
        axes.legend(fontsize=8, frameon=False)
    else:
        axes.text(0.5, 0.5, "no prediction", ha="center", transform=axes.transAxes)


def draw_probabilities(axes: "Axes", result: Intervention) -> None:
    """The next tokens whose probability is largest, before or after."""
    o = result.outputs
    order = np.argsort(-np.maximum(o.probability_before, o.probability_after), kind="stable")[:BARS]
    rows = np.arange(len(order))
    axes.barh(rows - 0.2, o.probability_before[order], height=0.4, color="#bbbbbb", label="before")
    axes.barh(rows + 0.2, o.probability_after[order], height=0.4, color=AFTER, label="after")
    axes.set_yticks(rows, [repr(o.names[i])[1:-1].replace("$", r"\$") for i in order])
    axes.invert_yaxis()
    axes.set_xlabel("probability of the next token")
    axes.legend(fontsize=8, frameon=False)


def draw_shares(axes: "Axes", shares: Mapping[str, float]) -> None:
    """How active each supernode still is, as a share of the original."""
    rows, values = np.arange(len(shares)), np.array(list(shares.values()))
    axes.barh(rows, values, height=0.6, color=[AFTER if value < 0 else OF_FEATURES for value in values])
    for row, value in zip(rows, values, strict=True):
        axes.annotate(
            f"{value:.0%}", (max(value, 0), row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.axvline(1, color="#999999", linewidth=0.8, linestyle="--")
    axes.set_yticks(rows, [name[:26].replace("$", r"\$") for name in shares])
    axes.set_xlim(min(0, float(values.min())), max(1.15, float(values.max()) * 1.15))
    axes.invert_yaxis()
    axes.set_xlabel("activation of supernodes, share of the original")
