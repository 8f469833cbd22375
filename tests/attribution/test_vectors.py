"""Heads and residual streams as nodes: their values and edges are derivatives of a linear model that is written down
here, block by block; and what passes through them passes through nothing else."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import FOLDER
from more_cases import mark_others
from traced_graphs import DOUBLE, Case, assert_close, assert_same, make_case, measure_residual, trace_whole_graph

import jclt
from jclt.attribution import attribute, attribute_batch, schedule
from jclt.attribution.local import LocalModel, list_frozen_sites, read_final, run_layer
from jclt.attribution.options import parse_cuts
from jclt.attribution.ranking import PromptRows
from jclt.attribution.sizes import estimate_vector_bytes, estimate_vector_pass_bytes
from jclt.cli.main import main
from jclt.errors import UserError
from jclt.graphs import Graph, describe, export_json, import_json, load_graph, strongest_paths
from jclt.models.weights import declare_layer_weights

CASES = [*DOUBLE.items(), ("gemma2", "raw skips"), ("gpt2", "neurons"), ("neox", "clt"), ("gemma3", "skip")]
FEW = [("neox", "some skips")]
"""Parallel blocks, norms that subtract the mean, biases and skips. Post-norms, groups of heads, neurons and CLTs are
among the others; batches are tested with post-norms."""


class Parts(NamedTuple):
    """What the reference is computed from, by layer."""

    local: LocalModel
    params: dict[str, Any]
    seen: dict[str, Any]
    encoders: list[tuple[Any, Any]]
    decoders: list[Any]
    activations: list[Any]
    constant: Any
    skips: Any
    errors: Any
    unembeddings: Any

    def run_layer(self, layer: int, stream: Any, write: Any, edit: Any) -> tuple[Any, Any]:
        config, frozen = self.local.model, list_frozen_sites(self.local.model)
        weights = {name: self.params[name][layer] for name in declare_layer_weights(config)}
        of_layer = {name: self.seen[name][layer] for name in frozen if name != "final_denominator"}
        return run_layer(
            self.local, weights, of_layer, self.skips[layer], jnp.asarray(stream), jnp.asarray(write), edit
        )


def gather_parts(case: Case, graph: Graph) -> Parts:
    model, coder, tokens = case
    c, config = model.config, coder.config
    local = LocalModel(c, config.reads, config.writes)
    sites = (*list_frozen_sites(c), *embedding_sites(case), local.reads, local.writes, "head_out", "resid_pre")
    _, seen = jclt.run(model, tokens, capture=sites)
    reads, writes = seen[local.reads], seen[local.writes]
    constant, skips = np.zeros(reads.shape), np.zeros((c.layers, c.width, c.width))
    for index, layer in enumerate(config.covered):
        constant[layer] = coder.decoder_bias(index)
        skip = coder.skip(index)
        skips[layer] = 0 if skip is None else skip
    parts = Parts(
        local,
        dict(model.params),
        dict(seen),
        [coder.encoder(index) for index in range(len(config.covered))],
        [coder.decoder_rows(index) for index in range(len(config.covered))],
        [coder.encode(index, reads[layer]) for index, layer in enumerate(config.covered)],
        constant,
        jnp.asarray(skips),
        writes - constant - np.einsum("ltd,led->lte", reads, skips),
        find_unembeddings(case, graph),
    )
    written = np.zeros(reads.shape)
    for index, activations in enumerate(parts.activations):
        for later, rows in zip(config.covered[index:], np.moveaxis(parts.decoders[index], 1, 0), strict=False):
            written[later] += np.asarray(activations) @ rows
    return parts._replace(errors=parts.errors - written)


def embedding_sites(case: Case) -> list[str]:
    return ["token_embedding", *(["position_embedding"] if case.model.config.learned_positions else [])]


def find_unembeddings(case: Case, graph: Graph) -> np.ndarray:
    table = np.asarray(case.model.params["token_embedding" if case.model.config.tied else "unembedding"])
    return table[graph.logit_tokens] - table.mean(axis=0)


def differentiate_outputs(case: Case, parts: Parts, weights: np.ndarray) -> tuple[Any, Any]:
    """The derivatives of the outputs' weighted sum by what heads' values and residual streams are, features put in:
    each is the activation that it has, divided by its pre-activation, times its pre-activation."""
    covered, embedded = case.coder.config.covered, jnp.asarray(sum(parts.seen[x] for x in embedding_sites(case)))
    quotients = [
        jnp.where(activations == 0, 0, activations / (parts.seen[parts.local.reads][layer] @ rows.T + biases[None]))
        for layer, activations, (rows, biases) in zip(covered, parts.activations, parts.encoders, strict=True)
    ]

    def run(of_heads: Any, of_streams: Any) -> Any:
        stream, writes = embedded, list(parts.constant + parts.errors)
        for layer in range(parts.local.model.layers):
            stream = stream + of_streams[layer]
            edit = partial(lambda added, place, x: x + added[None] if place.site == "head_out" else x, of_heads[layer])
            if layer in covered:
                index = covered.index(layer)
                _, read = parts.run_layer(layer, stream, writes[layer], edit)
                rows, biases = parts.encoders[index]
                activations = quotients[index] * (read @ rows.T + biases[None])
                for place, later in enumerate(covered[index:][: parts.decoders[index].shape[1]]):
                    writes[later] = writes[later] + activations @ parts.decoders[index][:, place]
            stream, _ = parts.run_layer(layer, stream, writes[layer], edit)
        final = read_final(parts.local.model, case.model.params, take_final(parts), jnp.asarray(stream))
        return weights @ (parts.unembeddings @ final[-1])

    zeros = jnp.zeros_like(parts.seen["head_out"]), jnp.zeros_like(parts.seen["resid_pre"])
    return jax.jit(jax.grad(run, argnums=(0, 1)))(*zeros)


def take_final(parts: Parts) -> dict[str, Any]:
    return {"final_denominator": parts.seen["final_denominator"]}


def linear_model(case: Case, graph: Graph) -> tuple[Callable[[Any], Any], int]:
    """The targets' values as a function of a factor for each source, in the order of a graph's sources; and the number
    of sources."""
    parts, covered = gather_parts(case, graph), case.coder.config.covered
    assert graph.logit_weights is not None
    of_heads, of_streams = differentiate_outputs(case, parts, graph.logit_weights)
    layers, length = parts.local.model.layers, len(case.tokens)
    features = np.zeros((len(graph.features), *parts.constant.shape))
    for number, (layer, position, feature) in enumerate(graph.features):
        rows = np.asarray(parts.decoders[covered.index(layer)][feature])
        later = [other for other in covered if other >= layer][: len(rows)]
        features[number, later, position] = parts.activations[covered.index(layer)][position, feature] * rows
    sizes = [
        len(features),
        layers * length,
        *[length] * len(embedding_sites(case)),
        len(graph.heads),
        len(graph.streams),
    ]
    read_rows = [parts.encoders[covered.index(layer)][0][feature] for layer, _, feature in graph.features]
    read_biases = np.array([parts.encoders[covered.index(layer)][1][feature] for layer, _, feature in graph.features])
    (head_layers, head_positions, heads), (cuts, cut_positions) = graph.heads.T, graph.streams.T

    def compute_values(amounts: Any) -> Any:
        amount_features, errors, *embeddings, head_amounts, stream_amounts = jnp.split(amounts, np.cumsum(sizes)[:-1])
        writes = parts.constant + jnp.einsum("n,nltd->ltd", amount_features, features)
        writes = writes + errors.reshape(layers, length, 1) * parts.errors
        sites = zip(embeddings, embedding_sites(case), strict=True)
        stream = sum((amount[:, None] * parts.seen[site] for amount, site in sites), jnp.zeros_like(parts.constant[0]))
        reads, seen_heads, seen_streams = [], [], []
        for layer in range(layers):
            seen_streams.append(stream)
            here, inside = np.flatnonzero(cuts == layer), np.flatnonzero(head_layers == layer)
            at = cut_positions[here]
            stream = stream.at[at].set(stream_amounts[here, None] * parts.seen["resid_pre"][layer][at])

            def edit(place: Any, x: Any, layer: int = layer, inside: Any = inside) -> Any:
                if place.site != "head_out":
                    return x
                seen_heads.append(x[0])
                at = 0, head_positions[inside], heads[inside]
                return x.at[at].set(head_amounts[inside, None] * parts.seen["head_out"][layer][at[1:]])

            stream, read = parts.run_layer(layer, stream, writes[layer], edit)
            reads.append(read)
        final = read_final(parts.local.model, case.model.params, take_final(parts), stream)
        read = jnp.stack(reads)[graph.features[:, 0], graph.features[:, 1]]
        values_heads = (jnp.stack(seen_heads) * of_heads).sum(axis=-1)[head_layers, head_positions, heads]
        values_streams = (jnp.stack(seen_streams) * of_streams).sum(axis=-1)[cuts, cut_positions]
        values_features = jnp.sum(read * jnp.stack(read_rows), axis=1) + read_biases
        return jnp.concatenate([values_features, values_heads, values_streams, parts.unembeddings @ final[-1]])

    return compute_values, sum(sizes)


@pytest.mark.parametrize(("family", "kind"), mark_others(CASES, FEW))
def test_rows_are_those_of_the_linear_model_and_paths_keep_their_sums(family, kind):
    with jax.enable_x64():
        case, plain = make_case(family, kind, "float64"), trace_whole_graph(family, kind, "float64")
        graph = attribute(*case, heads=True, cuts=(1, 2))
        values, count = linear_model(case, graph)
        values = jax.jit(values)
        targets, everything = graph.nodes.find("feature", "head", "stream", "output"), np.ones(count)
        assert_close(graph.values[targets], values(everything), 1e-10)
        assert_close(graph.bias[targets], values(np.zeros(count)), 1e-10)
        assert_close(graph.adjacency[targets][:, :count], jax.jit(jax.jacrev(values))(everything), 1e-10)
    assert len(graph.heads) > 20 and len(graph.streams) == 2 * len(case.tokens)
    assert measure_residual(graph) <= 1e-12 and graph.adjacency.dtype == np.float64
    check_ways(graph, all_heads=True, writes_on=case.coder.config.kind == "clt" and kind != "neurons")
    sources = plain.nodes.find("feature", "error", "token", "position")
    assert_close(sum_paths(graph)[sources], sum_paths(plain)[sources], 1e-10)


def check_ways(graph: Graph, all_heads: bool, writes_on: bool = False) -> None:
    """Edges lead past no residual stream, but from features that write to later layers, too. If all heads are nodes,
    edges lead to other positions only into heads, and into features without influence on the outputs, as the heads that
    these read have none either."""
    rows, columns = np.nonzero(graph.adjacency)
    order, kind = graph.nodes.order, graph.nodes.kind
    for cut in np.unique(graph.streams[:, 0]):
        past = (order[columns] < 3 * cut) & (order[rows] > 3 * cut)
        assert not (past & ~(writes_on & (kind[columns] == "feature"))).any()
    if all_heads:
        other = graph.nodes.position[rows] != graph.nodes.position[columns]
        is_free = (kind == "head") | (graph.nodes.is_kind("feature") & (graph.influence == 0))
        assert is_free[rows[other]].all() and other.any()
    assert (order[columns] < order[rows]).all()


def sum_paths(graph: Graph) -> np.ndarray:
    """Of each node, the sum over all paths to the outputs of the products of edges, each edge into another node divided
    by its value, times the output's weight."""
    inner = graph.nodes.is_kind("feature", "head", "stream") & (graph.values != 0)
    edges = graph.adjacency / np.where(inner, graph.values, 1)[:, None] * inner[:, None]
    return graph.output_weights @ graph.adjacency @ np.linalg.inv(np.eye(len(graph)) - edges)


@pytest.mark.exhaustive  # test_parts_of_graphs_and_batches_keep_the_law has some heads, and their number
def test_some_heads_are_those_with_the_highest_values():
    case = make_case("gemma2", "raw skips", "float32")
    graph, part = attribute(*case, heads=True), attribute(*case, heads=7, cuts=(2,))
    assert_same(attribute_batch(case.model, case.coder, [case.tokens[:3], case.tokens], heads=7, cuts=(2,))[1], part)
    sizes = np.abs(graph.values[graph.nodes.find("head")])
    np.testing.assert_array_equal(part.heads, graph.heads[np.sort(np.argsort(-sizes)[:7])])
    share = pytest.approx(np.sort(sizes)[-7:].sum() / sizes.sum(), abs=1e-4)
    of = graph.provenance["chosen_heads"]["of"]
    assert part.provenance["chosen_heads"] == {"nodes": 7, "of": of, "share_of_values": share}
    assert graph.provenance["chosen_heads"]["share_of_values"] == 1 and len(graph.heads) <= of
    assert part.provenance["settings"]["heads"] == 7 and part.provenance["settings"]["cuts"] == [2]
    assert measure_residual(part) < 1e-5
    check_ways(part, all_heads=False)
    plain = trace_whole_graph("gemma2", "raw skips", "float32")
    np.testing.assert_array_equal(part.features, plain.features)
    assert not {"heads", "cuts"} & set(plain.provenance["settings"]) and "chosen_heads" not in plain.provenance


@pytest.mark.parametrize("conventions", mark_others(["jclt", "circuit-tracer"], ["circuit-tracer"]))
def test_parts_of_graphs_and_batches_keep_the_law(conventions, monkeypatch):
    model, coder, tokens = make_case("gemma2", "raw skips", "float32")
    options: Any = {"heads": 9, "cuts": (1,), "conventions": conventions, "max_features": 30}
    graphs = attribute_batch(model, coder, [tokens, tokens[:3]], **options)
    for graph in graphs:
        assert len(graph.heads) == 9 and len(graph.streams) == len(graph.tokens) - (conventions != "jclt")
        assert measure_residual(graph) < 1e-5 and measure_residual(graph.prune()) < 1e-5
        silent = int(conventions != "jclt")
        assert graph.heads[:, 1].min() >= silent and graph.streams[:, 1].min() == silent

    # With a tolerance, rows of the first layer have no edges for nothing: heads lead into features there.
    rounds, choose_next = [], PromptRows.choose_next
    monkeypatch.setattr("jclt.attribution.ranking.ROUND_SIZE", 8)
    monkeypatch.setattr(PromptRows, "choose_next", lambda rows: rounds.append(choose_next(rows)) or rounds[-1])
    part = attribute_batch(model, coder, [tokens, tokens[:3]], **options | {"tolerance": 0.05, "max_features": 90})[0]
    assert 0 in part.features[:, 0] and part.missing < 0.05
    assert max(map(len, rounds)) <= (8 if conventions == "jclt" else 1024)


def test_estimates_of_memory_count_them(monkeypatch):
    """Within a factor of the bytes of the arrays."""
    model, coder, tokens = make_case("gemma2", "raw skips", "float32")
    calls: dict[str, tuple[Any, ...]] = {}

    def watch(name: str):
        run = getattr(schedule, name)
        monkeypatch.setattr(schedule, name, lambda *some: calls.setdefault(name, (run(*some), *some))[0])

    def count_bytes(*trees: Any) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(trees))

    watch("choose_vectors")
    watch("fold_nodes")
    options: Any = {"heads": 9, "cuts": (1,), "conventions": "circuit-tracer", "max_features": 30}
    attribute_batch(model, coder, [tokens, tokens[:3]], **options)
    chosen, gradients, true_pass, has_nodes, *_ = calls["choose_vectors"]
    prompts, length = has_nodes.shape
    of_pass = count_bytes(gradients, true_pass.heads, true_pass.streams)
    assert 1 <= prompts * estimate_vector_pass_bytes(model.config, length, 4) / of_pass < 2
    of_nodes = count_bytes(chosen.nodes, calls["fold_nodes"][0].vectors)
    assert 0.7 < prompts * estimate_vector_bytes(model.config, length, chosen.nodes, 4) / of_nodes < 1.5


def test_files_and_texts_know_them(tmp_path, capsys):
    arguments = ["--model", str(FOLDER / "llama3"), "--coder", "neurons", "--nodes", "10", "--out", str(tmp_path)]
    assert main(["attribute", "word4 word9 word6 word7", *arguments, "--heads", "5", "--cuts", "1,2"]) == 0
    assert "heads that are nodes: 5 of" in capsys.readouterr().out
    graph = load_graph(tmp_path / "word4-word9-word6-word7.npz")
    assert (len(graph.heads), len(graph.streams)) == (5, 10) and measure_residual(graph) < 1e-5
    read = import_json(tmp_path / "word4-word9-word6-word7.json")
    pruned = graph.prune()
    for name in ("features", "heads", "streams", "errors"):
        np.testing.assert_array_equal(getattr(read, name), getattr(pruned, name))
    assert_close(read.adjacency, pruned.adjacency, 1e-6)
    assert {"lorsa"} == {x["feature_type"] for x in export_json(graph)["nodes"] if x["node_id"][0] in "HR"}
    said = [describe(graph, path) for path in strongest_paths(graph, 40)]
    assert any("residual stream 2 at " in path for path in said) and any("head " in path for path in said)
    graph.save(tmp_path / "again.npz")
    assert_same(load_graph(tmp_path / "again.npz"), graph)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "heads=0: expected a number from 1 on"),
        ({"cuts": (0,)}, "cuts: layer 0, expected one from 1 to 2"),
        ({"cuts": (3,)}, "cuts: layer 3, expected one from 1 to 2"),
    ],
)
def test_wrong_choices_are_errors_of_one_line(options, message):
    with pytest.raises(UserError, match=f"^{message}") as caught:
        attribute(*make_case("llama3", "clt", "float32"), **options)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="^cuts='1': expected numbers of layers, such as"):
        parse_cuts("1")
