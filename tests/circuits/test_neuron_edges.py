"""Edges between neurons, against the attribution graph in the basis of neurons, and against their own sums."""

from functools import cache

import jax
import numpy as np
import pytest
from more_cases import mark_others
from small_models import ROWS, make_model

import jclt
from jclt import UserError
from jclt.circuits.neuron_edges import trace_neurons
from jclt.graphs import load_graph

KINDS = {
    "relu": {"norm": "layer", "activation": "relu", "gated": False, "mlp_bias": True, "qkv_bias": True},
    "gated": {"norm": "rms", "activation": "silu", "gated": True, "post_norms": True, "kv_heads": 1},
    "parallel": {"norm": "layer", "activation": "relu", "gated": False, "mlp_bias": True, "parallel": True},
}
TOKENS, RIGHT, WRONG = ROWS[0][0], ROWS[0][2], ROWS[0][3]


@cache
def trace_both(kind):
    """The attribution graph of all active neurons, and our edges between the same ones. Inside `jax.enable_x64()`."""
    model = make_model(**KINDS[kind])
    coder = jclt.load_coder("neurons", model=model)
    graph = jclt.attribute(model, coder, np.array(TOKENS), targets=[(RIGHT, WRONG)])
    return graph, trace_neurons(model, np.array(TOKENS), graph.features, [RIGHT], [WRONG], rules="neuron graphs")


@pytest.mark.parametrize("kind", mark_others(KINDS, ["relu"]))
def test_edges_are_those_of_the_identity_transcoder(kind):
    """The graph's targets are what the gate multiplies, of gated neurons; ours are what they write."""
    with jax.enable_x64():
        graph, found = trace_both(kind)
    np.testing.assert_array_equal(found.neurons, graph.features)
    count = len(graph.features)
    targets = [*range(count), *graph.nodes.find("output")]
    sources = [*range(count), *graph.nodes.find("token"), *graph.nodes.find("position")]
    ratio = np.append(graph.activations / graph.values[:count], 1.0)
    want = graph.adjacency[np.ix_(targets, sources)] * ratio[:, None]
    np.testing.assert_allclose(found.edges, want, atol=1e-9 * np.abs(want).max())
    np.testing.assert_allclose(found.values[:count], graph.activations, atol=1e-12)
    assert np.count_nonzero(want) > count


def test_edges_and_biases_sum_to_the_activation():
    """Relative ones to 1 minus the biases' share; and so they do as a graph, which can be pruned and saved."""
    with jax.enable_x64():
        graph, found = trace_both("relu")
        model = make_model(**KINDS["relu"])
        few, every = (
            trace_neurons(model, np.array(TOKENS), found.neurons[::3], [RIGHT], [WRONG], direct=direct)
            for direct in (True, False)
        )
    total = found.edges.sum(axis=1) + found.bias
    np.testing.assert_allclose(total, found.values, atol=1e-12)
    np.testing.assert_allclose(found.bias[:-1], graph.bias[: len(found.neurons)], atol=1e-9)
    np.testing.assert_allclose(found.relative.sum(axis=1), 1 - found.bias / found.values, atol=1e-9)
    for some in (few, every):
        np.testing.assert_allclose(some.edges.sum(axis=1) + some.bias + some.rest, some.values, atol=1e-12)
    kept, count = np.r_[: len(found.neurons) : 3], len(few.neurons)
    np.testing.assert_allclose(few.edges[:count, :count], found.edges[np.ix_(kept, kept)], atol=1e-12)
    assert np.abs(every.edges[-1] - few.edges[-1]).max() > 1e-3  # from layer 0 to the output, also through layer 1


def test_the_graph_is_pruned_and_saved_as_others_are(tmp_path):
    with jax.enable_x64():
        _, found = trace_both("relu")
    graph = found.to_graph()
    assert graph.conservation_error < 1e-9 and graph.counts["feature"] == len(found.neurons)
    small = graph.prune(0.8)
    assert 0 < small.counts["feature"] < graph.counts["feature"] and small.conservation_error < 1e-9
    small.save(tmp_path / "graph.npz")
    np.testing.assert_allclose(load_graph(tmp_path / "graph.npz").adjacency, small.adjacency)
    jclt.export_html(small, tmp_path / "graph.html")
    assert (tmp_path / "graph.html").stat().st_size > 10_000


def test_wrong_neurons_and_rules_are_named():
    with jax.enable_x64():
        model = make_model(**KINDS["gated"])
        for neurons, settings, message in (
            ([[0, 0, 99]], {}, r"neuron \[0, 0, 99\]: expected a layer, position and number below \[2, 5, 12\]"),
            ([[0, 1]], {}, "neurons: array of shape"),
            ([[0, 0, 1]], {"rules": "frozen"}, "rules norm, attention: expected norm, attention, identity"),
        ):
            with pytest.raises(UserError, match=message):
                trace_neurons(model, np.array(TOKENS), np.array(neurons), [RIGHT], **settings)
