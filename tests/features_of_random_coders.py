"""A small random model, a coder of it, and its described features, counted again by loops over tokens in numpy."""

from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from random_coders import random_coder

import jclt
from jclt.coders import Coder, CoderConfig, SparseCoder
from jclt.features import Sizes
from jclt.features.columns import BIN_EDGES
from jclt.features.tally import draw_numbers
from jclt.models import Model, ModelConfig, declare

ROWS, LENGTH, FEATURES, VOCABULARY = 40, 12, 24, 23
SIZES = Sizes(top=3, sample=4, context=2, tokens=5, neighbours=3, effects=4)


def make_model() -> Model:
    kind: dict[str, Any] = {"norm": "layer", "activation": "gelu_tanh", "gated": False, "learned_positions": True}
    config = ModelConfig("gpt2", VOCABULARY, 16, 3, 2, 32, LENGTH, tied=False, **kind)
    weights = enumerate(declare(config).items())
    key = jax.random.key(0)
    params = {name: weight.init(jax.random.fold_in(key, i), jnp.float32) for i, (name, weight) in weights}
    params["final_norm_gain"] = jax.random.normal(key, params["final_norm_gain"].shape)
    return Model(config, params, None, "random")


def make_coder(model: Model, **settings: Any) -> SparseCoder:
    config = CoderConfig(features=FEATURES, **settings).fit_to_model(model.config, "random")
    return random_coder(config)


def draw_rows(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).zipf(1.3, (ROWS, LENGTH)).astype(np.int32) % VOCABULARY


def encode_rows(model: Model, coder: Coder, rows: np.ndarray) -> np.ndarray:
    """All activations, `[L, N, T, F]`."""
    config = coder.config
    reads = jclt.run(model, rows, capture=(config.reads,))[1][config.reads]
    return np.stack([np.asarray(coder.encode(i, reads[layer])) for i, layer in enumerate(config.covered)])


def list_by_score(fires: list[tuple[int, int]], score: np.ndarray, count: int) -> list[tuple[int, int]]:
    """The places with the highest scores, at most one of each row."""
    best = {}
    for place in sorted(fires, key=lambda place: -score[place]):
        best.setdefault(place[0], place)
    return list(best.values())[:count]


def describe_by_loops(
    activations: np.ndarray, rows: np.ndarray, threshold: float, others: np.ndarray
) -> dict[str, Any]:
    """What is counted of one feature, from its activations `[N, T]` and whether each feature fires `[N, T, F]`."""
    fires = [(int(n), int(t)) for n, t in np.argwhere(activations > threshold)]
    places = np.arange(ROWS)[:, None] * LENGTH + np.arange(LENGTH)[None]
    values = np.array([activations[place] for place in fires])
    return {
        "count": len(fires),
        "sum": sum(float(x) for x in values),
        "maximum": max(values, default=0.0),
        "histogram": np.histogram(values, np.r_[-np.inf, BIN_EDGES[1:-1], np.inf])[0],
        "top": list_by_score(fires, activations, SIZES.top),
        "sample": list_by_score(fires, draw_numbers(places.ravel()).reshape(places.shape), SIZES.sample),
        "token": Counter(int(rows[place]) for place in fires),
        "next": Counter(int(rows[n, t + 1]) for n, t in fires if t + 1 < LENGTH),
        "together": sum((others[place].astype(int) for place in fires), np.zeros(others.shape[2], int)),
    }


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
