"""Draws weights that hold for every prompt, and what features are in addition."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jclt.files import create_file
from jclt.shapes import Float, Int
from jclt.viewer.heat_map import SCALE
from jclt.viewer.picture_files import find_picture_type, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from jclt.evaluation import GlobalWeights, OperandGrids

SIDE = 1.5  # inches, of one grid
EACH = 8
"""Features of each shape that are drawn."""
LARGEST = 0.995
"""Colours go up to the value that this share of the entries is below."""


def draw_operand_grids(grids: "OperandGrids", path: str | Path, *, title: str = "") -> None:
    """One line for each shape, with the features of it whose activations are largest; the first operand upward, the
    second one sideways. The ending of the file's name is the file type."""
    from matplotlib.figure import Figure

    kind, counts = find_picture_type(Path(path)), grids.count_shapes()
    strength, drawn = grids.grids.max(axis=(1, 2)), [name for name, count in counts.items() if count]
    figure = Figure(figsize=(EACH * SIDE + 0.3, len(drawn) * (SIDE + 0.35) + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", parse_math=False)
    lines = np.asarray(figure.subplots(len(drawn), EACH, squeeze=False))
    for line, shape in zip(lines, drawn, strict=True):
        members = np.flatnonzero(np.array(grids.shapes) == shape)
        members = members[np.argsort(-strength[members], kind="stable")][:EACH]
        for place, axes in enumerate(line):
            axes.set_axis_off()
            if place < len(members):
                layer, number = grids.features[members[place]]
                axes.imshow(grids.grids[members[place]], origin="lower", cmap="Blues", vmin=0)
                name = f"{layer}/{number}"
                axes.set_title(f"{shape} ({counts[shape]}): {name}" if place == 0 else name, fontsize=8, loc="left")
    with create_file(Path(path)) as partial:
        save_figure(figure, partial, kind)


def draw_global_weights(weights: "GlobalWeights", path: str | Path, *, title: str = "") -> None:
    """The virtual weights and those weighted by use (TWERA) among the features, from low layers to high ones; and how
    the virtual weights are distributed, of pairs that are active together and of those that never are."""
    from matplotlib.figure import Figure

    kind = find_picture_type(Path(path))
    order = np.lexsort((weights.features[:, 1], weights.features[:, 0]))
    layers = weights.features[order, 0]
    figure = Figure(figsize=(15, 5), layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", parse_math=False)
    panels: Any = figure.subplots(1, 3)
    for axes, name, values in zip(panels, ("virtual weight", "TWERA"), (weights.virtual, weights.twera), strict=False):
        draw_matrix(axes, values[np.ix_(order, order)], layers, name)
    later = weights.features[:, None, 0] > weights.features[None, :, 0]
    virtual, used = weights.virtual[later], weights.together[later] > 0
    edges = np.linspace(virtual.min(), virtual.max() + 1e-9, 80)
    for pairs, label, colour in ((used, "active together", SCALE[-1]), (~used, "never together", SCALE[0])):
        panels[2].hist(virtual[pairs], edges, histtype="step", color=colour, label=f"{label} ({pairs.mean():.0%})")
    panels[2].set(yscale="log", xlabel="virtual weight", ylabel="pairs")
    panels[2].legend(fontsize=8, frameon=False)
    with create_file(Path(path)) as partial:
        save_figure(figure, partial, kind)


def draw_matrix(axes: "Axes", values: Float[np.ndarray, "m m"], layers: Int[np.ndarray, "m"], name: str) -> None:
    """Targets upward, sources sideways, with lines between layers."""
    from matplotlib.colors import LinearSegmentedColormap

    entries = np.abs(values[values != 0])
    reach = float(np.quantile(entries, LARGEST)) if len(entries) else 1.0
    colours = LinearSegmentedColormap.from_list("weights", SCALE)
    axes.imshow(values, origin="lower", cmap=colours, vmin=-reach, vmax=reach, interpolation="none")
    starts = np.flatnonzero(np.diff(layers, prepend=layers[:1] - 1))
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="#bbbbbb", linewidth=0.5)
        axes.axvline(start - 0.5, color="#bbbbbb", linewidth=0.5)
    middles = (starts + np.append(starts[1:], len(layers))) / 2 - 0.5
    labels = [f"layer {layers[start]}" for start in starts]
    axes.set_xticks(middles, labels, fontsize=8)
    axes.set_yticks(middles, labels, fontsize=8, rotation=90, va="center")
    axes.set(xlabel="source", ylabel="target")
    axes.set_title(f"{name}, colours up to ±{reach:.2g}", fontsize=9)
