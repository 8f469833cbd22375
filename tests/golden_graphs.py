"""The reference graphs that circuit-tracer made, under `shared/golden` beside the repository."""

import json
from pathlib import Path

import numpy as np
import pytest
from graph_lists import build_graph

from jclt.graphs.graph import Graph

FOLDER = Path(__file__).parents[2] / "shared" / "golden"
GRAPHS = ("gpt2", "llama", "gemma2")


def golden_graph(folder: str) -> Graph:
    """The reference graph in this folder; skips the test if the file is missing."""
    path = FOLDER / folder / "graph.npz"
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    found = np.load(path)
    config = json.loads((FOLDER / folder / "config.json").read_text())
    layers, tokens = config.get("num_hidden_layers") or config["n_layer"], found["tokens"]
    adjacency, outputs = found["adjacency"], found["logit_tokens"]
    zeros = np.zeros(len(adjacency), adjacency.dtype)
    return build_graph(
        adjacency=adjacency,
        bias=zeros,
        rest=zeros,
        rest_mass=zeros,
        values=adjacency.sum(axis=1),
        features=found["active_features"],
        activations=found["activation_values"],
        errors=np.stack(np.divmod(np.arange(layers * len(tokens)), len(tokens)), axis=1),
        tokens=tokens,
        token_texts=tuple(f"<{token}>" for token in tokens),
        positions=np.zeros(0, np.int64),
        logit_tokens=outputs,
        logit_names=tuple(f"<{token}>" for token in outputs),
        logit_positions=np.full(len(outputs), len(tokens) - 1),
        logit_probabilities=found["logit_probabilities"],
        layers=layers,
    )
