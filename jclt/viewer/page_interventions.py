"""Interventions that the page asks for."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jclt.attribution import attribute
from jclt.coders import Coder
from jclt.errors import UserError
from jclt.graphs import Graph
from jclt.graphs.export_nodes import make_node_ids
from jclt.graphs.viewer_json import Json
from jclt.interventions import Intervention, intervene, scale_nodes, swap_nodes
from jclt.models import Model, SiteEdit

OUTPUTS, FEATURES = 8, 12
"""How many the page shows."""


def find_changed_nodes(graph: Graph, request: Mapping[str, Any]) -> list[int]:
    """The nodes that a request names by id. It says either by which `factor` they are scaled or from which other
    `prompt` they are taken; an error if it does not."""
    number = {node_id: node for node, node_id in enumerate(make_node_ids(graph))}
    ids = request.get("nodes")
    if not isinstance(ids, list) or not ids or not all(isinstance(text, str) and text in number for text in ids):
        raise UserError("intervention: nodes are unknown, expected ids of this graph's nodes")
    members, prompt, factor = [number[text] for text in ids], request.get("prompt"), request.get("factor")
    kinds = {str(graph.nodes.kind[node]) for node in members}
    if prompt is not None:
        if not isinstance(prompt, str) or not prompt:
            raise UserError("intervention: the other prompt is empty, expected a text")
        if "feature" not in kinds:
            raise UserError("intervention: another prompt has other features, expected at least one among the nodes")
    elif not isinstance(factor, int | float) or not math.isfinite(factor):
        raise UserError("intervention: expected a number as factor, or a prompt")
    elif others := kinds - {"feature", "error"}:
        raise UserError(f"intervention: a node is of the kind {min(others)}, expected features and errors")
    return members


def change_nodes(
    model: Model, coder: Coder, graph: Graph, members: list[int], request: Mapping[str, Any]
) -> Intervention:
    """Runs the model with an edit of these nodes, which `find_changed_nodes` gave."""
    if request.get("prompt") is not None:
        edits = swap_with_prompt(model, coder, graph, members, request["prompt"])
    else:
        edits = scale_nodes(graph, members, float(request["factor"]))
    return intervene(
        model,
        coder,
        graph.tokens.tolist(),
        edits,
        graph=graph,
        reference="current",
        attention="free",
        norms="free",
    )


def swap_with_prompt(model: Model, coder: Coder, graph: Graph, members: list[int], prompt: str) -> list[SiteEdit]:
    """Edits that give the members' layers and places the features of another prompt, counted from its end."""
    other = attribute(model, coder, prompt)
    shift = len(other.tokens) - len(graph.tokens)
    features = [node for node in members if graph.nodes.kind[node] == "feature"]
    cells = {(int(graph.nodes.layer[node]), int(graph.nodes.position[node]) + shift) for node in features}
    there = [node for node, (layer, position, _) in enumerate(other.features.tolist()) if (layer, position) in cells]
    return swap_nodes(graph, features, other, there)


def describe_result(result: Intervention) -> Json:
    outputs, features = result.outputs, result.features
    likeliest = np.argsort(-np.maximum(outputs.probability_before, outputs.probability_after), kind="stable")[:OUTPUTS]
    strongest = np.argsort(-np.abs(features.after - features.before), kind="stable")[:FEATURES]
    number = finite_or_none
    return {
        "setting": result.setting,
        "kl": number(result.kl),
        "outputs": [
            {
                "text": outputs.names[i],
                "token": int(outputs.tokens[i]),
                "before": number(outputs.before[i]),
                "after": number(outputs.after[i]),
                "probability_before": number(outputs.probability_before[i]),
                "probability_after": number(outputs.probability_after[i]),
                "predicted": number(outputs.predicted[i]),
            }
            for i in likeliest.tolist()
        ],
        "features": [
            {
                "layer": int(features.layer[i]),
                "position": int(features.position[i]),
                "feature": int(features.feature[i]),
                "before": number(features.before[i]),
                "after": number(features.after[i]),
            }
            for i in strongest.tolist()
        ],
    }


def finite_or_none(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
