"""A graph as one still picture: tokens along the bottom, layers upward, outputs on top."""

import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jclt.errors import UserError
from jclt.files import new_file
from jclt.graphs.graph import Graph
from jclt.graphs.influence import normalize
from jclt.graphs.nodes import Kind
from jclt.shapes import Float, Int

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EDGES, LABELS, LETTERS, LONGEST = 500, 90, 26, 60  # more only blacken the picture; letters of a label, a token
RAISES, LOWERS, FEATURE, ERROR, INPUT = "#2a6fb0", "#d1602c", "#2b2b2b", "#a3a3a3", "#3f7d5c"
POINTS = 72  # in an inch
DOTS, LARGEST = 200, 60_000  # of a picture's side in an inch, and in all; what draws it ends at 65,536

# All places are in inches, from the picture's lower left.
LEFT, RIGHT, BOTTOM, TOP = 0.55, 0.2, 0.95, 1.25
SLOT, ROW = 0.17, 0.17  # from one node to the next in a cell, sideways and upward
GAP, EMPTY = 0.17, 0.13  # above each layer, for labels; of a layer without nodes
NARROWEST, WIDEST = 8.0, 22.0

Box = tuple[float, float, float, float]
"""Left, bottom, right, top."""


class _Plan(NamedTuple):
    """Where all is."""

    x: Float[np.ndarray, "N"]
    y: Float[np.ndarray, "N"]
    columns: Float[np.ndarray, "_"]  # where each position begins, and the last ends
    layers: Float[np.ndarray, "_"]  # where each layer begins, and the last ends
    slot: float


def draw_graph(
    graph: Graph,
    path: str | Path,
    *,
    labels: Mapping[tuple[int, int], str] | None = None,
    title: str | None = None,
) -> None:
    """Draws a graph into a file of the type that its name ends in: blue edges raise their target, orange lower it.

    Of very many edges only those are drawn over which most influence flows. Features that nothing names in `labels`
    go by the name that they have in a viewer's file, or by layer and number.
    """
    from matplotlib.figure import Figure

    path = Path(path)
    kind, known = path.suffix.removeprefix(".").lower() or "png", Figure().canvas.get_supported_filetypes()
    if kind not in known:
        raise UserError(f"{path}: cannot draw '{kind}', expected one of {', '.join(sorted(known))}")
    with new_file(path) as beside:
        write_picture(graph, beside, kind, labels=labels, title=title)


def write_picture(
    graph: Graph,
    path: Path,
    kind: str = "png",
    *,
    labels: Mapping[tuple[int, int], str] | None = None,
    title: str | None = None,
) -> None:
    """The picture itself, a file of this very name."""
    from matplotlib.figure import Figure

    influence = np.where(graph.nodes.is_of("output"), 0, graph.influence).astype(np.float64)
    plan = _plan(graph, influence)
    width, height = float(plan.columns[-1]) + RIGHT, float(plan.layers[-1]) + TOP
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    _draw_frame(axes, plan, title)
    _draw_tokens(axes, graph, plan)
    _draw_edges(axes, graph, influence, plan)
    dots = _draw_nodes(axes, graph, influence, plan)
    _draw_outputs(axes, graph, plan)
    _draw_labels(axes, _names(graph, labels or {}), influence, plan, dots)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")  # a script the font lacks is no failure
        figure.savefig(path, dpi=min(DOTS, LARGEST / max(figure.get_size_inches())), format=kind)


def _plan(graph: Graph, influence: Float[np.ndarray, "N"]) -> _Plan:
    """Each cell of a layer and a position is a block of rows, its strongest features in the upper ones."""
    nodes, layers, positions = graph.nodes, graph.nodes.layer, graph.nodes.position
    cells: dict[tuple[int, int], list[int]] = {}
    inside = nodes.of("feature", "error")
    for node in inside[np.lexsort((-influence[inside], nodes.is_of("error")[inside]))].tolist():
        cells.setdefault((int(layers[node]), int(positions[node])), []).append(node)
    across = int(np.clip(90 // max(len(graph.tokens), 1), 3, 9))
    widths = np.array([max(2.5, 0.45 * len(_shown(text)) + 1) for text in graph.token_texts])
    heights = np.full(graph.layers, EMPTY)
    for (layer, position), members in cells.items():
        widths[position] = max(widths[position], min(len(members), across) + 1.2)
        heights[layer] = max(heights[layer], GAP + ROW * -(-len(members) // across))
    slot = float(np.clip(widths.sum() * SLOT, NARROWEST, WIDEST) / max(widths.sum(), 1))
    columns = LEFT + slot * np.concatenate([[0.0], np.cumsum(widths)])
    floors = BOTTOM + np.concatenate([[0.0], np.cumsum(heights)])

    x, y = ((columns[1:] + columns[:-1]) / 2)[positions], np.full(len(graph), 0.72)
    for (layer, _), members in cells.items():
        top = floors[layer + 1] - GAP
        for row, start in enumerate(range(0, len(members), across)):
            line = members[start : start + across]
            x[line] += slot * (np.arange(len(line)) - (len(line) - 1) / 2)
            y[line] = top - ROW * row
    y[nodes.of("position")] = 0.5
    _place_outputs(graph, x, columns)
    y[nodes.of("output")] = floors[-1] + 0.3
    return _Plan(x, y, columns, floors, slot)


def _place_outputs(graph: Graph, x: Float[np.ndarray, "N"], columns: Float[np.ndarray, "_"]) -> None:
    """Side by side with room for their names, and as near to above their positions as that allows."""
    outputs = graph.nodes.of("output")
    in_order = outputs[np.argsort(graph.logit_positions, kind="stable")]
    longest = max((len(_shown(name)) for name in graph.logit_names), default=0)
    step = min(max(0.6, 0.085 * (longest + 3)), (columns[-1] - columns[0]) / max(len(outputs), 1))
    places = np.arange(len(outputs)) * step
    start = x[in_order].mean() - places.mean() if len(outputs) else 0.0
    x[in_order] = places + np.clip(start, columns[0] + step / 2, max(columns[-1] - step * (len(outputs) - 0.5), 0.0))


def _strongest(graph: Graph, influence: Float[np.ndarray, "N"]) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """Targets and sources of the edges over which most influence flows, the weakest first."""
    importance = normalize(graph.edges) * (influence + graph.output_weights)[:, None]
    targets, sources = np.nonzero(importance)
    order = np.argsort(importance[targets, sources], kind="stable")[-EDGES:]
    return targets[order], sources[order]


def _draw_edges(axes: "Axes", graph: Graph, influence: Float[np.ndarray, "N"], plan: _Plan) -> None:
    """A smooth line for each edge, the stronger the wider and darker."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgb

    targets, sources = _strongest(graph, influence)
    if not len(targets):
        return
    weights = graph.adjacency[targets, sources].astype(np.float64)
    # A few edges are many times stronger than the rest: the square root leaves the rest visible.
    strength = np.sqrt(np.minimum(np.abs(weights) / np.quantile(np.abs(weights), 0.98), 1))
    way = np.linspace(0, 1, 24)
    bent = way * way * (3 - 2 * way)  # leaves and arrives upright
    x, y = (at[sources, None] + (at[targets] - at[sources])[:, None] * w for at, w in ((plan.x, bent), (plan.y, way)))
    shades = np.where((weights > 0)[:, None], to_rgb(RAISES), to_rgb(LOWERS))
    opacity = np.clip(200 / len(weights), 0.5, 1) * (0.1 + 0.7 * strength**1.5)
    axes.add_collection(
        LineCollection(
            list(np.stack([x, y], axis=-1)),
            colors=np.concatenate([shades, opacity[:, None]], axis=1),
            linewidths=0.3 + 1.7 * strength,
            zorder=2,
        )
    )


def _draw_nodes(axes: "Axes", graph: Graph, influence: Float[np.ndarray, "N"], plan: _Plan) -> list[Box]:
    """Features as dots whose area grows with their influence, the rest all alike; returns where there are features."""
    features = graph.nodes.of("feature")
    widest = min(plan.slot * 0.95, ROW * 0.85) * POINTS
    share = influence[features] / max(influence[features].max(initial=0), 1e-30)
    diameters = widest * np.sqrt(0.1 + 0.9 * share)
    marks: tuple[tuple[Kind, Any, str, str], ...] = (
        ("feature", diameters**2, "o", FEATURE),
        ("error", min(3.2, widest / 2) ** 2, "D", ERROR),
        ("token", 16, "s", INPUT),
        ("position", 16, "s", INPUT),
        ("output", 30, "^", FEATURE),
    )
    for kind, size, marker, colour in marks:
        chosen = graph.nodes.of(kind)
        edge = {"edgecolors": "white", "linewidths": 0.4}
        axes.scatter(plan.x[chosen], plan.y[chosen], s=size, marker=marker, color=colour, zorder=4, **edge)
    half = diameters / POINTS / 2
    x, y = plan.x[features], plan.y[features]
    return list(zip(*((x - half).tolist(), (y - half).tolist(), (x + half).tolist(), (y + half).tolist()), strict=True))


def _draw_frame(axes: "Axes", plan: _Plan, title: str | None) -> None:
    """Columns of tokens, lines between layers, a key to the colours and marks, and the title."""
    from matplotlib.lines import Line2D

    left, right, top = plan.columns[0], plan.columns[-1], plan.layers[-1]
    for start, end in list(pairwise(plan.columns))[::2]:
        axes.fill_between([start, end], 0.08, top, color="#f6f6f3", linewidth=0, zorder=0)
    axes.hlines(plan.layers, left, right, color="#e2e2de", linewidth=0.4, zorder=1)
    small = {"ha": "right", "va": "center", "fontsize": 7, "color": "#666666"}
    for layer, (floor, ceiling) in enumerate(pairwise(plan.layers)):
        axes.text(left - 0.08, (floor + ceiling) / 2, str(layer), **small)
    axes.text(left - 0.08, 0.72, "input", **small)
    axes.text(left - 0.08, top + 0.3, "output", **small)
    keys = [
        Line2D([], [], color=RAISES, label="raises"),
        Line2D([], [], color=LOWERS, label="lowers"),
        Line2D([], [], color=FEATURE, marker="o", linestyle="", markersize=5, label="feature"),
        Line2D([], [], color=ERROR, marker="D", linestyle="", markersize=3.5, label="error"),
    ]
    # Above the last outputs, which stand at the right more often than not, and below the title.
    axes.legend(
        handles=keys,
        loc="upper left",
        bbox_to_anchor=(left, top + TOP - 0.38),
        bbox_transform=axes.transData,
        ncols=2,
        fontsize=7,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
    )
    if title is not None:
        place = {"ha": "left", "va": "top", "fontsize": 11}
        room = int((right - left) * POINTS / (11 * 0.6))
        axes.text(left, top + TOP - 0.1, _shown(title, most=room), parse_math=False, **place)


def _draw_tokens(axes: "Axes", graph: Graph, plan: _Plan) -> None:
    for text, (left, right) in zip(map(_shown, graph.token_texts), pairwise(plan.columns), strict=True):
        size = float(np.clip((right - left) * POINTS / max(len(text), 1) / 0.64, 3, 9))
        place = {"ha": "center", "va": "center", "fontsize": size}
        axes.text((left + right) / 2, 0.28 if len(graph.positions) else 0.45, text, parse_math=False, **place)


def _draw_outputs(axes: "Axes", graph: Graph, plan: _Plan) -> None:
    outputs = graph.nodes.of("output")
    room = float(plan.columns[-1] - plan.columns[0]) / max(len(outputs), 1)
    lists = (graph.logit_names, graph.logit_tokens.tolist(), graph.logit_probabilities.tolist())
    for name, token, probability, x, y in zip(*lists, plan.x[outputs].tolist(), plan.y[outputs].tolist(), strict=True):
        name = _shown(name, strip=False)
        size = float(np.clip(room * POINTS / (len(name) + 2) / 0.62, 3.5, 8))
        text = f"“{name}”\n{probability:.1%}" if token >= 0 else name  # only a token has a probability
        axes.text(x, y + 0.08, text, ha="center", va="bottom", fontsize=size, parse_math=False)


def _draw_labels(
    axes: "Axes", names: Sequence[str], influence: Float[np.ndarray, "N"], plan: _Plan, dots: Sequence[Box]
) -> None:
    """Names beside the strongest features, each where it hides no feature and no other name; else not at all."""
    from matplotlib.patheffects import withStroke

    taken, size, edge, end = list(dots), 6.5, float(plan.columns[0]) - 0.1, float(plan.columns[-1]) + RIGHT
    white = withStroke(linewidth=1.6, foreground="white")
    strongest: list[int] = np.argsort(-influence[: len(names)], kind="stable")[:LABELS].tolist()
    for node in strongest:
        name, (left, bottom, right, top) = names[node], dots[node]
        x, y = (left + right) / 2, (bottom + top) / 2
        width, height = (len(name) + 1) * size * 0.59 / POINTS, size * 1.05 / POINTS
        above, below, gap = top + 0.01 + height / 2, bottom - 0.01 - height / 2, 0.03 + width / 2
        tries = [(x + shift * width, level) for level in (above, below) for shift in (0, 0.3, -0.3, 0.5, -0.5)]
        tries[2:2] = [(right + gap, y), (left - gap, y)]
        for middle, level in tries:
            box = (middle - width / 2, level - height / 2, middle + width / 2, level + height / 2)
            if edge <= box[0] and box[2] <= end and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                place = {"ha": "center", "va": "center", "fontsize": size, "color": FEATURE}
                axes.text(middle, level, name, zorder=6, parse_math=False, path_effects=[white], **place)
                break


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _names(graph: Graph, labels: Mapping[tuple[int, int], str]) -> list[str]:
    """What each feature is called, cut to a length that fits beside it."""
    notes: Sequence[dict[str, Any]] = graph.annotations.get("nodes") or [{}] * len(graph)
    names = []
    for (layer, _, feature), note in zip(graph.features.tolist(), notes[: len(graph.features)], strict=True):
        name = str(labels.get((layer, feature)) or note.get("clerp") or f"{layer}/{feature}")
        names.append(_shown(name, most=LETTERS))
    return names


def _shown(text: str, strip: bool = True, most: int = LONGEST) -> str:
    """A text on one line, cut to so many letters, with what is not to be seen in it made visible."""
    text = text if len(text) <= most else text[: most - 1] + "…"
    shown = "".join(letter if letter.isprintable() else "·" for letter in text.replace("\n", "⏎").replace("\t", "→"))
    return (shown.strip() or "␣" * len(shown)) if strip else shown
