"""Circuits of edges in files: the JSON of EAP-IG's graphs, which the MIB benchmark takes.

    {"cfg": {"n_layers": 2, "n_heads": 4, "parallel_attn_mlp": false, "d_model": 64},
     "nodes": {"input": {"in_graph": true}, "a0.h0": ..., "m0": ..., "logits": ...},
     "edges": {"input->a0.h0<q>": {"score": -0.25, "in_graph": true}, ...}}

Files of ours also have "made": the method, its rules, the metric and the ablation of the scores. Other readers pass
over it.

Each head has keys and values of its own there, also where a model's heads share them. When such a file is written,
each head of a group gets an equal part of the score; when it is read, parts are summed, and an edge is in the circuit
if one of its parts is. Scores of a node, which such files may have, are not read.

The layout is that of published code (EAP-IG's `Graph.to_json` and `from_json`). Its reader was not run on files of
ours, no published file was at hand to be read, and what else the benchmark asks of a submission was not checked.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np

from jclt.circuits.edge_methods import EdgeMetric
from jclt.circuits.edge_scores import EdgeScores
from jclt.circuits.edges import find_readers, list_edges, list_receivers, list_senders
from jclt.errors import UserError
from jclt.files import read_json, to_json, write_text
from jclt.models import Model, ModelConfig
from jclt.shapes import Bool, Float

FILE = "a circuit file, JSON with cfg, nodes and edges"
Place = tuple[int, int]
"""The number of a sender and of a receiver."""


def list_file_edges(config: ModelConfig) -> dict[str, Place]:
    """The names of edges in files, in which every head has its own keys and values."""
    senders, receivers = list_senders(config), list_receivers(config)
    readers = find_readers(config)
    names: dict[str, Place] = {}
    for s, r in np.argwhere(list_edges(config)).tolist():
        _, mark, letter = receivers[r].partition("<")
        parts = [f"{senders[i]}<{letter}" for i in np.flatnonzero(readers[:, r])] if mark else [receivers[r]]
        names |= {f"{senders[s]}->{part}": (s, r) for part in parts}
    return names


def describe_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_layers": config.layers,
        "n_heads": config.heads,
        "parallel_attn_mlp": config.parallel,
        "d_model": config.width,
    }


def save_circuit(
    path: str | Path,
    scores: EdgeScores,
    kept: Bool[np.ndarray, "s r"] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes scores, and which edges are in the circuit, by default all; `extra` goes into the file, too."""
    config, values = scores.config, scores.values.astype(np.float64)
    kept = list_edges(config) if kept is None else list_edges(config) & kept
    readers = find_readers(config)
    parts = np.maximum(readers.sum(axis=0), 1)
    joined = kept.any(axis=1) | np.any(readers & kept.any(axis=0), axis=1)
    nodes = {name: bool(inside) for name, inside in zip(list_senders(config), joined, strict=True)} | {"logits": True}
    made = {
        "method": scores.method,
        "rules": list(scores.rules),
        "metric": scores.metric,
        "ablation": scores.ablation,
        "source": scores.source,
    }
    content = {
        "cfg": describe_config(config),
        "nodes": {name: {"in_graph": inside} for name, inside in nodes.items()},
        "edges": {
            name: {"score": float(values[s, r] / parts[r]), "in_graph": bool(kept[s, r])}
            for name, (s, r) in list_file_edges(config).items()
        },
        "made": made,
    }
    write_text(Path(path), to_json(content | dict(extra or {}), path) + "\n")


def load_circuit(model: Model, path: str | Path) -> tuple[EdgeScores, Bool[np.ndarray, "s r"]]:
    """The scores of a circuit file, as those of one pair, and the edges of its circuit. Edges that are not in the file
    have a score of 0, and are not in the circuit."""
    path, config = Path(path), model.config
    content = read_json(path, FILE)
    for key in ("cfg", "edges"):
        if not isinstance(content.get(key), dict):
            raise UserError(f"{path}: '{key}' is missing or no object, expected {FILE}")
    for key, value in describe_config(config).items():
        found = content["cfg"].get(key, value)
        if found != value:
            raise UserError(f"{path}: cfg has {key} {found}, expected {value}, the model's")
    places = list_file_edges(config)
    shape = list_edges(config).shape
    values, kept = np.zeros(shape), np.zeros(shape, bool)
    for name, edge in content["edges"].items():
        if name not in places:
            raise UserError(f"{path}: edge '{name}' does not exist in this model, expected names as in input->a0.h0<q>")
        score, inside = read_edge(path, name, edge)
        values[places[name]] += score
        kept[places[name]] |= inside
    made = content.get("made")
    return make_edge_scores(config, values, path.name, made if isinstance(made, dict) else {}), kept


def read_edge(path: Path, name: str, edge: Any) -> tuple[float, bool]:
    """The score, 0 for null, and whether the edge is in the circuit."""
    score = edge.get("score") if isinstance(edge, dict) else "no object"
    inside = edge.get("in_graph", False) if isinstance(edge, dict) else False
    is_number = isinstance(score, int | float) and not isinstance(score, bool) and np.isfinite(score)
    if not (is_number or score is None) or not isinstance(inside, bool):
        raise UserError(f"{path}: edge '{name}': expected a finite score, and in_graph true or false")
    return float(score or 0), inside


def make_edge_scores(
    config: ModelConfig, values: Float[np.ndarray, "s r"], source: str, made: Mapping[str, Any]
) -> EdgeScores:
    """Scores from elsewhere, as those of one pair. What is not said how they were made has its default name."""

    def read(key: str, default: str, known: tuple[str, ...] = ()) -> str:
        found = made.get(key, default)
        return found if isinstance(found, str) and (not known or found in known) else default

    metric: Any = read("metric", "logit_difference", get_args(EdgeMetric))
    rules = made.get("rules", ())
    rules = tuple(map(str, rules)) if isinstance(rules, list) else ()
    unknown = np.full(1, np.nan)
    names = list_senders(config), list_receivers(config)
    method, ablation = read("method", source), read("ablation", "unknown")
    return EdgeScores(values[None], *names, method, rules, metric, ablation, unknown, unknown, config, source)
