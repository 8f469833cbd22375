"""Where a picture of a graph has its nodes.

All coordinates and lengths are in inches; the origin is the picture's lower left corner.
"""

from typing import NamedTuple

import numpy as np

from jclt.graphs.graph import Graph
from jclt.shapes import Float

MAX_TEXT_LETTERS = 60
LEFT, RIGHT, BOTTOM, TOP = 0.55, 0.2, 0.95, 1.25  # margins
SLOT_WIDTH, ROW_HEIGHT = 0.17, 0.17  # distance between nodes in a cell, sideways and upward
LAYER_GAP, EMPTY_LAYER = 0.17, 0.13  # space for labels above each layer; height of a layer without nodes
MIN_WIDTH, MAX_WIDTH = 8.0, 22.0


class Layout(NamedTuple):
    """Coordinates of all nodes, columns and layers."""

    x: Float[np.ndarray, "N"]
    y: Float[np.ndarray, "N"]
    columns: Float[np.ndarray, "_"]  # left edge of each position's column, and right edge of the last
    layers: Float[np.ndarray, "_"]  # lower edge of each layer, and upper edge of the last
    slot: float  # distance between neighbouring nodes in a cell


def lay_out(graph: Graph, influence: Float[np.ndarray, "N"]) -> Layout:
    """Places each node. The nodes of one layer and position form a cell of several rows, the strongest features in the
    upper rows."""
    nodes, layers, positions = graph.nodes, graph.nodes.layer, graph.nodes.position
    cells: dict[tuple[int, int], list[int]] = {}
    inside = nodes.find("feature", "error", "head", "stream")
    for node in inside[np.lexsort((-influence[inside], nodes.is_kind("error")[inside]))].tolist():
        cells.setdefault((int(layers[node]), int(positions[node])), []).append(node)
    nodes_per_row = int(np.clip(90 // max(len(graph.tokens), 1), 3, 9))
    widths = np.array([max(2.5, 0.45 * len(display_text(text)) + 1) for text in graph.token_texts])
    heights = np.full(graph.layers, EMPTY_LAYER)
    for (layer, position), members in cells.items():
        widths[position] = max(widths[position], min(len(members), nodes_per_row) + 1.2)
        heights[layer] = max(heights[layer], LAYER_GAP + ROW_HEIGHT * -(-len(members) // nodes_per_row))
    slot = float(np.clip(widths.sum() * SLOT_WIDTH, MIN_WIDTH, MAX_WIDTH) / max(widths.sum(), 1))
    columns = LEFT + slot * np.concatenate([[0.0], np.cumsum(widths)])
    floors = BOTTOM + np.concatenate([[0.0], np.cumsum(heights)])

    x, y = ((columns[1:] + columns[:-1]) / 2)[positions], np.full(len(graph), 0.72)
    for (layer, _), members in cells.items():
        top = floors[layer + 1] - LAYER_GAP
        for row, start in enumerate(range(0, len(members), nodes_per_row)):
            row_nodes = members[start : start + nodes_per_row]
            x[row_nodes] += slot * (np.arange(len(row_nodes)) - (len(row_nodes) - 1) / 2)
            y[row_nodes] = top - ROW_HEIGHT * row
    y[nodes.find("position")] = 0.5
    _place_outputs(graph, x, columns)
    y[nodes.find("output")] = floors[-1] + 0.3
    return Layout(x=x, y=y, columns=columns, layers=floors, slot=slot)


def _place_outputs(graph: Graph, x: Float[np.ndarray, "N"], columns: Float[np.ndarray, "_"]) -> None:
    """Places outputs side by side with space for their names, as close to their positions as possible."""
    outputs = graph.nodes.find("output")
    in_order = outputs[np.argsort(graph.logit_positions, kind="stable")]
    longest = max((len(display_text(name)) for name in graph.logit_names), default=0)
    step = min(max(0.6, 0.085 * (longest + 3)), (columns[-1] - columns[0]) / max(len(outputs), 1))
    offsets = np.arange(len(outputs)) * step
    start = x[in_order].mean() - offsets.mean() if len(outputs) else 0.0
    x[in_order] = offsets + np.clip(start, columns[0] + step / 2, max(columns[-1] - step * (len(outputs) - 0.5), 0.0))


def display_text(text: str, strip: bool = True, most: int = MAX_TEXT_LETTERS) -> str:
    """The text on one line, shortened to `most` letters, with visible signs for spaces and unprintable letters."""
    text = text if len(text) <= most else text[: most - 1] + "…"
    shown = "".join(letter if letter.isprintable() else "·" for letter in text.replace("\n", "⏎").replace("\t", "→"))
    return (shown.strip() or "␣" * len(shown)) if strip else shown
