"""Checks of a graph that was read from a file."""

import numpy as np

from jclt.errors import UserError
from jclt.graphs.adjacency import split_all_rows
from jclt.graphs.graph import Graph
from jclt.graphs.names import name_of

MAX_LAYERS = 10_000

ROUNDING = 1e-3
"""By how much a probability or share may exceed 1."""


def check_layers(layers: int, where: object) -> None:
    if not 0 <= layers <= MAX_LAYERS:
        raise UserError(f"{where}: {layers} layers, expected 0 to {MAX_LAYERS}")


def check_graph(graph: Graph, where: object) -> None:
    """Raises an error unless all numbers are finite, all layers, positions and tokens are in range, and each edge leads
    into a higher layer, or higher in its own. The functions in `influence.py` and `paths.py` rely on this."""
    layers, length = graph.layers, len(graph.tokens)
    check_layers(layers, where)
    large = np.iinfo(np.int64).max
    is_token = graph.logit_tokens >= 0
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
        "heads, layer": (graph.heads[:, 0], 0, layers - 1),
        "heads, position": (graph.heads[:, 1], 0, length - 1),
        "heads, head": (graph.heads[:, 2], 0, large),
        "streams, layer": (graph.streams[:, 0], 1, layers - 1),
        "streams, position": (graph.streams[:, 1], 0, length - 1),
        "positions": (graph.positions, 0, length - 1),
        "logit_tokens": (graph.logit_tokens, -1, large),
        "logit_positions": (graph.logit_positions, 0, length - 1),
        "logit_probabilities": (graph.logit_probabilities, 0, np.inf),
        "logit_probabilities of tokens": (graph.logit_probabilities[is_token], 0, 1 + ROUNDING),
        "logit_weights": (graph.logit_weights, 0, np.inf),
        "whole_shares": (graph.whole_shares, 0, 1 + ROUNDING),
    }
    for name, (values, low, high) in limits.items():
        invalid = [] if values is None else values[~(np.isfinite(values) & (values >= low) & (values <= high))]
        if len(invalid):
            expected = "numbers" if low == -np.inf else f"at least {low}" if high in (np.inf, large) else None
            expected = expected or f"{low} to {round(high, 2)}"
            raise UserError(f"{where}: array '{name}' holds {invalid[0]}, expected {expected}")
    _check_annotations(graph, where)
    _check_edges(graph, where)


def _check_annotations(graph: Graph, where: object) -> None:
    nodes = graph.annotations.get("nodes")
    if nodes is not None and not (
        isinstance(nodes, list)
        and len(nodes) == len(graph)
        and all(isinstance(node, dict) and isinstance(node.get("node_id", ""), str) for node in nodes)
    ):
        raise UserError(f"{where}: annotations of nodes are damaged, expected an object for each of {len(graph)} nodes")
    for name in ("metadata", "qParams"):
        if not isinstance(graph.annotations.get(name, {}), dict):
            raise UserError(f"{where}: annotations of {name} are damaged, expected an object")


def _check_edges(graph: Graph, where: object) -> None:
    """Checks a few rows at a time, because the edges may fill half of the memory."""
    layers, order = graph.nodes.layer, graph.nodes.order
    for rows in split_all_rows(graph.adjacency):
        block = graph.adjacency[rows]
        for invalid, reason in (
            (~np.isfinite(block), "is not finite, expected a number"),
            ((block != 0) & (order >= order[rows, None]), ""),
        ):
            if invalid.any():
                row, source = np.argwhere(invalid)[0]
                target = rows[row]
                wrong_layers = f"leads from layer {layers[source]} to {layers[target]}, expected into a higher layer"
                names = f"{_name_node(graph, int(source))} -> {_name_node(graph, int(target))}"
                raise UserError(f"{where}: the edge {names} {reason or wrong_layers}")


def _name_node(graph: Graph, node: int) -> str:
    """The node's id in the file that it was read from; if it has none, its name in words."""
    annotations = graph.annotations.get("nodes")
    return str((annotations[node] if annotations else {}).get("node_id") or name_of(graph, node))
