"""Any published viewer's file, of schema version 1 or older, as a graph."""

import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jclt.errors import UserError, first_line
from jclt.files import parse_object, read_bytes
from jclt.graphs.check import check_graph
from jclt.graphs.graph import Graph
from jclt.graphs.nodes import Kind, node_table
from jclt.graphs.viewer_json import FIELDS, TYPES, Json, are_groups, named_groups, shortest_decimals
from jclt.memory import check_memory
from jclt.shapes import Float, Int

UNPACKED, PARSED = 100, 10
"""How many times its size a gzipped graph may unpack to, where graphs do some ten times; and how many times a text's
size it may take as objects, where links take some six times."""


NODELESS = 4096
"""Tokens for which a file has no node, beyond as many as it has nodes: each is a row and a column of the graph's."""


def import_json(path: str | Path) -> Graph:
    """The graph in a viewer's file, of schema version 1 or older; what a `Graph` has no field for is annotated.

    Where a file gives a feature and an error one id, the error gets another. A link into that id is the feature's;
    one out of it belongs to the one that leaves the links of its target in the order of the nodes.
    """
    path = Path(path)
    content = _read_graph(path)
    metadata, view = content.get("metadata"), content.get("qParams", {})
    texts = metadata.get("prompt_tokens") if isinstance(metadata, dict) else None
    if (
        not isinstance(metadata, dict)
        or not isinstance(texts, list)
        or not all(isinstance(text, str) for text in texts)
    ):
        raise UserError(f"{path}: metadata has no prompt_tokens, expected a list of texts")
    if not isinstance(view, dict):
        raise UserError(f"{path}: qParams is no object, expected linkType, pinnedIds, supernodes")

    entries = [_Entry(path, node, len(texts)) for node in content["nodes"]]
    sources, targets, weights = _read_links(path, entries, content["links"])
    chosen: dict[Kind, list[_Entry]] = {
        kind: sorted((entry for entry in entries if entry.kind == kind), key=lambda entry: entry.order)
        for kind in TYPES
    }
    features, errors, outputs = chosen["feature"], chosen["error"], chosen["output"]
    tokens = {entry.position: entry for entry in chosen["token"]}
    for kind in ("token", "position"):
        twice = Counter(entry.position for entry in chosen[kind]).most_common(1)
        if twice and twice[0][1] > 1:
            raise UserError(f"{path}: position {twice[0][0]} has {twice[0][1]} {kind} embeddings, expected one")
    # Every token is a node of a graph, also where the file has none.
    in_order = [*features, *errors, *map(tokens.get, range(len(texts))), *chosen["position"], *outputs]
    number = {entry.id: place for place, entry in enumerate(in_order) if entry is not None}
    place_of = np.array([number[entry.id] for entry in entries], np.int64)

    nodeless = len(in_order) - len(entries)
    if nodeless > NODELESS + len(entries):
        raise UserError(f"{path}: {nodeless} of {len(texts)} prompt_tokens have no node, expected one for each")
    dtype = _weight_dtype(weights)
    need = len(in_order) ** 2 * np.dtype(dtype).itemsize
    check_memory(need, f"{path}: {len(in_order)} nodes", "read it where there is more", host=True)
    adjacency = np.zeros((len(in_order),) * 2, dtype)
    adjacency[place_of[targets], place_of[sources]] = weights
    nothing = np.zeros(len(in_order), dtype)
    supernodes = _read_supernodes(path, view.get("supernodes", []), number)
    graph = Graph(
        adjacency=adjacency,
        nodes=node_table(
            layers=max([e.layer - 1 for e in outputs] + [e.layer + 1 for e in features + errors], default=0),
            features=_array([(entry.layer, entry.position, entry.feature) for entry in features], 3),
            errors=_array([(entry.layer, entry.position) for entry in errors], 2),
            tokens=np.array([entry.feature if (entry := tokens.get(t)) else -1 for t in range(len(texts))], np.int64),
            positions=np.array([entry.position for entry in chosen["position"]], np.int64),
            logit_tokens=np.array([entry.feature for entry in outputs], np.int64),
            logit_positions=np.array([entry.position for entry in outputs], np.int64),
            values=adjacency.sum(axis=1, dtype=np.float64).astype(dtype),
        ),
        bias=nothing,
        rest=nothing,
        rest_mass=nothing,
        activations=_single([entry.number("activation") for entry in features]),
        token_texts=tuple(texts),
        logit_names=tuple(_output_name(entry.text) for entry in outputs),
        logit_probabilities=_single([entry.number("token_prob") for entry in outputs]),
        logit_weights=_output_weights(path, metadata, len(outputs)),
        layers=max([e.layer - 1 for e in outputs] + [e.layer + 1 for e in features + errors], default=0),
        provenance={
            ours: metadata[theirs]
            for ours, theirs in (("model", "scan"), ("prompt", "prompt"), ("settings", "generation_settings"))
            if theirs in metadata
        },
        supernodes=supernodes,
        annotations={key: value for key, value in content.items() if key not in FIELDS}
        | {"metadata": metadata, "qParams": view}
        | {"nodes": [{} if entry is None else entry.node | {"node_id": entry.id} for entry in in_order]},
    )
    check_graph(graph, path)
    return graph


class _Entry:
    """A node as a file has it, and what its fields mean."""

    def __init__(self, path: Path, node: Any, length: int):
        if not isinstance(node, dict) or not isinstance(node.get("node_id"), str):
            raise UserError(f"{path}: a node has no node_id, expected an object with one")
        self.path, self.node, self.id = path, node, node["node_id"]
        kinds: dict[Any, Kind] = {name: kind for kind, name in TYPES.items() if kind != "position"}
        kind = kinds.get(str(node.get("feature_type")))
        if kind is None:
            types = ", ".join(f"'{name}'" for name in kinds)
            found = repr(node.get("feature_type"))[:80]
            raise UserError(f"{path}: node '{self.id}' is of feature_type {found}, expected one of {types}")
        self.kind: Kind = "position" if kind == "token" and self.id.startswith("P_") else kind
        position = node.get("ctx_idx")
        if type(position) is not int or not 0 <= position < length:
            raise UserError(
                f"{path}: node '{self.id}' has ctx_idx {str(position)[:80]}, expected one of {length} positions"
            )
        self.position: int = position
        # The id says it in every version; the field `feature` means something else in each.
        parts = re.fullmatch(r"(E|\d{1,9})_(-?\d{1,18})_\d{1,18}", self.id)
        if kind == "feature" and (parts is None or parts[1] == "E" or int(parts[2]) < 0):
            raise UserError(f"{path}: node '{self.id}' is a feature, expected an id like layer_feature_position")
        self.feature = max(int(parts[2]), -1) if parts else -1
        self.layer = -1
        if kind == "feature" and parts is not None:
            self.layer = int(parts[1])
        elif kind in ("error", "output"):
            layer = str(node.get("layer"))
            if not re.fullmatch(r"\d{1,9}", layer, re.ASCII):
                raise UserError(f"{path}: node '{self.id}' has layer {node.get('layer')!r}, expected a number")
            self.layer = int(layer)

    @property
    def order(self) -> tuple[int, ...]:
        """Its place among its kind; outputs stay as they are."""
        return (0,) if self.kind == "output" else (self.layer, self.position, self.feature)

    @property
    def text(self) -> str:
        return str(self.node.get("clerp") or "")

    def number(self, name: str) -> float:
        value = self.node.get(name)
        if value is not None and type(value) not in (int, float):
            raise UserError(f"{self.path}: node '{self.id}' has {name} {str(value)[:80]!r}, expected a number")
        return _float(value or 0)


def _float(number: int | float) -> float:
    """Infinity for a whole number that is too large."""
    try:
        return float(number)
    except OverflowError:
        return np.inf


def _single(numbers: Sequence[float]) -> Float[np.ndarray, "n"]:
    with np.errstate(over="ignore"):
        return np.array(numbers, np.float64).astype(np.float32)


def _read(path: Path) -> Json:
    data = read_bytes(path, "a graph's JSON file")
    if data[:2] == b"\x1f\x8b":
        data = _unpacked(path, data)
    check_memory(PARSED * len(data), f"{path}: {len(data)} bytes of JSON", "read it where there is more", host=True)
    return parse_object(data, path)


def _unpacked(path: Path, data: bytes) -> bytes:
    most = UNPACKED * len(data) + 1_000_000
    try:
        with gzip.open(io.BytesIO(data)) as file:
            found = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not valid gzip ({first_line(error)})") from None
    if len(found) > most:
        raise UserError(f"{path}: unpacks to more than {most} bytes, expected at most {UNPACKED} times its size")
    return found


def _output_weights(path: Path, metadata: Json, count: int) -> Float[np.ndarray, "k"] | None:
    weights = metadata.get("output_weights")
    if weights is None:
        return None
    if not isinstance(weights, list) or len(weights) != count or not all(type(x) in (int, float) for x in weights):
        raise UserError(f"{path}: metadata.output_weights is {str(weights)[:80]}, expected {count} numbers")
    return _single([_float(weight) for weight in weights])


def _read_graph(path: Path) -> Json:
    content = _read(path)
    for name in ("nodes", "links"):
        if not isinstance(content.get(name), list):
            raise UserError(f"{path}: no list of {name}, expected a graph with metadata, nodes and links")
    return content


def _read_links(
    path: Path, entries: Sequence[_Entry], links: Sequence[Any]
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Sources and targets as places in the file's list of nodes, and the weights."""
    place = _tell_apart(path, entries)
    sources, targets, weights = [], [], []
    last: dict[int, int] = {}
    for link in links:
        try:
            source_id, target_id, weight = link["source"], link["target"], link["weight"]
        except (TypeError, KeyError, IndexError):
            raise UserError(f"{path}: a link is {str(link)[:80]}, expected source, target and weight") from None
        if not isinstance(source_id, str) or not isinstance(target_id, str):
            raise UserError(f"{path}: a link is {str(link)[:80]}, expected ids of nodes as source and target")
        if target_id not in place or source_id not in place:
            unknown = source_id if source_id not in place else target_id
            raise UserError(f"{path}: a link names the node '{unknown}', expected the id of one in its list")
        if type(weight) not in (int, float):
            value = str(weight)[:80]
            raise UserError(f"{path}: the link {source_id} -> {target_id} has weight {value}, expected a number")
        (source, *other), target = place[source_id], place[target_id][0]
        before = last.get(target, -1)
        if other:
            # circuit-tracer writes the links of each target in the order of its nodes, in which errors come after
            # features. In the one published file concerned this leaves no choice in any of 79 links: each place
            # fits just one of both nodes, and all that go to the error end in higher layers than it, as they must.
            source = source if before < source else other[0]
            if before >= source:
                raise UserError(
                    f"{path}: two nodes are '{source_id}' and the order of links does not tell which is which"
                )
        last[target] = source
        sources.append(source)
        targets.append(target)
        weights.append(_float(weight))
    found = np.array(weights, np.float64)
    if len(found) and not np.isfinite(found).all():
        worst = int(np.argmin(np.isfinite(found)))
        link, value = links[worst], weights[worst]
        raise UserError(f"{path}: the link {link['source']} -> {link['target']} has weight {value}, expected a number")
    pairs = np.array(targets, np.int64) * len(entries) + np.array(sources, np.int64)
    values, counts = np.unique(pairs, return_counts=True)
    if len(values) < len(pairs):
        target, source = divmod(int(values[np.argmax(counts)]), len(entries))
        raise UserError(f"{path}: the link {entries[source].id} -> {entries[target].id} is there twice, expected once")
    return np.array(sources, np.int64), np.array(targets, np.int64), found


def _tell_apart(path: Path, entries: Sequence[_Entry]) -> dict[str, list[int]]:
    """The places of the nodes of each id in the file; of a feature and an error with one id the error gets another."""
    places: dict[str, list[int]] = {}
    for place, entry in enumerate(entries):
        places.setdefault(entry.id, []).append(place)
    for node_id, shared in list(places.items()):
        if len(shared) > 1:
            if [entries[place].kind for place in shared] != ["feature", "error"]:
                raise UserError(f"{path}: {len(shared)} nodes are '{node_id}', expected one")
            error = entries[shared[1]]
            error.id = f"err_{error.layer}_{error.position}"
            if error.id in places:
                raise UserError(f"{path}: 2 nodes are '{node_id}', expected one")
            places[error.id] = shared[1:]
    return places


def _weight_dtype(weights: Float[np.ndarray, "n"]) -> type[np.floating]:
    """Single precision if that keeps each weight, be it written in full or as the shortest decimal for it."""
    with np.errstate(over="ignore"):
        single = weights.astype(np.float32)
    unlike = single.astype(np.float64) != weights
    if not np.isfinite(single).all() or (np.array(shortest_decimals(single[unlike])) != weights[unlike]).any():
        return np.float64
    return np.float32


def _read_supernodes(path: Path, groups: Any, number: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    if not are_groups(groups):
        raise UserError(f"{path}: qParams.supernodes is {str(groups)[:80]}, expected lists of a name and node ids")
    return named_groups(groups, number)


def _output_name(text: str) -> str:
    quoted = re.match(r'Output "(.*)" \(p=', text, re.DOTALL)
    return quoted[1] if quoted else text


def _array(rows: Sequence[tuple[int, ...]], width: int) -> Int[np.ndarray, "n w"]:
    return np.array(rows, np.int64).reshape(-1, width)
