"""Draws what patching measured: one panel for each site, layers upward, the prompt's tokens sideways."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jclt.errors import UserError
from jclt.files import create_file
from jclt.shapes import Float
from jclt.viewer.picture_files import find_picture_type, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from jclt.interventions.patching.result import PatchingResult

CELL = 0.32  # inches, as all lengths
LEAST_SIDE, MOST_SIDE = 1.6, 40.0  # of a panel
LEFT_MARGIN, RIGHT_MARGIN, TOP_MARGIN, GAP = 0.75, 0.95, 0.45, 0.35
LINE_WIDTH = 16.0
"""Panels go to further lines beyond this width."""
MAX_NUMBERED_CELLS = 200
"""Cells of larger panels are too small for their number."""
MAX_LABEL = 18
SCALE, UNDEFINED = ("#b4501c", "#f2b48c", "#fbfbf9", "#8db8e0", "#1d5a99"), "#c8c8c8"


def write_heat_map(
    path: str | Path,
    panels: Float[np.ndarray, "n y x"],
    *,
    titles: Sequence[str],
    rows: Sequence[str | int],
    columns: Sequence[str | int],
    value_name: str = "",
    title: str = "",
    centre: float = 0.0,
) -> None:
    """Draws panels with one scale of colours: blue is above `centre`, orange is below it, NaN is grey. The first row is
    at the bottom. The ending of the file's name is the file type."""
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure

    path, panels = Path(path), np.asarray(panels, float)
    kind = find_picture_type(path)
    if panels.shape != (len(titles), len(rows), len(columns)):
        raise UserError(
            f"heat map: values {panels.shape}, expected {len(titles)} panels, {len(rows)} rows, {len(columns)} columns"
        )
    reach = float(np.nanmax(np.abs(panels - centre), initial=0.0)) or 1.0
    colours = LinearSegmentedColormap.from_list("effects", SCALE).with_extremes(bad=UNDEFINED)
    style: dict[str, Any] = {"cmap": colours, "norm": Normalize(centre - reach, centre + reach)}
    width, height = (min(max(LEAST_SIDE, CELL * n), MOST_SIDE) for n in (len(columns), len(rows)))
    below = 0.2 + 0.075 * min(MAX_LABEL, max(len(str(label)) for label in columns))  # for the labels of columns
    per_line = min(max(int((LINE_WIDTH - LEFT_MARGIN - RIGHT_MARGIN + GAP) / (width + GAP)), 1), len(titles))
    lines = -(-len(titles) // per_line)
    whole = (LEFT_MARGIN + per_line * (width + GAP) - GAP + RIGHT_MARGIN, TOP_MARGIN + lines * (height + below + GAP))
    figure = Figure(figsize=whole)
    image = None
    for number, (panel, name) in enumerate(zip(panels, titles, strict=True)):
        line, place = divmod(number, per_line)
        x, y = LEFT_MARGIN + place * (width + GAP), whole[1] - TOP_MARGIN - (line + 1) * (height + GAP) - line * below
        axes = figure.add_axes((x / whole[0], y / whole[1], width / whole[0], height / whole[1]))
        image = axes.imshow(panel, origin="lower", aspect="auto", **style)
        axes.set_title(name, fontsize=9)
        label_axes(axes, rows if place == 0 else (), columns, len(rows))
        if panel.size <= MAX_NUMBERED_CELLS:
            write_numbers(axes, panel, centre, reach)
    assert image is not None
    box = (whole[0] - RIGHT_MARGIN + 0.15, whole[1] - TOP_MARGIN - GAP - height, 0.12, height)
    bar = figure.add_axes((box[0] / whole[0], box[1] / whole[1], box[2] / whole[0], box[3] / whole[1]))
    figure.colorbar(image, cax=bar).ax.tick_params(labelsize=7)
    bar.set_title(value_name, fontsize=7, loc="left")
    figure.text(LEFT_MARGIN / whole[0], 1 - 0.1 / whole[1], title, va="top", fontsize=10, parse_math=False)
    with create_file(path) as partial:
        save_figure(figure, partial, kind)


def label_axes(axes: "Axes", rows: Sequence[str | int], columns: Sequence[str | int], count: int) -> None:
    """Labels columns with tokens and rows with layers; the latter only at the first panel of a line."""
    axes.set_xticks(range(len(columns)), [shorten_label(label) for label in columns], rotation=90, fontsize=7)
    axes.set_yticks(range(count), [str(row) for row in rows] or [""] * count, fontsize=7)
    axes.set_ylabel("layer" if rows else "", fontsize=8)
    axes.tick_params(length=2, color="#888888")
    for label in axes.get_xticklabels():
        label.set_parse_math(False)


def write_numbers(axes: "Axes", panel: Float[np.ndarray, "y x"], centre: float, reach: float) -> None:
    for (y, x), value in np.ndenumerate(panel):
        colour = "white" if abs(value - centre) > 0.55 * reach else "#333333"
        text = "" if np.isnan(value) else f"{value:.2f}".replace("-0.00", "0.00")
        axes.text(x, y, text, ha="center", va="center", fontsize=5.5, color=colour)


def shorten_label(label: str | int) -> str:
    text = "".join(letter if letter.isprintable() else "·" for letter in str(label).replace("\n", "⏎"))
    return text if len(text) <= MAX_LABEL else f"{text[: MAX_LABEL - 1]}…"


def draw_patching(result: "PatchingResult", path: str | Path, *, title: str | None = None) -> None:
    """Draws the values of a patching result over layers and positions (or edges): a panel for each site, or for each
    head of one site. A position with a star has other tokens in other prompts."""
    axes, values = dict(result.axes), result.values
    columns = next((name for name in ("position", "edge") if name in axes), None)
    if columns is None:
        raise UserError(f"picture: axes {', '.join(axes)}, expected layers and positions")
    if "head" in axes and len(axes["site"]) > 1:
        raise UserError(f"picture: {len(axes['site'])} sites with heads, expected one site, or `heads=False`")
    titles = [str(site) for site in axes["site"]]
    if "head" in axes:
        values = np.moveaxis(np.squeeze(values, axis=0), -1, 0)
        titles = [f"{site}, head {head}" for site in axes["site"] for head in axes["head"]]
    count = len(result.pairs)
    write_heat_map(
        path,
        values,
        titles=titles,
        rows=axes["layer"],
        columns=axes[columns],
        value_name=result.metric.replace("_", " "),
        title=title or f"{result.method}, {count} pair{'s' * (count > 1)}",
        centre=result.corrupted if result.changed == "corrupted" else result.clean,
    )
