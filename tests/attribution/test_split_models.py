"""Graphs of a model whose weights are split over a mesh: the same graphs, and no device ever has all weights."""

import math
import sys
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import FOLDER, golden_model
from more_cases import mark_others
from random_coders import random_coder
from traced_graphs import assert_close, assert_same, make_case, measure_residual

import jclt
from jclt.attribution import attribute, attribute_batch, calls, placement, schedule, scores
from jclt.attribution.calls import Setup
from jclt.attribution.sweep import nodes
from jclt.coders import Coder, CoderConfig, abstract_coder, neurons
from jclt.errors import UserError
from jclt.graphs import Graph
from jclt.mesh import make_sharding
from jclt.models import Model, declare
from jclt.models.weights import declare_layer_weights
from jclt.pods.collectives import find_collectives

attributing = sys.modules["jclt.attribution.attribute"]  # the package has a function of this name

CASES = [
    ("gpt2", "clt", "float64", (1, 4), False),
    ("gemma2", "neurons", "float64", (2, 2), False),
    ("mistral", "some skips", "float64", (1, 4), False),
    ("gpt2", "clt", "float32", (2, 2), False),
    ("gpt2", "clt", "float32", (1, 1), False),
    ("gemma2", "neurons", "float32", (1, 4), False),
    ("llama3", "clt", "bfloat16", (1, 4), False),
    ("gpt2", "clt", "float64", (1, 4), True),
    ("gemma2", "neurons", "float32", (2, 2), True),
    ("neox", "some skips", "float32", (1, 4), True),
]
FEW = [("gpt2", "clt", "float64", (1, 4), True)]
"""Heads and residual streams as nodes take all that other graphs take, too."""


def split_coder(coder: Coder, mesh: jax.sharding.Mesh) -> Coder:
    targets = abstract_coder(coder.config, mesh)
    return jax.device_put(coder, jax.tree.map(lambda x: x.sharding, targets))


def assert_equal_to(share: float, got: Graph, want: Graph):
    assert_same(got, want)
    np.testing.assert_array_equal(got.heads, want.heads)
    np.testing.assert_array_equal(got.streams, want.streams)
    for name in ("adjacency", "bias", "values", "activations"):
        assert_close(getattr(got, name), getattr(want, name), share)
    assert measure_residual(got) < 10 * share


@pytest.mark.parametrize(("family", "kind", "dtype", "shape", "vectors"), mark_others(CASES, FEW))
def test_a_split_model_has_the_same_graphs(family, kind, dtype, shape, vectors):
    """The coder is split over the same mesh, or on one device; neurons are the split model's own."""
    mesh, options = jclt.make_mesh(*shape), {"nodes": 10} if kind == "neurons" else {}
    options: Any = options | ({"heads": 9, "cuts": (1,)} if vectors else {})
    with jax.enable_x64(dtype == "float64"):
        model, coder, tokens = make_case(family, kind, dtype)
        split = jclt.load_model(FOLDER / family, dtype=dtype, mesh=mesh)
        prompts = [tokens, tokens[:3]] if kind == "neurons" else [tokens]
        there = neurons(split) if kind == "neurons" else coder if dtype == "float32" else split_coder(coder, mesh)
        for prompt, got in zip(prompts, attribute_batch(split, there, prompts, **options), strict=True):
            want = attribute(model, coder, prompt, **options)
            assert_equal_to(1e-12 if dtype == "float64" else 1e-5, got, want)
            about = [x.provenance | {"conservation_error": None} for x in (got, want)]
            assert about[0] == about[1]


def test_a_model_that_is_split_over_several_hosts_is_refused(monkeypatch):
    model = jclt.load_model("demo", mesh=jclt.make_mesh())
    assert model.mesh is not None
    monkeypatch.setitem(model.mesh.__dict__, "is_multi_process", True)
    with pytest.raises(UserError, match="^model demo: split over devices of several hosts, expected those of one"):
        attribute(model, neurons(model), np.arange(3))


# What is in memory.


def draw_model(mesh: jax.sharding.Mesh) -> Model:
    """Sizes differ from one another, so that a shape says what its axes are."""
    sizes = {"layers": 13, "vocabulary": 4 * 47, "mlp_width": 4 * 17, "width": 4 * 7, "kv_heads": 4}
    config = replace(golden_model("gemma2").config, **sizes)
    params = {
        name: jax.device_put(x.init(jax.random.key(number), jnp.float32), make_sharding(mesh, x.shape, x.axes))
        for number, (name, x) in enumerate(declare(config).items())
    }
    return Model(config, params, None, "drawn")


def watch_programs(monkeypatch, programs: list[tuple[Any, str]]) -> dict[str, str]:
    """The text of each program, by name, once it has run."""
    texts = {}

    def watch(module: Any, name: str):
        program = getattr(module, name)

        def run(*arguments):
            texts.setdefault(name, program.lower(*arguments).compile().as_text())
            return program(*arguments)

        monkeypatch.setattr(module, name, run)

    for module, name in programs:
        watch(module, name)
    return texts


@pytest.mark.exhaustive  # slow; a plain run compares the graphs of a split model
def test_no_device_ever_has_the_weights_of_more_than_one_layer(monkeypatch):
    model = draw_model(jclt.make_mesh())
    c = model.config
    config = CoderConfig("transcoder", 16, skip=True, writes="mlp_raw_out").fit_to_model(c, "random")
    setups: list[Setup] = []
    place = attributing.place_on_devices
    monkeypatch.setattr(attributing, "place_on_devices", lambda *some: setups.append(place(*some)) or setups[-1])
    names = {
        placement: ["fold_weights"],
        schedule: ["run_true_pass", "trace_embeddings"],
        nodes: ["fold_models", "fold_sources"],
        scores: ["begin_at_outputs", "pull_to_write", "pull_to_vectors", "pull_to_input"],
        calls: ["trace_blocks"],
    }
    programs = [(module, name) for module, in_module in names.items() for name in in_module]
    texts = watch_programs(monkeypatch, programs)
    length = 16
    attribute(model, random_coder(config), np.arange(length), nodes=40, heads=9, cuts=(2,))
    assert len(texts) == len(programs)

    for x in jax.tree.leaves((setups[0].weights, setups[0].folded)):
        is_vector = x.size <= c.layers * c.heads * c.width
        assert x.addressable_shards[0].data.nbytes == (x.nbytes if is_vector else x.nbytes // 4), x.shape

    of_layer = [math.prod(x.shape) for x in declare_layer_weights(c).values()]
    gathering = set[str]()
    for name, text in texts.items():
        for op in find_collectives(text):
            if op.kind == "all-gather" and not op.has_axis(length):  # or it is what skips write
                assert op.largest <= max(of_layer) and not op.has_axis(c.layers), f"{name}: {op}"
                gathering.add(name)
    pulls = {"pull_to_write", "pull_to_vectors", "pull_to_input"}
    assert gathering == {"run_true_pass", "trace_embeddings", "trace_blocks"} | pulls
