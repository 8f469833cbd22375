"""Draws a graph as a picture: tokens at the bottom, layers upward, outputs at the top."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jclt.files import create_file
from jclt.graphs.graph import Graph
from jclt.graphs.influence import EdgeInfluence
from jclt.graphs.names import shorten_label
from jclt.graphs.nodes import Kind
from jclt.shapes import Float, Int
from jclt.viewer.label_places import Box, do_overlap, list_far_places, list_near_places
from jclt.viewer.picture_files import find_picture_type, save_figure
from jclt.viewer.picture_layout import RIGHT, ROW_HEIGHT, TOP, Layout, display_text, lay_out

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_EDGES, MAX_LABELS = 500, 90  # more would make the picture unreadable
MAX_LABEL_LETTERS = 26
RAISES, LOWERS, FEATURE, ERROR, INPUT, HEAD = "#2a6fb0", "#d1602c", "#2b2b2b", "#a3a3a3", "#3f7d5c", "#8a4fa3"
GROUPS = ("#c99a00", "#c2377e", "#1f9e9e", "#7a4a1e")
"""Colours of the first supernodes."""
POINTS_PER_INCH = 72


def draw_graph(graph: Graph, path: str | Path, *, title: str | None = None) -> None:
    """Draws a graph into a file; the ending of its name is the file type. Blue edges raise their target, orange edges
    lower it.

    At most `MAX_EDGES` edges are drawn, those with most influence. A feature without a label is named by its layer and
    number.
    """
    path = Path(path)
    kind = find_picture_type(path)
    with create_file(path) as partial:
        write_picture(graph, partial, kind, title=title)


def write_picture(graph: Graph, path: Path, kind: str = "png", *, title: str | None = None) -> None:
    """Writes the picture directly to this path, unlike `draw_graph`, which replaces a file only by a complete one."""
    save_figure(build_figure(graph, title), path, kind)


def build_figure(graph: Graph, title: str | None = None) -> "Figure":
    from matplotlib.figure import Figure

    influence = graph.influence.astype(np.float64)
    layout = lay_out(graph, influence)
    width, height = float(layout.columns[-1]) + RIGHT, float(layout.layers[-1]) + _find_top_margin(graph)
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    _draw_frame(axes, graph, layout, title)
    _draw_tokens(axes, graph, layout)
    _draw_edges(axes, graph, layout)
    dots = _draw_nodes(axes, graph, influence, layout)
    _draw_outputs(axes, graph, layout)
    _draw_labels(axes, _name_features(graph), influence, layout, dots)
    return figure


def _find_top_margin(graph: Graph) -> float:
    """With one more line for each supernode from the third to the last that has a colour."""
    return TOP + 0.15 * max(0, min(len(graph.supernodes), len(GROUPS)) - 2)


def _find_strongest_edges(graph: Graph) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Targets, sources and weights of the edges with most influence, the weakest first."""
    strongest, empty = np.zeros(0), np.zeros(0, np.int64)
    targets, sources, weights = empty, empty, np.zeros(0)
    for rows, influence in EdgeInfluence(graph.edges).compute_blocks():
        row, source = np.nonzero(influence)
        strongest = np.append(strongest, influence[row, source])
        order = np.argsort(strongest, kind="stable")[-MAX_EDGES:]
        strongest, weights = strongest[order], np.append(weights, graph.adjacency[rows][row, source])[order]
        targets, sources = np.append(targets, rows[row])[order], np.append(sources, source)[order]
    return targets, sources, weights


def _draw_edges(axes: "Axes", graph: Graph, layout: Layout) -> None:
    """Draws a curve for each edge. Stronger edges are wider and darker."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgb

    targets, sources, weights = _find_strongest_edges(graph)
    if not len(targets):
        return
    # A few edges are many times stronger than all others. With the square root the others stay visible.
    strength = np.sqrt(np.minimum(np.abs(weights) / np.quantile(np.abs(weights), 0.98), 1))
    rise = np.linspace(0, 1, 24)
    shift = rise * rise * (3 - 2 * rise)  # vertical at both ends
    x = layout.x[sources, None] + (layout.x[targets] - layout.x[sources])[:, None] * shift
    y = layout.y[sources, None] + (layout.y[targets] - layout.y[sources])[:, None] * rise
    colours = np.where((weights > 0)[:, None], to_rgb(RAISES), to_rgb(LOWERS))
    opacity = np.clip(200 / len(weights), 0.5, 1) * (0.1 + 0.7 * strength**1.5)
    axes.add_collection(
        LineCollection(
            list(np.stack([x, y], axis=-1)),
            colors=np.concatenate([colours, opacity[:, None]], axis=1),
            linewidths=0.3 + 1.7 * strength,
            zorder=2,
        )
    )


def _draw_nodes(axes: "Axes", graph: Graph, influence: Float[np.ndarray, "N"], layout: Layout) -> list[Box]:
    """Draws features as dots, larger for more influence, and all other nodes in one size per kind. Returns the boxes of
    the features, and then of the other nodes inside the layers."""
    features = graph.nodes.find("feature")
    widest = min(layout.slot * 0.95, ROW_HEIGHT * 0.85) * POINTS_PER_INCH
    share = influence[features] / max(influence[features].max(initial=0), 1e-30)
    diameters = widest * np.sqrt(0.1 + 0.9 * share)
    small = min(3.2, widest / 2)
    marks: tuple[tuple[Kind, Any, str, str], ...] = (
        ("feature", diameters, "o", FEATURE),
        ("error", small, "D", ERROR),
        ("token", 4.0, "s", INPUT),
        ("position", 4.0, "s", INPUT),
        ("head", 3.7, "^", HEAD),
        ("stream", 3.5, "s", HEAD),
        ("output", 5.5, "^", FEATURE),
    )
    boxes: list[Box] = []
    for kind, diameter, marker, colour in marks:
        chosen = graph.nodes.find(kind)
        x, y = layout.x[chosen], layout.y[chosen]
        edge = {"edgecolors": "white", "linewidths": 0.4}
        axes.scatter(x, y, s=diameter**2, marker=marker, color=colour, zorder=4, **edge)
        if kind in ("feature", "error", "head", "stream"):
            half = np.broadcast_to(diameter, x.shape) / POINTS_PER_INCH / 2
            boxes += map(tuple, np.stack([x - half, y - half, x + half, y + half], axis=-1).tolist())
    for colour, members in reversed([*zip(GROUPS, graph.supernodes.values(), strict=False)]):
        inside = np.isin(features, members)
        x, y = layout.x[features[inside]], layout.y[features[inside]]
        axes.scatter(x, y, s=diameters[inside] ** 2, color=colour, zorder=5, edgecolors="white")
    return boxes


def _draw_frame(axes: "Axes", graph: Graph, layout: Layout, title: str | None) -> None:
    """Draws the columns of tokens, the lines between layers, the legend and the title."""
    from matplotlib.lines import Line2D

    left, right, top = layout.columns[0], layout.columns[-1], layout.layers[-1]
    ceiling = float(top) + _find_top_margin(graph)
    for start, end in list(pairwise(layout.columns))[::2]:
        axes.fill_between([start, end], 0.08, top, color="#f6f6f3", linewidth=0, zorder=0)
    axes.hlines(layout.layers, left, right, color="#e2e2de", linewidth=0.4, zorder=1)
    small = {"ha": "right", "va": "center", "fontsize": 7, "color": "#666666"}
    for layer, (low, high) in enumerate(pairwise(layout.layers)):
        axes.text(left - 0.08, (low + high) / 2, str(layer), **small)
    axes.text(left - 0.08, 0.72, "input", **small)
    axes.text(left - 0.08, top + 0.3, "output", **small)
    legend = [
        Line2D([], [], color=RAISES, label="raises"),
        Line2D([], [], color=LOWERS, label="lowers"),
        Line2D([], [], color=FEATURE, marker="o", linestyle="", markersize=5, label="feature"),
        Line2D([], [], color=ERROR, marker="D", linestyle="", markersize=3.5, label="error"),
    ]
    others: tuple[tuple[Kind, str, str], ...] = (("head", "^", "head"), ("stream", "s", "residual stream"))
    legend += [
        Line2D([], [], color=HEAD, marker=marker, linestyle="", markersize=5, label=label)
        for kind, marker, label in others
        if graph.counts[kind]
    ]
    # On the left below the title, because most outputs are on the right.
    place: dict[str, Any] = {"loc": "upper left", "bbox_transform": axes.transData, "fontsize": 7}
    place |= {"frameon": False, "borderpad": 0, "borderaxespad": 0}
    kinds = axes.legend(handles=legend, ncols=2, bbox_to_anchor=(left, ceiling - 0.38), **place)
    if graph.supernodes:
        axes.add_artist(kinds)
        groups = [
            Line2D([], [], color=colour, marker="o", linestyle="", markersize=5, label=display_text(name))
            for colour, name in zip(GROUPS, graph.supernodes, strict=False)
        ]
        second = axes.legend(handles=groups, bbox_to_anchor=(left + 2.1, ceiling - 0.38), **place)
        for text in second.get_texts():
            text.set_parse_math(False)
    if title is not None:
        style = {"ha": "left", "va": "top", "fontsize": 11}
        letters = int((right - left) * POINTS_PER_INCH / (11 * 0.6))
        axes.text(left, ceiling - 0.1, display_text(title, most=letters), parse_math=False, **style)


def _draw_tokens(axes: "Axes", graph: Graph, layout: Layout) -> None:
    for text, (left, right) in zip(map(display_text, graph.token_texts), pairwise(layout.columns), strict=True):
        size = float(np.clip((right - left) * POINTS_PER_INCH / max(len(text), 1) / 0.64, 3, 9))
        style = {"ha": "center", "va": "center", "fontsize": size}
        axes.text((left + right) / 2, 0.28 if len(graph.positions) else 0.45, text, parse_math=False, **style)


def _draw_outputs(axes: "Axes", graph: Graph, layout: Layout) -> None:
    outputs = graph.nodes.find("output")
    width = float(layout.columns[-1] - layout.columns[0]) / max(len(outputs), 1)
    lists = (graph.logit_names, graph.logit_tokens.tolist(), graph.logit_probabilities.tolist())
    for name, token, probability, x, y in zip(
        *lists, layout.x[outputs].tolist(), layout.y[outputs].tolist(), strict=True
    ):
        name = display_text(name, strip=False)
        size = float(np.clip(width * POINTS_PER_INCH / (len(name) + 2) / 0.62, 3.5, 8))
        text = f"“{name}”\n{probability:.1%}" if token >= 0 else name  # only a token has a probability
        axes.text(x, y + 0.08, text, ha="center", va="bottom", fontsize=size, parse_math=False)


def _draw_labels(
    axes: "Axes", names: Sequence[str], influence: Float[np.ndarray, "N"], layout: Layout, marks: Sequence[Box]
) -> None:
    """Draws names beside the strongest features, or further off with a line to them. A name that would cover a mark or
    another name is left out. `marks` are the boxes of the features, and then of other nodes."""
    from matplotlib.patheffects import withStroke

    occupied, size = list(marks), 6.5
    left_limit, right_limit = float(layout.columns[0]) - 0.1, float(layout.columns[-1]) + RIGHT
    white = withStroke(linewidth=1.6, foreground="white")
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": size, "color": FEATURE}
    strongest: list[int] = np.argsort(-influence[: len(names)], kind="stable")[:MAX_LABELS].tolist()
    for node in strongest:
        left, bottom, right, top = marks[node]
        x, y = (left + right) / 2, (bottom + top) / 2
        width, height = (len(names[node]) + 1) * size * 0.59 / POINTS_PER_INCH, size * 1.05 / POINTS_PER_INCH
        row = (x - width / 2, bottom, x + width / 2, top)
        is_alone = sum(do_overlap(row, other) for other in marks[: len(names)]) == 1
        near = list_near_places(marks[node], width, height) if is_alone else []
        far = list_far_places(x, y, width, height)
        for number, (middle, level) in enumerate([*near, *far]):
            box = (middle - width / 2, level - height / 2, middle + width / 2, level + height / 2)
            inside = left_limit <= box[0] and box[2] <= right_limit and layout.layers[0] <= box[1]
            if inside and box[3] <= layout.layers[-1] and not any(do_overlap(box, other) for other in occupied):
                occupied.append(box)
                axes.text(middle, level, names[node], zorder=6, parse_math=False, path_effects=[white], **style)
                if number >= len(near):
                    axes.plot([x, box[0] if middle > x else box[2]], [y, level], color=FEATURE, linewidth=0.5, zorder=3)
                break


def _name_features(graph: Graph) -> list[str]:
    """The name of each feature, shortened to fit beside its dot."""
    labels = graph.labels or [""] * len(graph)
    return [
        display_text(shorten_label(label, MAX_LABEL_LETTERS) if label.strip() else f"{layer}/{feature}")
        for (layer, _, feature), label in zip(graph.features.tolist(), labels, strict=False)
    ]
