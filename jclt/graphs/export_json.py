"""A graph as published viewers read it: JSON of schema version 1."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import overload

import numpy as np

from jclt.errors import UserError
from jclt.files import write_bytes
from jclt.graphs.graph import Graph
from jclt.graphs.nodes import Kind
from jclt.graphs.npz import to_plain
from jclt.graphs.viewer_json import FIELDS, TYPES, Json, Labels, are_groups, named_groups, notes_of, shortest_decimals
from jclt.shapes import Float

SLUG = 40
"""Letters of a graph's name, or a few more."""


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
    nodes = [node | note for node, note in zip(_nodes(graph), notes_of(graph), strict=True)]
    for node, node_id, name in zip(nodes, ids, _feature_labels(graph, labels), strict=True):
        node |= {"node_id": node_id} if name is None else {"node_id": node_id, "clerp": name}
    _show_kept(graph, nodes)
    content: Json = {
        "metadata": _metadata(graph, slug, title, default_slug),
        "qParams": _view(graph, ids),
        **{key: value for key, value in saved.items() if key not in FIELDS},
        "nodes": [node for node, absent in zip(nodes, _absent(graph), strict=True) if not absent],
    }
    return to_plain(content, "graph") | {"links": _links(graph.adjacency, ids)}


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
    ids = [note.get("node_id", node_id) for node_id, note in zip(ids, notes_of(graph), strict=True)]
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


def _absent(graph: Graph) -> list[bool]:
    """Tokens that the file from which this graph came has no node for."""
    of_token = dict(zip(graph.nodes.of("token").tolist(), graph.tokens.tolist(), strict=True))
    return [not note and of_token.get(node, 0) < 0 for node, note in enumerate(notes_of(graph))]


def _feature_labels(graph: Graph, labels: Labels) -> list[str | None]:
    given = [labels.get((layer, feature)) for layer, _, feature in graph.features.tolist()]
    return given + [None] * (len(graph) - len(given))


def _nodes(graph: Graph) -> Iterator[Json]:
    """Every node without its id and any label, in the graph's order."""
    shares = iter(shortest_decimals(graph.cumulative_shares.astype(np.float32)))

    for (layer, position, feature), activation in zip(
        graph.features.tolist(), shortest_decimals(graph.activations), strict=True
    ):
        js_id, number = f"{layer}_{feature}-0", cantor(layer, feature)
        yield _node("feature", js_id, layer, position, number, next(shares), activation=activation)
    for layer, position in graph.errors.tolist():
        yield _node("error", f"{layer}_{position}-0", layer, position, -1, next(shares))
    for position, token in enumerate(graph.tokens.tolist()):
        yield _node("token", f"E_{token}-{position}", "E", position, position, next(shares))
    for position in graph.positions.tolist():
        clerp = f"Position {position}"
        yield _node("position", f"P_{position}-{position}", "E", position, position, next(shares), clerp=clerp)
    probabilities = shortest_decimals(graph.logit_probabilities)
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

    settings, own, whole = _said(graph, "settings"), graph.scores.both, _said(graph, "whole_graph_scores")
    pruning = _said(graph, "pruning_settings") or {
        key: source[key]
        for key in ("node_threshold", "edge_threshold")
        for source in (known, settings)
        if key in source
    }
    info: Json = {"generator": {"name": "jclt", "version": version("jclt")}}
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
        **({} if graph.logit_weights is None else {"output_weights": shortest_decimals(graph.logit_weights)}),
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
    if are_groups(known) and named_groups(known, number) == graph.supernodes:
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
        for source, target, weight in zip(sources.tolist(), targets.tolist(), shortest_decimals(weights), strict=True)
    ]
