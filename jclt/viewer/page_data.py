"""What the page shows of a graph, as one JSON object. `page/graph.js` reads it."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jclt.graphs.adjacency import compress
from jclt.graphs.export_nodes import make_node_ids
from jclt.graphs.graph import Graph
from jclt.graphs.names import LabelTexts
from jclt.graphs.nodes import KINDS
from jclt.graphs.viewer_json import Json, get_annotations
from jclt.shapes import Float

PROVENANCE = (
    "shown",
    "model",
    "coder",
    "prompt",
    "program",
    "version",
    "settings",
    "pruning_settings",
    "whole_graph_scores",
)
"""What the page says about how a graph was made."""


def build_page_data(
    graph: Graph,
    name: str,
    *,
    labels: LabelTexts | None = None,
    densities: Float[np.ndarray, "N"] | None = None,
    view: Mapping[str, Any] | None = None,
) -> Json:
    """All nodes and edges of the graph. Arrays are base64 texts of little-endian numbers. The edges are sorted by
    target; those into node n have the numbers `starts[n]` to `starts[n + 1]`.

    `labels` are those of the features, and `densities` the shares of tokens on which they are active; `view` is what a
    user pinned, grouped and renamed earlier.
    """
    edges = compress(graph.adjacency)
    nodes, ids = graph.nodes, make_node_ids(graph)
    is_single = graph.adjacency.dtype == np.float32
    return {
        "name": name,
        "tokens": list(graph.token_texts),
        "layers": graph.layers,
        "single": is_single,
        "pruned": is_pruned(graph),
        "ids": ids,
        "labels": list_labels(graph, labels or {}),
        "outputs": [
            {"text": text, "token": token, "probability": float(probability)}
            for text, token, probability in zip(
                graph.logit_names, graph.logit_tokens.tolist(), graph.logit_probabilities, strict=True
            )
        ],
        "kind": encode(np.searchsorted(np.array(sorted(KINDS)), nodes.kind), np.uint8),
        "kinds": sorted(KINDS),
        "layer": encode(nodes.layer, np.int32),
        "order": encode(nodes.order, np.int32),
        "position": encode(nodes.position, np.int32),
        "index": encode(nodes.index, np.float64),
        "value": encode(nodes.value, np.float64),
        "activation": encode(graph.activations, np.float64),
        "influence": encode(graph.influence, np.float64),
        "restMass": encode(graph.rest_mass, np.float64),
        "outputWeights": encode(graph.output_weights, np.float64),
        "starts": encode(edges.starts, np.int32),
        "sources": encode(edges.sources, np.int32),
        "weights": encode(edges.weights, np.float32 if is_single else np.float64),
        "density": None if densities is None else encode(densities, np.float64),
        "scores": graph.scores.both,
        "about": {key: graph.provenance[key] for key in PROVENANCE if key in graph.provenance},
        "view": read_first_view(graph, ids) | dict(view or {}),
    }


def is_pruned(graph: Graph) -> bool:
    """Whether the page shows all of the graph at first: it has been pruned, or is of published viewers."""
    settings = graph.provenance.get("pruning_settings")
    return isinstance(settings, dict) or graph.whole_shares is not None or "nodes" in graph.annotations


def list_labels(graph: Graph, labels: LabelTexts) -> list[str]:
    """A label for each feature, '' if it has none: from `labels`, the graph, or the file that it was read from."""
    saved = get_annotations(graph)
    texts = []
    for node, (layer, _, feature) in zip(graph.nodes.find("feature").tolist(), graph.features.tolist(), strict=True):
        in_graph = graph.labels[node] if graph.labels else ""
        text = labels.get((layer, feature)) or in_graph or saved[node].get("clerp") or ""
        texts.append(text if isinstance(text, str) else "")
    return texts


def read_first_view(graph: Graph, ids: Sequence[str]) -> Json:
    """Pinned nodes and groups of the file that the graph was read from, in the fields of a viewer's `qParams`."""
    saved = graph.annotations.get("qParams", {})
    pinned = saved.get("pinnedIds") or []
    pinned = pinned.split(",") if isinstance(pinned, str) else pinned
    known = set(ids)
    groups = [[name, *(ids[node] for node in members)] for name, members in graph.supernodes.items()]
    pinned = [text for text in pinned if isinstance(text, str) and text in known] if isinstance(pinned, list) else []
    pinned += [text for _, *members in groups for text in members]
    return {"pinnedIds": list(dict.fromkeys(pinned)), "supernodes": groups}


def encode(values: np.ndarray, dtype: type[np.number]) -> str:
    little_endian = np.dtype(dtype).newbyteorder("<")
    return base64.b64encode(np.ascontiguousarray(values, little_endian).tobytes()).decode()
