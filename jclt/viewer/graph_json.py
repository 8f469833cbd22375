"""The JSON that published graph viewers read: a graph written in schema version 1, and any such file read back."""

import gzip
import io
import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, overload

import numpy as np

from jclt.attribution.files import check_graph, plain
from jclt.attribution.graph import Graph, Kind
from jclt.attribution.influence import scores, whole_shares
from jclt.errors import UserError, first_line
from jclt.files import parse_object, read_bytes, write_bytes
from jclt.memory import check_memory
from jclt.shapes import Float, Int

log = logging.getLogger(__name__)

Json = dict[str, Any]
Labels = Mapping[tuple[int, int], str]
"""What a feature is called, by its layer and number."""

INDEX = "graph-metadata.json"
TYPES: dict[Kind, str] = {
    "feature": "cross layer transcoder",  # the viewers know no other name, also for transcoders of one layer
    "error": "mlp reconstruction error",
    "token": "embedding",
    "position": "embedding",
    "output": "logit",
}
FIELDS = ("metadata", "qParams", "nodes", "links")
UNPACKED, PARSED = 100, 10
"""How many times its size a gzipped graph may unpack to, where graphs do some ten times; and how many times a text's
size it may take as objects, where links take some six times."""
SLUG = 40
"""Letters of a graph's name, or a few more."""
NODELESS = 4096
"""Tokens for which a file has no node, beyond as many as it has nodes: each is a row and a column of the graph's."""


@overload
def export_json(
    graph: Graph,
    path: None = None,
    *,
    slug: str | None = None,
    title: str | None = None,
    labels: Labels | None = None,
) -> Json: ...


@overload
def export_json(
    graph: Graph, path: str | Path, *, slug: str | None = None, title: str | None = None, labels: Labels | None = None
) -> None: ...


def export_json(
    graph: Graph,
    path: str | Path | None = None,
    *,
    slug: str | None = None,
    title: str | None = None,
    labels: Labels | None = None,
) -> Json | None:
    """Writes the graph as published viewers read it, with gzip if the name ends in .gz; without a path, returns it.

    What `graph.annotations` says takes the place of what is made here, and `slug`, `title` and `labels` of both. A
    node's influence is its share in the whole graph, so that viewers, which show what lies within `node_threshold`,
    show all that pruning kept, and less where the user asks for less.
    """
    if path is None:
        return _content(graph, slug, title, labels or {}, slug_of(graph))
    path = Path(path)
    write_bytes(path, encoded(_content(graph, slug, title, labels or {}, path.name.split(".json")[0]), path))
    return None


def _content(graph: Graph, slug: str | None, title: str | None, labels: Labels, default_slug: str) -> Json:
    saved, ids = graph.annotations, _node_ids(graph)
    nodes = [node | note for node, note in zip(_nodes(graph), _notes(graph), strict=True)]
    for node, node_id, name in zip(nodes, ids, _feature_labels(graph, labels), strict=True):
        node |= {"node_id": node_id} if name is None else {"node_id": node_id, "clerp": name}
    _show_kept(graph, nodes)
    content: Json = {
        "metadata": _metadata(graph, slug, title, default_slug),
        "qParams": _view(graph, ids),
        **{key: value for key, value in saved.items() if key not in FIELDS},
        "nodes": [node for node, absent in zip(nodes, _absent(graph), strict=True) if not absent],
    }
    return plain(content, "graph") | {"links": _links(graph.adjacency, ids)}


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
        bias=nothing,
        rest=nothing,
        rest_mass=nothing,
        values=adjacency.sum(axis=1, dtype=np.float64).astype(dtype),
        features=_array([(entry.layer, entry.position, entry.feature) for entry in features], 3),
        activations=_single([entry.number("activation") for entry in features]),
        errors=_array([(entry.layer, entry.position) for entry in errors], 2),
        tokens=np.array([entry.feature if (entry := tokens.get(t)) else -1 for t in range(len(texts))], np.int64),
        token_texts=tuple(texts),
        positions=np.array([entry.position for entry in chosen["position"]], np.int64),
        logit_tokens=np.array([entry.feature for entry in outputs], np.int64),
        logit_names=tuple(_output_name(entry.text) for entry in outputs),
        logit_positions=np.array([entry.position for entry in outputs], np.int64),
        logit_probabilities=_single([entry.number("token_prob") for entry in outputs]),
        logit_weights=_output_weights(path, metadata, len(outputs)),
        # Outputs are published two layers above the last.
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


def write_index(folder: str | Path) -> None:
    """Writes `graph-metadata.json`, the list of the graphs in a folder that the published viewers choose from.

    They look for a graph in the file of its slug, so the index gives each the name of its file. Files that are no
    graphs are left out, with a warning where they are no JSON objects either.
    """
    folder, graphs = Path(folder), []
    for path in sorted(folder.glob("*.json")):
        if path.name == INDEX:
            continue
        try:
            content = _read(path)
        except UserError as error:
            log.warning("left out of %s: %s", INDEX, error)
            continue
        metadata = content.get("metadata")
        if isinstance(metadata, dict) and {"nodes", "links"} <= set(content):
            graphs.append(metadata | {"slug": path.stem})
    write_bytes(folder / INDEX, encoded({"graphs": graphs}, folder / INDEX))


def slug_of(graph: Graph) -> str:
    """A name for the graph's files and for viewers: the first words of its prompt, without tokens like <bos>."""
    prompt = "".join(text for text in graph.token_texts if not re.fullmatch(r"<.*>", text))
    words, slug = re.findall(r"[a-z0-9]+", prompt.lower()), ""
    for word in words:
        if slug and len(slug) + len(word) > SLUG:
            break
        slug = f"{slug}-{word}" if slug else word[:SLUG]
    return slug or "graph"


def encoded(content: Json, path: Path) -> bytes:
    """The JSON file's bytes, gzipped if its name says so."""
    try:
        text = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    except ValueError as error:
        raise UserError(f"{path}: not written, a number is not finite ({error})") from None
    return gzip.compress(text, 6, mtime=0) if path.suffix == ".gz" else text


# Writing.


def cantor(layer: int, feature: int) -> int:
    """One number for a layer and a feature, as the dashboards of schema version 1 are numbered."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def _node_ids(graph: Graph) -> list[str]:
    """Each node's id: the one it came with, or the one the viewers expect, which for an error may be a feature's."""
    features = [f"{layer}_{feature}_{position}" for layer, position, feature in graph.features.tolist()]
    taken = set(features)
    ids = [
        *features,
        *(f"{'err' if f'0_{layer}_{pos}' in taken else '0'}_{layer}_{pos}" for layer, pos in graph.errors.tolist()),
        *(f"E_{token}_{position}" for position, token in enumerate(graph.tokens.tolist())),
        *(f"P_{position}" for position in graph.positions.tolist()),
        *(f"{graph.layers + 1}_{token}_{position}" for token, position in _outputs(graph)),
    ]
    ids = [note.get("node_id", node_id) for node_id, note in zip(ids, _notes(graph), strict=True)]
    repeated = [node_id for node_id, count in Counter(ids).items() if count > 1]
    if repeated:
        raise UserError(f"graph: two nodes have the id '{repeated[0]}', expected each node and output once")
    return ids


def _outputs(graph: Graph) -> Iterator[tuple[int, int]]:
    """Token and position of each output; one that is no token gets a number below zero of its own."""
    for place, (token, position) in enumerate(
        zip(graph.logit_tokens.tolist(), graph.logit_positions.tolist(), strict=True)
    ):
        yield token if token >= 0 else -1 - place, position


def _notes(graph: Graph) -> list[Json]:
    return graph.annotations.get("nodes") or [{}] * len(graph)


def _absent(graph: Graph) -> list[bool]:
    """Tokens that the file from which this graph came has no node for."""
    of_token = dict(zip(graph.nodes("token").tolist(), graph.tokens.tolist(), strict=True))
    return [not note and of_token.get(node, 0) < 0 for node, note in enumerate(_notes(graph))]


def _feature_labels(graph: Graph, labels: Labels) -> list[str | None]:
    given = [labels.get((layer, feature)) for layer, _, feature in graph.features.tolist()]
    return given + [None] * (len(graph) - len(given))


def _nodes(graph: Graph) -> Iterator[Json]:
    """Every node without its id and any label, in the graph's order."""
    shares = iter(_plain(whole_shares(graph).astype(np.float32)))

    for (layer, position, feature), activation in zip(graph.features.tolist(), _plain(graph.activations), strict=True):
        js_id, number = f"{layer}_{feature}-0", cantor(layer, feature)
        yield _node("feature", js_id, layer, position, number, next(shares), activation=activation)
    for layer, position in graph.errors.tolist():
        yield _node("error", f"{layer}_{position}-0", layer, position, -1, next(shares))
    for position, token in enumerate(graph.tokens.tolist()):
        yield _node("token", f"E_{token}-{position}", "E", position, position, next(shares))
    for position in graph.positions.tolist():
        clerp = f"Position {position}"
        yield _node("position", f"P_{position}-{position}", "E", position, position, next(shares), clerp=clerp)
    probabilities = _plain(graph.logit_probabilities)
    for place, (token, position) in enumerate(_outputs(graph)):
        probability = probabilities[place]
        # Viewers stop where there is no "(p=", and take the empty number for 0.
        shown = f"{probability:.3f}" if token >= 0 else ""
        clerp = f'Output "{graph.logit_names[place]}" (p={shown})'
        js_id, layer = f"L_{token}-{position}", graph.layers + 1
        target = probability == max(probabilities) and probability not in probabilities[:place]
        yield _node("output", js_id, layer, position, token, None, None, clerp, probability, target)


def _node(
    kind: Kind,
    js_id: str,
    layer: int | str,
    position: int,
    feature: int,
    influence: float | None,
    activation: float | None = None,
    clerp: str = "",
    probability: float = 0,
    target: bool = False,
) -> Json:
    return {
        "node_id": "",
        "feature": feature,
        "layer": str(layer),
        "ctx_idx": position,
        "feature_type": TYPES[kind],
        "token_prob": probability,
        "is_target_logit": target,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": js_id,
        "clerp": clerp,
        "influence": influence,
        "activation": activation if kind == "feature" else None,
    }


def _show_kept(graph: Graph, nodes: Sequence[Json]) -> None:
    """Viewers show what lies within the node threshold. The last node to come in passes it, and errors stay whatever
    their influence: all that pruning kept is put within."""
    threshold = _said(graph, "pruning_settings").get("node_threshold")
    for node in nodes:
        if isinstance(threshold, int | float) and isinstance(node["influence"], int | float):
            node["influence"] = min(node["influence"], float(threshold))


def _metadata(graph: Graph, slug: str | None, title: str | None, default_slug: str) -> Json:
    chosen = {key: value for key, value in (("slug", slug), ("title_prefix", title)) if value is not None}
    saved, known = graph.annotations.get("metadata", {}), graph.provenance
    if "slug" in saved:  # a file's own, which tells also by what it leaves out: an old one has no schema version
        return saved | _pruning(_said(graph, "pruning_settings")) | chosen

    from jclt import __version__

    settings, own, whole = _said(graph, "settings"), scores(graph).both, _said(graph, "whole_graph_scores")
    pruning = _said(graph, "pruning_settings") or {
        key: source[key]
        for key in ("node_threshold", "edge_threshold")
        for source in (known, settings)
        if key in source
    }
    info: Json = {"generator": {"name": "jclt", "version": __version__}}
    if isinstance(known.get("coder"), str):
        info["description"] = known["coder"]
    made = {
        "slug": default_slug,
        "scan": PurePath(str(known.get("model", ""))).name,  # viewers know models without owner or folder
        "transcoder_list": [],
        "prompt_tokens": list(graph.token_texts),
        "prompt": known.get("prompt", "".join(graph.token_texts)),
        "schema_version": 1,
        "info": info,
        "generation_settings": settings,
        **_pruning(pruning),
        # As circuit-tracer computes them, before it prunes.
        **{f"{name}_score": score for name, score in (own | whole).items()},
        **({"whole_graph_scores": whole, "pruned_graph_scores": own} if whole else {}),
        **({} if graph.logit_weights is None else {"output_weights": _plain(graph.logit_weights)}),
    }
    return made | saved | chosen


def _pruning(settings: Json) -> Json:
    threshold = {key: value for key, value in settings.items() if key == "node_threshold"}
    return threshold | ({"pruning_settings": settings} if settings else {})


def _said(graph: Graph, name: str) -> Json:
    """What the graph's provenance says under this name, if that is an object."""
    said = graph.provenance.get(name)
    return said if isinstance(said, dict) else {}


def _view(graph: Graph, ids: Sequence[str]) -> Json:
    """What the viewer shows at first: named groups of nodes, and the nodes pinned, without which it shows no group."""
    saved = graph.annotations.get("qParams", {})
    number = {node_id: node for node, node_id in enumerate(ids)}
    groups = [[name, *(ids[node] for node in members)] for name, members in graph.supernodes.items()]
    pinned = saved.get("pinnedIds") or []
    pinned = pinned.split(",") if isinstance(pinned, str) else pinned  # as viewers save them
    pinned = pinned if isinstance(pinned, list) else []
    pinned = [node_id for node_id in pinned if isinstance(node_id, str) and node_id in number]
    known = saved.get("supernodes", [])
    if _are_groups(known) and _supernodes(known, number) == graph.supernodes:
        # Where groups share a name, only the file still has it.
        groups = [[name, *(node_id for node_id in members if node_id in number)] for name, *members in known]
    else:
        pinned += [node_id for _, *members in groups for node_id in members]
    return (
        {"linkType": "both", "pinnedIds": [], "clickedId": "", "supernodes": [], "sg_pos": ""}
        | saved
        | {"pinnedIds": list(dict.fromkeys(pinned)), "supernodes": groups}
    )


def _links(adjacency: Float[np.ndarray, "N N"], ids: Sequence[str]) -> list[Json]:
    targets, sources = np.nonzero(adjacency)
    weights = adjacency[targets, sources]
    if not np.isfinite(weights).all():
        raise UserError("graph: an edge is not finite, expected numbers only")
    return [
        {"source": ids[source], "target": ids[target], "weight": weight}
        for source, target, weight in zip(sources.tolist(), targets.tolist(), _plain(weights), strict=True)
    ]


def _plain(values: Float[np.ndarray, "n"]) -> list[float]:
    """The numbers as Python's, those of single precision as the shortest decimals that read back as the same."""
    if values.dtype == np.float64:
        return values.tolist()
    return values.astype(np.float32).astype("U32").astype(np.float64).tolist()


# Reading.


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
    if not np.isfinite(single).all() or (np.array(_plain(single[unlike])) != weights[unlike]).any():
        return np.float64
    return np.float32


def _read_supernodes(path: Path, groups: Any, number: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    if not _are_groups(groups):
        raise UserError(f"{path}: qParams.supernodes is {str(groups)[:80]}, expected lists of a name and node ids")
    return _supernodes(groups, number)


def _are_groups(groups: Any) -> bool:
    return isinstance(groups, list) and all(
        isinstance(group, list) and group and all(isinstance(text, str) for text in group) for group in groups
    )


def _supernodes(groups: Sequence[Sequence[str]], number: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Named sets of nodes; a name that is there already is numbered, an id that names no node is left out."""
    named: dict[str, tuple[int, ...]] = {}
    for name, *members in groups:
        free = next(new for i in range(1, 2 + len(named)) if (new := name if i == 1 else f"{name} ({i})") not in named)
        named[free] = tuple(number[node_id] for node_id in members if node_id in number)
    return named


def _output_name(text: str) -> str:
    quoted = re.match(r'Output "(.*)" \(p=', text, re.DOTALL)
    return quoted[1] if quoted else text


def _array(rows: Sequence[tuple[int, ...]], width: int) -> Int[np.ndarray, "n w"]:
    return np.array(rows, np.int64).reshape(-1, width)
