"""Graphs of the golden models with coders of every kind, and functions that compare them."""

from functools import cache
from typing import Any, NamedTuple, cast

import numpy as np
from golden_cases import FOLDER, golden_model
from random_coders import random_coder

import jclt
from jclt.attribution import attribute
from jclt.coders import Coder, CoderConfig, neurons
from jclt.graphs import Graph
from jclt.models import Model

KINDS = {
    "clt": CoderConfig("clt", 16),
    "some layers": CoderConfig("clt", 16, layers=(0, 2)),
    "skip": CoderConfig("transcoder", 16, skip=True, reads="resid_mid"),
    "some skips": CoderConfig("transcoder", 16, skip=True, layers=(1, 2)),
    "raw writes": CoderConfig("clt", 16, reads="mlp_normalized", writes="mlp_raw_out"),
    "raw skips": CoderConfig("transcoder", 16, skip=True, writes="mlp_raw_out"),
}

DOUBLE = {
    "gemma2": "neurons",
    "gemma3": "some layers",
    "gpt2": "clt",
    "llama3": "clt",
    "mistral": "some skips",
    "neox": "some skips",
    "neox_sequential": "neurons",
    "qwen2": "some layers",
    "qwen3": "clt",
}
"""Each family with one coder; the other cases differ from these only in the attention patterns."""


class Case(NamedTuple):
    model: Model
    coder: Coder
    tokens: np.ndarray


@cache
def make_case(name: str, kind: str, dtype: str) -> Case:
    model = golden_model(name) if dtype == "float32" else jclt.load_model(FOLDER / name, dtype=dtype)
    coder = (
        neurons(model)
        if kind == "neurons"
        else random_coder(KINDS[kind].fit_to_model(model.config, "random"), cast(Any, np.dtype(dtype)))
    )
    return Case(model, coder, np.random.default_rng(3).integers(0, model.config.vocabulary, 5))


@cache
def trace_whole_graph(name: str, kind: str, dtype: str) -> Graph:
    return attribute(*make_case(name, kind, dtype))


def measure_residual(graph: Graph) -> float:
    return np.abs(graph.residual).max() / np.abs(graph.values).max()


def assert_close(got, want, share: float):
    """Within this share of the largest entry."""
    want = np.asarray(want)
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=share * np.abs(want).max())


def assert_same(got: Graph, want: Graph):
    for name in ("features", "errors", "tokens", "positions", "logit_tokens", "logit_positions"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    assert got.token_texts == want.token_texts and got.logit_names == want.logit_names
    for name in ("adjacency", "bias", "values", "activations", "logit_probabilities", "logit_weights"):
        assert_close(getattr(got, name), getattr(want, name), 1e-5)
    for name in ("rest", "rest_mass"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), atol=1e-5 * np.abs(want.values).max())
