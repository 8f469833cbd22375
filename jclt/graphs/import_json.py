"""Reads a graph from the JSON file of a published viewer, of schema version 1 or older."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jclt.errors import UserError
from jclt.graphs.adjacency import LARGEST_ARRAY, Adjacency, place_edges, sum_rows
from jclt.graphs.check import check_graph
from jclt.graphs.graph import Graph
from jclt.graphs.import_nodes import FileNode, Links, read_links, to_float
from jclt.graphs.nodes import Kind, build_node_table
from jclt.graphs.viewer_json import (
    FEATURE_TYPES,
    FIELDS,
    Json,
    is_list_of_groups,
    name_groups,
    read_viewer_file,
    to_shortest_decimals,
)
from jclt.memory import check_memory
from jclt.shapes import Float, Int

MAX_TOKENS_WITHOUT_NODE = 4096
"""How many tokens may lack a node in the file, in addition to as many as the file has nodes. Each gets a row and a
column of the adjacency."""


def import_json(path: str | Path) -> Graph:
    """Reads a viewer's file, of schema version 1 or older. Fields with no place in a `Graph` become its `annotations`.

    If a feature and an error share an id in the file, the error gets another. A link into this id belongs to the
    feature. A link out of it belongs to the node that keeps the links of its target in the order of the nodes.
    """
    path = Path(path)
    content = _read_content(path)
    metadata, view = content["metadata"], content.get("qParams", {})
    nodes = [FileNode(path, fields, len(metadata["prompt_tokens"])) for fields in content["nodes"]]
    links = read_links(path, nodes, content["links"])
    by_kind = _sort_by_kind(path, nodes, len(metadata["prompt_tokens"]))
    numbers = {node.id: number for number, node in enumerate(by_kind.all) if node is not None}
    adjacency = _build_adjacency(path, nodes, links, numbers, len(by_kind.all))
    zeros = np.zeros(len(adjacency), adjacency.dtype)
    outputs, layers = by_kind.outputs, _count_layers(by_kind)
    graph = Graph(
        adjacency=adjacency,
        nodes=build_node_table(
            layers=layers,
            features=_to_rows([(node.layer, node.position, node.feature) for node in by_kind.features], 3),
            errors=_to_rows([(node.layer, node.position) for node in by_kind.errors], 2),
            tokens=np.array([-1 if node is None else node.feature for node in by_kind.tokens], np.int64),
            positions=np.array([node.position for node in by_kind.positions], np.int64),
            heads=_to_rows([(node.layer, node.position, node.feature) for node in by_kind.heads], 3),
            streams=_to_rows([(node.layer, node.position) for node in by_kind.streams], 2),
            logit_tokens=np.array([node.feature for node in outputs], np.int64),
            logit_positions=np.array([node.position for node in outputs], np.int64),
            values=sum_rows(adjacency).astype(adjacency.dtype),
        ),
        bias=zeros,
        rest=zeros,
        rest_mass=zeros,
        activations=_to_float32([node.parse_number("activation") for node in by_kind.features]),
        token_texts=tuple(metadata["prompt_tokens"]),
        logit_names=tuple(_parse_output_name(node.text) for node in outputs),
        logit_probabilities=_to_float32([node.parse_number("token_prob") for node in outputs]),
        labels=_read_labels(by_kind.all),
        logit_weights=_read_output_weights(path, metadata, len(outputs)),
        layers=layers,
        provenance=_read_provenance(metadata),
        supernodes=_read_supernodes(path, view.get("supernodes", []), numbers),
        annotations={key: value for key, value in content.items() if key not in FIELDS}
        | {"metadata": metadata, "qParams": view}
        | {"nodes": [{} if node is None else _list_fields(node) for node in by_kind.all]},
    )
    check_graph(graph, path)
    return graph


def _read_content(path: Path) -> Json:
    """The object in the file, with the parts that every graph needs."""
    content = read_viewer_file(path)
    for name in ("nodes", "links"):
        if not isinstance(content.get(name), list):
            raise UserError(f"{path}: no list of {name}, expected a graph with metadata, nodes and links")
    metadata = content.get("metadata")
    texts = metadata.get("prompt_tokens") if isinstance(metadata, dict) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{path}: metadata has no prompt_tokens, expected a list of texts")
    if not isinstance(content.get("qParams", {}), dict):
        raise UserError(f"{path}: qParams is no object, expected linkType, pinnedIds, supernodes")
    return content


class _NodesByKind(NamedTuple):
    features: list[FileNode]
    errors: list[FileNode]
    tokens: list[FileNode | None]  # one for each token of the prompt; None if the file has no node for it
    positions: list[FileNode]
    heads: list[FileNode]
    streams: list[FileNode]
    outputs: list[FileNode]

    @property
    def all(self) -> list[FileNode | None]:
        """In the order of a graph's nodes."""
        return [node for nodes in self for node in nodes]


def _sort_by_kind(path: Path, nodes: Sequence[FileNode], length: int) -> _NodesByKind:
    by_kind: dict[Kind, list[FileNode]] = {
        kind: sorted((node for node in nodes if node.kind == kind), key=lambda node: node.sort_key)
        for kind in FEATURE_TYPES
    }
    for kind in ("token", "position"):
        most_common = Counter(node.position for node in by_kind[kind]).most_common(1)
        for position, count in most_common:
            if count > 1:
                raise UserError(f"{path}: position {position} has {count} {kind} embeddings, expected one")
    tokens = {node.position: node for node in by_kind["token"]}
    return _NodesByKind(
        features=by_kind["feature"],
        errors=by_kind["error"],
        tokens=[tokens.get(position) for position in range(length)],
        positions=by_kind["position"],
        heads=by_kind["head"],
        streams=by_kind["stream"],
        outputs=by_kind["output"],
    )


def _count_layers(nodes: _NodesByKind) -> int:
    """The model's number of layers. In the file, outputs have this number plus 1 as their layer."""
    below = [node.layer + 1 for node in nodes.features + nodes.errors + nodes.heads + nodes.streams]
    return max([node.layer - 1 for node in nodes.outputs] + below, default=0)


def _build_adjacency(
    path: Path, nodes: Sequence[FileNode], links: Links, numbers: Mapping[str, int], size: int
) -> Adjacency:
    """`numbers` are the graph's node numbers by id, `size` is the number of nodes."""
    without_node = size - len(nodes)
    if without_node > MAX_TOKENS_WITHOUT_NODE + len(nodes):
        tokens = without_node + sum(node.kind == "token" for node in nodes)
        raise UserError(f"{path}: {without_node} of {tokens} prompt_tokens have no node, expected one for each")
    dtype = _choose_dtype(links.weights)
    need = min(size**2 * np.dtype(dtype).itemsize, LARGEST_ARRAY)
    check_memory(need, f"{path}: {size} nodes", "read it where there is more", host=True)
    order = np.array([numbers[node.id] for node in nodes], np.int64)
    return place_edges(order[links.targets], order[links.sources], links.weights.astype(dtype), size)


def _choose_dtype(weights: Float[np.ndarray, "n"]) -> type[np.floating]:
    """float32 if it keeps each weight, as an exact number or as the shortest decimal for a float32; else float64."""
    with np.errstate(over="ignore"):
        single = weights.astype(np.float32)
    differs = single.astype(np.float64) != weights
    if not np.isfinite(single).all() or (np.array(to_shortest_decimals(single[differs])) != weights[differs]).any():
        return np.float64
    return np.float32


def _read_output_weights(path: Path, metadata: Json, count: int) -> Float[np.ndarray, "k"] | None:
    weights = metadata.get("output_weights")
    if weights is None:
        return None
    if not isinstance(weights, list) or len(weights) != count or not all(type(x) in (int, float) for x in weights):
        raise UserError(f"{path}: metadata.output_weights is {str(weights)[:80]}, expected {count} numbers")
    return _to_float32([to_float(weight) for weight in weights])


def _read_provenance(metadata: Json) -> Json:
    """The model is named by `scan`, unless that says where features' files are."""
    model = "model" if "model" in metadata else "scan"
    names = {"model": model, "prompt": "prompt", "settings": "generation_settings"}
    return {name: metadata[viewer_name] for name, viewer_name in names.items() if viewer_name in metadata}


def _read_labels(nodes: Sequence[FileNode | None]) -> tuple[str, ...]:
    """What features mean. What viewers write beside other nodes names them only."""
    texts = [node.text if node is not None and node.kind == "feature" else "" for node in nodes]
    return tuple(texts) if any(texts) else ()


def _list_fields(node: FileNode) -> Json:
    """Without a feature's label, which the graph has."""
    fields = node.fields | {"node_id": node.id}
    return {name: x for name, x in fields.items() if name != "clerp"} if node.kind == "feature" else fields


def _read_supernodes(path: Path, groups: Any, numbers: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    if not is_list_of_groups(groups):
        raise UserError(f"{path}: qParams.supernodes is {str(groups)[:80]}, expected lists of a name and node ids")
    return name_groups(groups, numbers)


def _parse_output_name(text: str) -> str:
    quoted = re.match(r'Output "(.*)" \(p=', text, re.DOTALL)
    return quoted[1] if quoted else text


def _to_float32(numbers: Sequence[float]) -> Float[np.ndarray, "n"]:
    with np.errstate(over="ignore"):
        return np.array(numbers, np.float64).astype(np.float32)


def _to_rows(rows: Sequence[tuple[int, ...]], width: int) -> Int[np.ndarray, "n w"]:
    return np.array(rows, np.int64).reshape(-1, width)
