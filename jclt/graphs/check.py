"""Whether what was read from a file can be a graph."""

import numpy as np

from jclt.errors import UserError
from jclt.graphs.graph import Graph
from jclt.graphs.influence import row_blocks
from jclt.graphs.paths import name_of

MOST_LAYERS = 10_000


SUMMED = 1e-3
"""By how much a probability or share may exceed 1 for rounding."""


def check_layers(layers: int, where: object) -> None:
    if not 0 <= layers <= MOST_LAYERS:
        raise UserError(f"{where}: {layers} layers, expected 0 to {MOST_LAYERS}")


def check_graph(graph: Graph, where: object) -> None:
    """An error of one line unless all numbers are finite, all places exist and each edge leads into a higher layer, on
    which everything that walks a graph relies."""
    layers, length = graph.layers, len(graph.tokens)
    check_layers(layers, where)
    large = np.iinfo(np.int64).max
    single = graph.logit_tokens >= 0
    limits = {
        "bias": (graph.bias, -np.inf, np.inf),
        "rest": (graph.rest, -np.inf, np.inf),
        "rest_mass": (graph.rest_mass, 0, np.inf),
        "values": (graph.values, -np.inf, np.inf),
        "activations": (graph.activations, -np.inf, np.inf),
        "features, layer": (graph.features[:, 0], 0, layers - 1),
        "features, position": (graph.features[:, 1], 0, length - 1),
        "features, feature": (graph.features[:, 2], 0, large),
        "errors, layer": (graph.errors[:, 0], 0, layers - 1),
        "errors, position": (graph.errors[:, 1], 0, length - 1),
        "tokens": (graph.tokens, -1, large),
        "positions": (graph.positions, 0, length - 1),
        "logit_tokens": (graph.logit_tokens, -1, large),
        "logit_positions": (graph.logit_positions, 0, length - 1),
        "logit_probabilities": (graph.logit_probabilities, 0, np.inf),
        "logit_probabilities of tokens": (graph.logit_probabilities[single], 0, 1 + SUMMED),
        "logit_weights": (graph.logit_weights, 0, np.inf),
        "whole_shares": (graph.whole_shares, 0, 1 + SUMMED),
    }
    for name, (values, low, high) in limits.items():
        wrong = [] if values is None else values[~(np.isfinite(values) & (values >= low) & (values <= high))]
        if len(wrong):
            expected = "numbers" if low == -np.inf else f"at least {low}" if high in (np.inf, large) else None
            expected = expected or f"{low} to {round(high, 2)}"
            raise UserError(f"{where}: array '{name}' holds {wrong[0]}, expected {expected}")
    notes = graph.annotations.get("nodes")
    if notes is not None and not (
        isinstance(notes, list)
        and len(notes) == len(graph)
        and all(isinstance(note, dict) and isinstance(note.get("node_id", ""), str) for note in notes)
    ):
        raise UserError(f"{where}: annotations of nodes are damaged, expected an object for each of {len(graph)} nodes")
    for name in ("metadata", "qParams"):
        if not isinstance(graph.annotations.get(name, {}), dict):
            raise UserError(f"{where}: annotations of {name} are damaged, expected an object")
    _check_edges(graph, where)


def _check_edges(graph: Graph, where: object) -> None:
    """A few rows at a time: edges may fill half of the memory."""
    layers = graph.nodes.layer
    for rows in row_blocks(len(graph), graph.adjacency.itemsize, np.arange(len(graph))):
        block = graph.adjacency[rows]
        for wrong, reason in (
            (~np.isfinite(block), "is not finite, expected a number"),
            ((block != 0) & (layers >= layers[rows, None]), ""),
        ):
            if wrong.any():
                place, source = np.argwhere(wrong)[0]
                target = rows[place]
                along = f"leads from layer {layers[source]} to {layers[target]}, expected into a higher layer"
                names = f"{node_name(graph, int(source))} -> {node_name(graph, int(target))}"
                raise UserError(f"{where}: the edge {names} {reason or along}")


def node_name(graph: Graph, node: int) -> str:
    """The node as the file that it came from calls it, or in words."""
    notes = graph.annotations.get("nodes")
    return str((notes[node] if notes else {}).get("node_id") or name_of(graph, node))
