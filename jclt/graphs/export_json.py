"""Writes a graph as JSON of schema version 1, which published viewers read."""

import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import overload

import numpy as np

from jclt.errors import UserError
from jclt.files import write_bytes
from jclt.graphs.adjacency import Adjacency, compress
from jclt.graphs.export_nodes import make_node_ids, make_nodes
from jclt.graphs.graph import Graph
from jclt.graphs.npz import to_plain
from jclt.graphs.viewer_json import (
    FIELDS,
    Json,
    encode_json,
    get_annotations,
    is_list_of_groups,
    name_groups,
    to_shortest_decimals,
)

SLUG_LETTERS = 40
"""About how many letters a slug has at most."""


@overload
def export_json(
    graph: Graph, path: None = None, *, slug: str | None = None, title: str | None = None, scan: str | None = None
) -> Json: ...


@overload
def export_json(
    graph: Graph, path: str | Path, *, slug: str | None = None, title: str | None = None, scan: str | None = None
) -> None: ...


def export_json(
    graph: Graph,
    path: str | Path | None = None,
    *,
    slug: str | None = None,
    title: str | None = None,
    scan: str | None = None,
) -> Json | None:
    """Writes the graph as published viewers read it, compressed if the name ends in .gz. Without a path, returns the
    content.

    Fields in `graph.annotations` override the fields made here; `slug`, `title`, `scan` and `graph.labels` override
    both. Viewers look for the files of features where `scan` says; by default it is the model's name. Viewers show the
    nodes whose field `influence` is at most `node_threshold`. This field is the cumulative share in the whole graph, so
    that viewers show all nodes that pruning kept, and fewer if the user lowers the threshold.
    """
    chosen = {"slug": slug, "title_prefix": title, "scan": scan}
    chosen = {name: text for name, text in chosen.items() if text is not None}
    if path is None:
        return _build_content(graph, chosen, slug_of(graph))
    path = Path(path)
    write_bytes(path, encode_json(_build_content(graph, chosen, path.name.split(".json")[0]), path))
    return None


def _build_content(graph: Graph, chosen: dict[str, str], default_slug: str) -> Json:
    ids = make_node_ids(graph)
    nodes = [node | saved for node, saved in zip(make_nodes(graph), get_annotations(graph), strict=True)]
    for node, node_id, label in zip(nodes, ids, graph.labels or [""] * len(nodes), strict=True):
        node |= {"node_id": node_id, "clerp": label} if label else {"node_id": node_id}
    _limit_influence(graph, nodes)
    content: Json = {
        "metadata": _make_metadata(graph, chosen, default_slug),
        "qParams": _make_view(graph, ids),
        **{key: value for key, value in graph.annotations.items() if key not in FIELDS},
        "nodes": [node for node, absent in zip(nodes, _find_absent_tokens(graph), strict=True) if not absent],
    }
    return to_plain(content, "graph") | {"links": _make_links(graph.adjacency, ids)}


def slug_of(graph: Graph) -> str:
    """A name for the graph in viewers and for its files: the first words of its prompt, without tokens like <bos>."""
    prompt = "".join(text for text in graph.token_texts if not re.fullmatch(r"<.*>", text))
    words, slug = re.findall(r"[a-z0-9]+", prompt.lower()), ""
    for word in words:
        if slug and len(slug) + len(word) > SLUG_LETTERS:
            break
        slug = f"{slug}-{word}" if slug else word[:SLUG_LETTERS]
    return slug or "graph"


def _find_absent_tokens(graph: Graph) -> list[bool]:
    """For each node, whether it is a token without a node in the file that the graph was read from."""
    tokens = dict(zip(graph.nodes.find("token").tolist(), graph.tokens.tolist(), strict=True))
    return [not saved and tokens.get(node, 0) < 0 for node, saved in enumerate(get_annotations(graph))]


def _limit_influence(graph: Graph, nodes: Sequence[Json]) -> None:
    """Lowers each `influence` field to the node threshold, so that viewers show all nodes that pruning kept. The last
    node that pruning keeps exceeds the threshold, and so may errors, which it always keeps."""
    threshold = _get_provenance(graph, "pruning_settings").get("node_threshold")
    for node in nodes:
        if isinstance(threshold, int | float) and isinstance(node["influence"], int | float):
            node["influence"] = min(node["influence"], float(threshold))


def _make_metadata(graph: Graph, chosen: dict[str, str], default_slug: str) -> Json:
    saved, provenance = graph.annotations.get("metadata", {}), graph.provenance
    if (
        "slug" in saved
    ):  # the metadata of a file; nothing is added, because an old file must stay without schema version
        return saved | _make_pruning_fields(_get_provenance(graph, "pruning_settings")) | chosen

    settings, scores, whole_graph_scores = (
        _get_provenance(graph, "settings"),
        graph.scores.both,
        _get_provenance(graph, "whole_graph_scores"),
    )
    pruning = _get_provenance(graph, "pruning_settings") or {
        key: source[key]
        for key in ("node_threshold", "edge_threshold")
        for source in (provenance, settings)
        if key in source
    }
    model = PurePath(str(provenance.get("model", ""))).name  # viewers know models without owner or folder
    info: Json = {"generator": {"name": "jclt", "version": version("jclt")}}
    if isinstance(provenance.get("coder"), str):
        info["description"] = provenance["coder"]
    metadata = {
        "slug": default_slug,
        "scan": model,
        **({"model": model} if "scan" in chosen else {}),
        "transcoder_list": [],
        "prompt_tokens": list(graph.token_texts),
        "prompt": provenance.get("prompt", "".join(graph.token_texts)),
        "schema_version": 1,
        "info": info,
        "generation_settings": settings,
        **_make_pruning_fields(pruning),
        # Before pruning, as circuit-tracer computes these scores.
        **{f"{name}_score": score for name, score in (scores | whole_graph_scores).items()},
        **({"whole_graph_scores": whole_graph_scores, "pruned_graph_scores": scores} if whole_graph_scores else {}),
        **({} if graph.logit_weights is None else {"output_weights": to_shortest_decimals(graph.logit_weights)}),
    }
    return metadata | saved | chosen


def _make_pruning_fields(settings: Json) -> Json:
    threshold = {key: value for key, value in settings.items() if key == "node_threshold"}
    return threshold | ({"pruning_settings": settings} if settings else {})


def _get_provenance(graph: Graph, name: str) -> Json:
    """The object of this name in the graph's provenance; empty if it is missing or no object."""
    value = graph.provenance.get(name)
    return value if isinstance(value, dict) else {}


def _make_view(graph: Graph, ids: Sequence[str]) -> Json:
    """The viewer's first view: groups of nodes, and pinned nodes. Viewers show a group only if its nodes are pinned."""
    saved = graph.annotations.get("qParams", {})
    number = {node_id: node for node, node_id in enumerate(ids)}
    groups = [[name, *(ids[node] for node in members)] for name, members in graph.supernodes.items()]
    pinned = saved.get("pinnedIds") or []
    pinned = pinned.split(",") if isinstance(pinned, str) else pinned  # viewers save a text
    pinned = pinned if isinstance(pinned, list) else []
    pinned = [node_id for node_id in pinned if isinstance(node_id, str) and node_id in number]
    saved_groups = saved.get("supernodes", [])
    if is_list_of_groups(saved_groups) and name_groups(saved_groups, number) == graph.supernodes:
        # The saved groups, because they may share a name, which supernodes cannot.
        groups = [[name, *(node_id for node_id in members if node_id in number)] for name, *members in saved_groups]
    else:
        pinned += [node_id for _, *members in groups for node_id in members]
    return (
        {"linkType": "both", "pinnedIds": [], "clickedId": "", "supernodes": [], "sg_pos": ""}
        | saved
        | {"pinnedIds": list(dict.fromkeys(pinned)), "supernodes": groups}
    )


def _make_links(adjacency: Adjacency, ids: Sequence[str]) -> list[Json]:
    edges = compress(adjacency)
    if not np.isfinite(edges.weights).all():
        raise UserError("graph: an edge is not finite, expected numbers only")
    return [
        {"source": ids[source], "target": ids[target], "weight": weight}
        for source, target, weight in zip(
            edges.sources.tolist(), edges.targets.tolist(), to_shortest_decimals(edges.weights), strict=True
        )
    ]
