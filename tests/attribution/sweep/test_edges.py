"""Edges are the derivatives of the local replacement model: it reproduces the true pass, everything that reaches a
target adds up to its value, and single edges, whole rows, hand-made models and circuit-tracer's graphs say the same."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import CASES, golden_model
from golden_graphs import GRAPHS, golden_folder, golden_graph
from handmade_coders import VARIANTS, expected_edges, faithful_coder, nodes, unfaithful_coder
from more_cases import mark_others
from traced_graphs import DOUBLE, Case, assert_close, make_case, measure_residual, trace_whole_graph

import jclt
from jclt.attribution import attribute
from jclt.attribution.local import LocalModel, Weights, list_frozen_sites, propagate
from jclt.coders import neurons
from jclt.graphs import Graph
from jclt.graphs.graph import Kind
from jclt.models import Model
from jclt.numerics import Precision
from jclt.world.handmade import ANSWERS, PROMPTS, build_two_hop

LAW = sorted(
    {*DOUBLE.items(), *((name, kind) for name in ("gemma2", "neox") for kind in ("clt", "skip"))}
    | {("gemma3", "skip"), ("gpt2", "skip"), ("gemma2", "raw writes"), ("gemma3", "raw skips")}
)
"""Every family, every kind of coder, and CLTs and skips with each kind of block: post-norms, parallel, neither."""
FEW = [("gemma2", "raw writes"), ("gpt2", "clt"), ("neox", "some skips")]
"""Post-norms, also after what the coder writes; learned positions, biases, parallel blocks, and norms that subtract the
mean; CLTs and transcoders, also of some layers. The edges of neurons are checked one by one below."""
SINGLE = {"gemma3": "neurons", "neox": "skip", "qwen3": "clt"}
"""In addition to the graphs of circuit-tracer's models: post-norms, parallel blocks, norms of queries and keys."""


@pytest.mark.parametrize("name", mark_others(CASES, ["gemma2", "gpt2", "neox"]))
def test_with_the_true_writes_the_linear_model_is_the_true_pass(name):
    model = golden_model(name)
    local = LocalModel(model.config, "mlp_in", "mlp_out")
    tokens = np.random.default_rng(0).integers(0, model.config.vocabulary, 6)
    sites = list_frozen_sites(model.config)
    capture = (*sites, *embedding_sites(model), "mlp_in", "mlp_out", "resid_final")
    logits, seen = jclt.run(model, tokens, capture=capture)
    embeddings = sum(seen[site] for site in embedding_sites(model))
    frozen = {site: seen[site] for site in sites}
    weights = Weights(model.params, None)
    reads = jax.jit(propagate, static_argnums=0)(local, weights, frozen, embeddings, seen["mlp_out"])
    assert_close(reads.layers, seen["mlp_in"], 1e-5)
    assert_close(reads.final, seen["resid_final"], 1e-5)
    table = np.asarray(model.params["token_embedding" if model.config.tied else "unembedding"])
    final_logits, cap = np.asarray(reads.final) @ table.T, model.config.logit_softcap
    assert_close(final_logits if cap is None else cap * np.tanh(final_logits / cap), logits, 1e-5)


def embedding_sites(model: Model) -> tuple[str, ...]:
    return ("token_embedding", *(["position_embedding"] if model.config.learned_positions else []))


@pytest.mark.parametrize(("name", "kind"), mark_others(LAW, FEW))
def test_what_reaches_a_target_adds_up_to_its_value(name, kind):
    with jax.enable_x64():
        graph = trace_whole_graph(name, kind, "float64")
    assert graph.adjacency.dtype == np.float64 and measure_residual(graph) <= 1e-10
    assert len(graph.features) > 40 and not graph.rest.any()
    assert (len(graph.positions) > 0) == name.startswith("gpt2")
    features = graph.adjacency[graph.nodes.find("feature", "output")]
    # Every kind of source brings something, or the sum would not say much of it. Neurons make no errors.
    kinds: list[Kind] = ["feature", "error", "token", "position"]
    for source in kinds[: 4 if len(graph.positions) else 3]:
        size = np.abs(features[:, graph.nodes.find(source)]).max()
        assert size < 1e-10 if (source, kind) == ("error", "neurons") else size > 1e-2, source


@pytest.mark.exhaustive  # so do those of the compiled model and of circuit-tracer's models, in plain runs
@pytest.mark.parametrize("name", SINGLE)
def test_it_does_so_in_single_precision(name):
    graph = trace_whole_graph(name, SINGLE[name], "float32")
    assert graph.adjacency.dtype == np.float32 and measure_residual(graph) <= 1e-4


def test_what_is_left_out_is_added_to_the_rest():
    with jax.enable_x64():
        case, full_graph = make_case("gpt2", "clt", "float64"), trace_whole_graph("gpt2", "clt", "float64")
        part = attribute(*case, max_features=len(full_graph.features) // 2)
    assert len(part.features) == len(full_graph.features) // 2
    for graph in (part, full_graph.prune(), part.prune()):
        assert measure_residual(graph) <= 1e-10
        assert np.abs(graph.rest).max() > 0.1 and (graph.rest_mass >= np.abs(graph.rest)).all()
        assert len(graph) < len(full_graph)


def linear_model(case: Case, graph: Graph) -> tuple[Callable[[jax.Array], jax.Array], int]:
    """The targets' values as a function of a factor for each source, in the order of a graph's sources; and the number
    of sources. Computed from the formulas, captured sites and the coder's weights, without `edges.py`."""
    model, coder, tokens = case
    covered, layers, length = coder.config.covered, model.config.layers, len(tokens)
    local = LocalModel(model.config, coder.config.reads, coder.config.writes)
    sites = (*list_frozen_sites(model.config), *embedding_sites(model), local.reads, local.writes)
    _, seen = jclt.run(model, tokens, capture=sites)
    frozen = {site: seen[site] for site in list_frozen_sites(model.config)}
    reads, writes = np.asarray(seen[local.reads]), np.asarray(seen[local.writes])

    constant, skips = np.zeros_like(writes), np.zeros((layers, *[model.config.width] * 2))
    readings, rows, activations = {}, {}, {}
    for index, layer in enumerate(covered):
        constant[layer] = coder.decoder_bias(index)
        if (skip := coder.skip(index)) is not None:
            skips[layer] = skip
        readings[layer] = [np.asarray(part) for part in coder.encoder(index)]
        activations[layer] = np.asarray(coder.encode(index, jnp.asarray(reads[layer])))
        rows[layer] = np.asarray(coder.decoder_rows(index))
    features = np.zeros((len(graph.features), *writes.shape))
    for number, (layer, position, feature) in enumerate(graph.features):
        later = [other for other in covered if other >= layer][: rows[layer].shape[1]]
        features[number, later, position] = activations[layer][position, feature] * rows[layer][feature]
    errors = writes - constant - np.einsum("ltd,led->lte", reads, skips) - features.sum(axis=0)

    encoders = np.stack([readings[layer][0][feature] for layer, _, feature in graph.features])
    biases = np.array([readings[layer][1][feature] for layer, _, feature in graph.features])
    table = np.asarray(model.params["token_embedding" if model.config.tied else "unembedding"])
    unembeddings = table[graph.logit_tokens] - table.mean(axis=0)
    ends = np.cumsum([len(features), layers * length, *[length] * len(embedding_sites(model))])

    def values(amounts: jax.Array) -> jax.Array:
        of_features, of_errors, *of_embeddings = jnp.split(amounts, ends[:-1])
        sums = constant + jnp.einsum("n,nltd->ltd", of_features, features)
        sums = sums + of_errors.reshape(layers, length, 1) * errors
        parts = zip(of_embeddings, embedding_sites(model), strict=True)
        stream = sum((amount[:, None] * seen[site] for amount, site in parts), jnp.zeros_like(writes[0]))
        weights = Weights(model.params, jnp.asarray(skips) if skips.any() else None)
        logits = propagate(local, weights, frozen, stream, sums)
        read = logits.layers[graph.features[:, 0], graph.features[:, 1]]
        return jnp.concatenate([jnp.sum(read * encoders, axis=1) + biases, unembeddings @ logits.final[-1]])

    return values, int(ends[-1])


@pytest.mark.parametrize("name", mark_others(["gpt2", "gemma2", "neox", "qwen2"], ["gpt2", "neox"]))
def test_rows_and_single_edges_are_those_of_the_linear_model(name):
    """Rows by plain `jax.jacrev`; edges by how much the target changes when the source's write is removed."""
    with jax.enable_x64():
        case, graph = make_case(name, DOUBLE[name], "float64"), trace_whole_graph(name, DOUBLE[name], "float64")
        values, count = linear_model(case, graph)
        values = jax.jit(values)
        everything = np.ones(count)
        values_at_one = np.asarray(values(everything))
        targets = graph.nodes.find("feature", "output")
        assert_close(graph.values[targets], values_at_one, 1e-10)
        assert_close(graph.bias[targets], values(np.zeros(count)), 1e-10)
        rows = jax.jit(jax.jacrev(values))(everything)
        assert_close(graph.adjacency[targets][:, :count], rows, 1e-10)

        pairs: list[tuple[Kind, Kind]]
        pairs = [("feature", "feature"), ("feature", "error"), ("output", "token"), ("output", "feature")]
        random = np.random.default_rng(0)
        for into, out_of in pairs:
            edges = graph.adjacency[np.ix_(graph.nodes.find(into), graph.nodes.find(out_of))]
            strong = np.argwhere(np.abs(edges) > 1e-3)
            for row, column in random.permutation(strong)[:3]:
                target, source = graph.nodes.find(into)[row], graph.nodes.find(out_of)[column]
                gone = values_at_one - np.asarray(values(np.where(np.arange(count) == source, 0.0, 1.0)))
                assert abs(gone[np.searchsorted(targets, target)] - edges[row, column]) <= 1e-10
            assert len(strong) or (out_of, DOUBLE[name]) == ("error", "neurons")


@pytest.mark.parametrize(
    ("name", "make_coder"),
    mark_others(
        [(name, make_coder) for name in VARIANTS for make_coder in (neurons, faithful_coder, unfaithful_coder)],
        [("plain", neurons), ("rotated norms", faithful_coder), ("rotated norms", unfaithful_coder)],
    ),
)
def test_the_compiled_model_has_exactly_the_edges_that_it_was_made_with(name, make_coder):
    model = build_two_hop(**VARIANTS[name])
    faithful = make_coder is not unfaithful_coder
    coder = make_coder(model)
    for city in (0, 6):
        graph = attribute(model, coder, PROMPTS[city], targets=[ANSWERS[city]])
        want = expected_edges(city, norms="norms" in name, faithful=faithful)
        assert named_edges(graph) == pytest.approx(want, abs=1e-5)
        hop, state, _ = nodes(city)
        features = [("feature", *map(int, place)) for place in graph.features]
        assert features == ([hop, state] if faithful else [hop])
        assert np.abs(graph.adjacency[:, graph.nodes.find("error")]).max() < 1e-5
        assert graph.scores.replacement == pytest.approx(1, abs=1e-4)
        assert measure_residual(graph) < 1e-5


def named_edges(graph: Graph) -> dict:
    names = [
        *(("feature", *map(int, place)) for place in graph.features),
        *(("error", *map(int, place)) for place in graph.errors),
        *(("token", place) for place in range(len(graph.tokens))),
        *(("position", int(place)) for place in graph.positions),
        *(("logit", int(token)) for token in graph.logit_tokens),
    ]
    edges = {(names[row], names[at]): float(graph.adjacency[row, at]) for row, at in np.argwhere(graph.adjacency)}
    edges |= {(names[row], ("bias",)): float(graph.bias[row]) for row in np.flatnonzero(graph.bias)}
    return {pair: value for pair, value in edges.items() if abs(value) > 1e-5}


@pytest.mark.parametrize("name", mark_others(GRAPHS, ["gemma2"]))  # whose graph lies in this repository
def test_circuit_tracer_finds_the_same_graph(name):
    want = golden_graph(name)
    model = jclt.load_model(golden_folder(name))
    coder = jclt.load_coder(golden_folder(name) / "clt", model=model, check=False)  # random
    graph = attribute(model, coder, want.tokens, conventions="circuit-tracer")
    np.testing.assert_array_equal(graph.features, want.features)
    np.testing.assert_array_equal(graph.errors, want.errors)
    np.testing.assert_array_equal(graph.logit_tokens, want.logit_tokens)
    assert_close(graph.activations, want.activations, 1e-5)
    assert_close(graph.logit_probabilities, want.logit_probabilities, 1e-5)
    assert_close(graph.adjacency, want.adjacency, 1e-5)
    assert graph.adjacency.dtype == np.float32 and measure_residual(graph) <= 1e-4 and not len(graph.positions)


NARROW: dict[Precision, tuple[float, float]] = {"bfloat16_3x": (2e-6, 1e-4), "bfloat16": (1e-4, 2e-2)}
"""By how much of the largest edge those of each precision differ from exact ones, at least and at most."""


@pytest.mark.parametrize("precision", mark_others(NARROW, ["bfloat16_3x"]))
def test_edges_of_a_narrow_precision_miss_as_much_as_the_graph_says(precision):
    """The nodes and their values are those of the exact pass."""
    exact = trace_whole_graph("llama3", "clt", "float32")
    graph = attribute(*make_case("llama3", "clt", "float32"), precision=precision)
    np.testing.assert_array_equal(graph.features, exact.features)
    np.testing.assert_array_equal(graph.values, exact.values)
    assert graph.provenance["settings"]["precision"] == precision
    assert graph.provenance["conservation_error"] == pytest.approx(measure_residual(graph))
    low, high = NARROW[precision]
    assert low < np.abs(graph.adjacency - exact.adjacency).max() / np.abs(exact.adjacency).max() < high
    assert exact.provenance["conservation_error"] < 3e-6 < graph.provenance["conservation_error"] < 2.5 * high
