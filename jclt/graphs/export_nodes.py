"""The nodes of a viewer's file, made from a graph."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from jclt.errors import UserError
from jclt.graphs.graph import Graph
from jclt.graphs.nodes import Kind
from jclt.graphs.viewer_json import FEATURE_TYPES, Json, get_annotations, to_shortest_decimals


def make_node_ids(graph: Graph) -> list[str]:
    """Each node's id: the id in the file that it was read from, or else the id that viewers expect. The id that they
    expect for an error may already be a feature's; this error gets another."""
    features = [f"{layer}_{feature}_{position}" for layer, position, feature in graph.features.tolist()]
    feature_ids = set(features)
    ids = [
        *features,
        *(
            f"{'err' if f'0_{layer}_{pos}' in feature_ids else '0'}_{layer}_{pos}"
            for layer, pos in graph.errors.tolist()
        ),
        *(f"E_{token}_{position}" for position, token in enumerate(graph.tokens.tolist())),
        *(f"P_{position}" for position in graph.positions.tolist()),
        *(f"H{layer}_{head}_{position}" for layer, position, head in graph.heads.tolist()),
        *(f"R{layer}_0_{position}" for layer, position in graph.streams.tolist()),
        *(f"{graph.layers + 1}_{token}_{position}" for token, position in _list_outputs(graph)),
    ]
    ids = [saved.get("node_id", node_id) for node_id, saved in zip(ids, get_annotations(graph), strict=True)]
    repeated = [node_id for node_id, count in Counter(ids).items() if count > 1]
    if repeated:
        raise UserError(f"graph: two nodes have the id '{repeated[0]}', expected each node and output once")
    return ids


def _list_outputs(graph: Graph) -> Iterator[tuple[int, int]]:
    """Token and position of each output. An output that is no single token gets a negative number that no other has."""
    for number, (token, position) in enumerate(
        zip(graph.logit_tokens.tolist(), graph.logit_positions.tolist(), strict=True)
    ):
        yield token if token >= 0 else -1 - number, position


def make_nodes(graph: Graph) -> list[Json]:
    """All nodes in the graph's order, still without ids and labels."""
    activations = to_shortest_decimals(graph.activations)
    nodes = [
        _make_node("feature", f"{layer}_{number}-0", layer, position, cantor(layer, number), activation=activation)
        for (layer, position, number), activation in zip(graph.features.tolist(), activations, strict=True)
    ]
    for layer, position in graph.errors.tolist():
        nodes.append(_make_node("error", f"{layer}_{position}-0", layer, position, -1))
    for position, token in enumerate(graph.tokens.tolist()):
        nodes.append(_make_node("token", f"E_{token}-{position}", "E", position, position))
    for position in graph.positions.tolist():
        name = f"Position {position}"
        nodes.append(_make_node("position", f"P_{position}-{position}", "E", position, position, clerp=name))
    for layer, position, head in graph.heads.tolist():
        js_id = f"H{layer}_{head}-{position}"
        nodes.append(_make_node("head", js_id, layer, position, -1, clerp=f"Head {layer}.{head}"))
    for layer, position in graph.streams.tolist():
        name = f"Residual stream {layer}"
        nodes.append(_make_node("stream", f"R{layer}-{position}", layer, position, -1, clerp=name))
    shares = to_shortest_decimals(graph.cumulative_shares.astype(np.float32))
    for node, share in zip(nodes, shares, strict=False):  # outputs have none
        node["influence"] = share
    return nodes + _make_outputs(graph)


def _make_outputs(graph: Graph) -> list[Json]:
    probabilities = to_shortest_decimals(graph.logit_probabilities)
    likeliest = int(np.argmax(probabilities)) if probabilities else -1
    nodes = []
    for number, (token, position) in enumerate(_list_outputs(graph)):
        # Viewers fail without "(p=", and read an empty number as 0.
        shown = f"{probabilities[number]:.3f}" if token >= 0 else ""
        node = _make_node("output", f"L_{token}-{position}", graph.layers + 1, position, token)
        node["clerp"] = f'Output "{graph.logit_names[number]}" (p={shown})'
        nodes.append(node | {"token_prob": probabilities[number], "is_target_logit": number == likeliest})
    return nodes


def _make_node(
    kind: Kind,
    js_id: str,
    layer: int | str,
    position: int,
    feature: int,
    *,
    activation: float | None = None,
    clerp: str = "",
) -> Json:
    return {
        "node_id": "",
        "feature": feature,
        "layer": str(layer),
        "ctx_idx": position,
        "feature_type": FEATURE_TYPES[kind],
        "token_prob": 0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": js_id,
        "clerp": clerp,
        "influence": None,
        "activation": activation,
    }


def cantor(layer: int, feature: int) -> int:
    """Cantor's pairing function, by which schema version 1 numbers the features of all layers."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature
