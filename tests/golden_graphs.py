"""The reference graphs that circuit-tracer made: one in `golden/circuit_tracer`, larger ones in `../shared/golden`."""

import json
from pathlib import Path

import numpy as np
import pytest
from graph_lists import build_graph

from jclt.graphs.graph import Graph

PLACES = Path(__file__).parent / "golden" / "circuit_tracer", Path(__file__).parents[2] / "shared" / "golden"
GRAPHS = ("gpt2", "llama", "gemma2")


def golden_folder(case: str) -> Path:
    """The folder with a model, a coder in `clt` and their graph; skips the test if it is in neither place."""
    for place in PLACES:
        if (place / case / "graph.npz").exists():
            return place / case
    pytest.skip(f"circuit-tracer's graph of {case} is too large for tests/golden and ../shared/golden is not here")


def golden_graph(case: str) -> Graph:
    folder = golden_folder(case)
    arrays = np.load(folder / "graph.npz")
    config = json.loads((folder / "config.json").read_text())
    layers, tokens = config.get("num_hidden_layers") or config["n_layer"], arrays["tokens"]
    adjacency, logit_tokens = arrays["adjacency"], arrays["logit_tokens"]
    zeros = np.zeros(len(adjacency), adjacency.dtype)
    return build_graph(
        adjacency=adjacency,
        bias=zeros,
        rest=zeros,
        rest_mass=zeros,
        values=adjacency.sum(axis=1),
        features=arrays["active_features"],
        activations=arrays["activation_values"],
        errors=np.stack(np.divmod(np.arange(layers * len(tokens)), len(tokens)), axis=1),
        tokens=tokens,
        token_texts=tuple(f"<{token}>" for token in tokens),
        positions=np.zeros(0, np.int64),
        logit_tokens=logit_tokens,
        logit_names=tuple(f"<{token}>" for token in logit_tokens),
        logit_positions=np.full(len(logit_tokens), len(tokens) - 1),
        logit_probabilities=arrays["logit_probabilities"],
        layers=layers,
    )
