"""Labels of a graph's nodes, and the nodes in words."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from jclt.errors import UserError, escape_unprintable
from jclt.graphs.graph import Graph

LabelTexts = Mapping[tuple[int, int], str]
"""What features mean, by layer and number."""

SHOWN_LETTERS = 60
"""Longer labels are cut in the text of paths and tables."""


def label_nodes(graph: Graph, labels: LabelTexts) -> Graph:
    """A copy of the graph in which these features have these labels, and all other nodes none."""
    texts = [labels.get((layer, feature), "") for layer, _, feature in graph.features.tolist()]
    return replace(graph, labels=(*texts, *[""] * (len(graph) - len(texts))) if any(texts) else ())


def list_labels(graph: Graph) -> dict[tuple[int, int], str]:
    """The labels of the features that have one."""
    places = zip(graph.features.tolist(), graph.labels, strict=False)  # features are the first nodes
    return {(layer, feature): text for (layer, _, feature), text in places if text}


def name_feature(layer: int, feature: int, label: str | None = None) -> str:
    """`state = Colorado (1/390)`, or `layer 1 feature 390` without a label."""
    text = escape_unprintable(shorten_label(label or ""))
    return f"{text} ({layer}/{feature})" if text else f"layer {layer} feature {feature}"


def shorten_label(label: str, most: int = SHOWN_LETTERS) -> str:
    """The label on one line, its beginning if it is long."""
    line = " ".join(label.split())
    return line if len(line) <= most else f"{line[: most - 1].rstrip()}…"


def name_of(graph: Graph, node: int) -> str:
    """The node in words."""
    check_node(graph, node)
    nodes = graph.nodes
    kind, layer, position, index = (
        str(nodes.kind[node]),
        nodes.layer[node],
        int(nodes.position[node]),
        nodes.index[node],
    )
    match kind:
        case "feature":
            label = graph.labels[node] if graph.labels else ""
            return f"{name_feature(int(layer), int(index), label)} at {_describe_token(graph, position)}"
        case "error":
            return f"error of layer {layer} at {_describe_token(graph, position)}"
        case "token":
            return _describe_token(graph, position)
        case "position":
            return f"position {position}"
        case "head":
            return f"head {layer}.{index} at {_describe_token(graph, position)}"
        case "stream":
            return f"residual stream {layer} at {_describe_token(graph, position)}"
        case _:
            name = graph.logit_names[node - int(nodes.find("output")[0])]
            return escape_unprintable(name) if index < 0 else _quote(name, int(index))


def name_apart(names: Sequence[str]) -> list[str]:
    """The names, with numbers behind those that an earlier one is."""
    given: list[str] = []
    for name in names:
        candidates = (name if i == 1 else f"{name} ({i})" for i in range(1, len(names) + 1))
        given.append(next(candidate for candidate in candidates if candidate not in given))
    return given


def check_node(graph: Graph, node: int, where: str = "") -> None:
    if not 0 <= node < len(graph):
        raise UserError(f"{where}node {node}: expected a number from 0 to {len(graph) - 1}")


def _describe_token(graph: Graph, position: int) -> str:
    return f"{_quote(graph.token_texts[position], int(graph.tokens[position]))} ({position})"


def _quote(text: str, token: int) -> str:
    """The text in quotes with escapes, or the token's number if its text is unknown."""
    return escape_unprintable(json.dumps(text, ensure_ascii=False)) if text else f"token {token}"
