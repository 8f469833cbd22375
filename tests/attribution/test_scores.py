"""Nodes that are chosen by their score: of a model's neurons, and of a coder's features."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import FOLDER, golden_model
from handmade_coders import LAST
from more_cases import mark_others
from random_coders import random_coder
from traced_graphs import DOUBLE, assert_close, assert_same, make_case, measure_residual, trace_whole_graph

import jclt
from jclt.attribution import Direction, attribute, attribute_batch, schedule
from jclt.attribution.options import Options, parse_nodes
from jclt.attribution.scores import choose_highest, score_layer
from jclt.cli.main import main
from jclt.coders import CoderConfig, abstract_coder, neurons, save_coder
from jclt.errors import UserError
from jclt.graphs import Graph, load_graph
from jclt.mesh import make_sharding
from jclt.pods.collectives import find_collectives
from jclt.world.handmade import PROMPTS, STATE_OF_CITY, build_two_hop

CASES = [*DOUBLE.items(), ("llama3", "neurons"), ("gemma3", "neurons")]
FEW = [("gemma2", "neurons")]


@pytest.fixture
def kept(monkeypatch) -> list[Any]:
    """The scores of each batch."""
    kept, score = [], schedule.score_features

    def keep(*arguments):
        scores, gradients = score(*arguments)
        kept.append(scores)
        return scores, gradients

    monkeypatch.setattr(schedule, "score_features", keep)
    return kept


def sum_paths(graph: Graph) -> np.ndarray:
    """By output and feature, the sum over all paths of the products of edges, each edge into a feature divided by its
    value: by how much the output moves if the feature's activation moves by itself."""
    count = len(graph.features)
    edges = graph.adjacency[:count, :count] / graph.values[:count, None]
    return graph.adjacency[graph.nodes.find("output")][:, :count] @ np.linalg.inv(np.eye(count) - edges)


def take_scores(scores: list[Any], graph: Graph, covered: tuple[int, ...], prompt: int = 0) -> np.ndarray:
    arrays = [np.asarray(layer.values) for layer in scores]
    return np.array([arrays[covered.index(layer)][prompt, place, i] for layer, place, i in graph.features.tolist()])


def find_rows(part: Graph, graph: Graph) -> np.ndarray:
    """The numbers in the whole graph of the features of a part."""
    order = {tuple(place): number for number, place in enumerate(graph.features.tolist())}
    return np.array([order[tuple(place)] for place in part.features.tolist()])


@pytest.mark.parametrize(("family", "kind"), mark_others(CASES, FEW))
def test_a_score_is_the_sum_over_all_paths_of_the_whole_graph(family, kind, kept):
    with jax.enable_x64(True):
        model, coder, tokens = make_case(family, kind, "float64")
        graph = attribute(model, coder, tokens)
        part = attribute(model, coder, tokens, nodes=10)
    assert graph.logit_weights is not None and len(kept) == 1 and "chosen" not in graph.provenance
    want = graph.logit_weights @ np.abs(sum_paths(graph))
    got = take_scores(kept[0], graph, coder.config.covered)
    assert_close(got, want, 1e-6)  # scores are kept in float32
    np.testing.assert_array_equal(find_rows(part, graph), np.sort(np.argsort(-want)[:10]))
    share = want[find_rows(part, graph)].sum() / want.sum()
    chosen = part.provenance["chosen"]
    assert chosen == {"nodes": 10, "of": len(graph.features), "share_of_score": pytest.approx(share, abs=1e-4)}
    assert measure_residual(part) < 1e-10


@pytest.mark.exhaustive  # a plain run compares scores with sums over all paths
def test_a_score_is_what_ablating_a_neuron_changes(kept):
    """With patterns and norms frozen the model is linear in the neurons of its last layer."""
    model, coder, tokens = make_case("llama3", "neurons", "float32")
    attribute(model, coder, tokens, targets=[3], nodes=10)
    place, every = (model.config.layers - 1, len(tokens) - 1), np.arange(model.config.vocabulary)
    features = np.array([(*place, neuron) for neuron in range(model.config.mlp_width)])
    effects = jclt.ablate(model, coder, tokens, features, tokens=every, progress=False).effects
    scores = kept[0][-1].values[0, len(tokens) - 1]
    assert_close(scores, np.abs(effects[:, 3] - effects.mean(axis=1)), 1e-4)


def test_what_is_not_chosen_is_error():
    with jax.enable_x64(True):
        model, coder, tokens = make_case("gemma2", "neurons", "float64")
        graph, part = attribute(model, coder, tokens), attribute(model, coder, tokens, nodes=10)
        less = attribute(model, coder, tokens, nodes=10, max_features=5)
    chosen, errors = find_rows(part, graph), graph.nodes.find("error")
    edges = graph.adjacency[[*chosen, *graph.nodes.find("output")]]
    for number in np.setdiff1d(np.arange(len(graph.features)), chosen):
        (error,) = np.flatnonzero((graph.errors == graph.features[number, :2]).all(axis=1))
        edges[:, errors[error]] += edges[:, number]
    targets = part.nodes.find("feature", "output")
    assert_close(part.adjacency[targets][:, : len(chosen)], edges[:, chosen], 1e-10)
    assert_close(part.adjacency[targets][:, part.nodes.find("error")], edges[:, errors], 1e-10)
    assert_close(part.values[targets], graph.values[[*chosen, *graph.nodes.find("output")]], 1e-10)
    assert len(less.features) == 5 and less.rest.any()
    assert measure_residual(part) < 1e-10 and measure_residual(less) < 1e-10


def test_all_features_chosen_is_the_graph_without_choosing(kept):
    model, coder, tokens = make_case("llama3", "neurons", "float32")
    graph = trace_whole_graph("llama3", "neurons", "float32")
    assert_same(attribute(model, coder, tokens, nodes=len(graph.features)), graph)
    part = attribute(model, coder, tokens, nodes=1.0)  # all that have any influence
    kept_features = find_rows(part, graph)
    np.testing.assert_array_equal(kept_features, np.flatnonzero(graph.influence[: len(graph.features)]))
    assert part.provenance["chosen"]["share_of_score"] == 1 and len(part.features) < len(graph.features)
    rows = [*kept_features, *graph.nodes.find("output")]
    for kinds in (("feature",), ("token",)):
        columns = [np.intersect1d(graph.nodes.find(*kinds), [*kept_features, *graph.nodes.find("token")])]
        edges = part.adjacency[part.nodes.find("feature", "output")][:, part.nodes.find(*kinds)]
        assert_close(edges, graph.adjacency[rows][:, columns[0]], 1e-5)


def test_a_share_takes_the_fewest_features_that_have_it(kept):
    model, coder, tokens = make_case("llama3", "clt", "float32")
    part = attribute(model, coder, tokens, nodes=0.7)
    scores = np.sort(np.concatenate([np.asarray(layer.values).ravel() for layer in kept[0]]))[::-1]
    fewest = 1 + np.searchsorted(np.cumsum(scores, dtype=np.float64) / scores.sum(dtype=np.float64), 0.7)
    assert len(part.features) == fewest == part.provenance["chosen"]["nodes"]
    assert 0.7 <= part.provenance["chosen"]["share_of_score"] < 0.8
    assert part.provenance["settings"]["nodes"] == 0.7


@pytest.mark.exhaustive  # a plain run names the number of nodes
def test_a_dense_basis_chooses_and_a_sparse_one_does_not(monkeypatch):
    monkeypatch.setattr("jclt.attribution.options.NODES_OF_DENSE_BASIS", 10)
    model, coder, tokens = make_case("llama3", "neurons", "float32")
    graphs = attribute_batch(model, coder, [tokens, tokens[:3]])
    assert_same(graphs[0], attribute(model, coder, tokens))
    for graph, prompt in zip(graphs, [tokens, tokens[:3]], strict=True):
        assert (
            len(graph.features) == 10
            and measure_residual(graph) < 1e-5
            and graph.provenance["chosen"]["of"] == 3 * 36 * len(prompt)
        )
    sparse = attribute(*make_case("llama3", "clt", "float32"))
    assert len(sparse.features) > 10 and "chosen" not in sparse.provenance


def test_neurons_are_the_known_nodes_of_the_two_hop_model():
    model = build_two_hop(norms=True)
    coder = jclt.load_coder("neurons", model=model)
    for city, prompt in list(enumerate(PROMPTS))[::5]:
        graph = attribute(model, coder, np.array(prompt), nodes=2)
        np.testing.assert_array_equal(graph.features, [[0, LAST, city], [1, LAST, STATE_OF_CITY[city]]])


def test_outputs_may_read_in_a_layer(kept):
    """A direction in what the coder reads in layer 1: only features of layer 0 reach it."""
    model, coder, tokens = make_case("llama3", "clt", "float32")
    target = Direction(np.random.default_rng(0).standard_normal(model.config.width), layer=1, position=2)
    graph = attribute(model, coder, tokens, targets=[target])
    part = attribute(model, coder, tokens, targets=[target], nodes=4)
    want = np.abs(graph.adjacency[graph.nodes.find("output")][0, : len(graph.features)])
    assert_close(take_scores(kept[0], graph, coder.config.covered), want, 1e-5)
    assert len(part.features) == 4 and (part.features[:, 0] == 0).all()
    first = Direction(np.ones(model.config.width), layer=0)
    with pytest.raises(UserError, match="^prompt: no feature of the coder has any influence on the outputs"):
        attribute(model, coder, tokens, targets=[first], nodes=4)


@pytest.mark.parametrize("conventions", ["jclt", "circuit-tracer"])
def test_silent_positions_have_no_nodes(conventions):
    model, coder, tokens = make_case("llama3", "clt", "float32")
    graph = attribute(model, coder, tokens, nodes=10, conventions=conventions)
    assert len(graph.features) == 10 and measure_residual(graph) < 1e-5
    assert (graph.features[:, 1] > 0).all() == (conventions == "circuit-tracer")


@pytest.mark.exhaustive  # test_places_of_coders.py tests the same gathering of rows
@pytest.mark.parametrize("kind", ["clt", "transcoder"])
def test_the_nodes_do_not_depend_on_where_the_coder_lies(kind, tmp_path):
    model = golden_model("llama3")
    coder = random_coder(CoderConfig(kind, 24, skip=kind == "transcoder").fit_to_model(model.config, "random"))
    save_coder(coder, tmp_path / "saved")
    prompts = [np.random.default_rng(seed).integers(0, 96, 5) for seed in (0, 1)]
    want = attribute_batch(model, coder, prompts, nodes=0.6)
    for keep in (jclt.make_mesh(2, 2), "disk"):
        there = jclt.load_coder(tmp_path / "saved", keep=keep)
        for got, graph in zip(attribute_batch(model, there, prompts, nodes=0.6), want, strict=True):
            assert_same(got, graph)
            assert got.provenance["chosen"] == graph.provenance["chosen"]


def test_no_program_that_scores_gathers_features():
    """Sizes differ from one another, so that a shape says what its axes are."""
    mesh, config = jclt.make_mesh(), CoderConfig("clt", 4 * 43).fit_to_model(golden_model("llama3").config, "random")
    coder = random_coder(config)
    coder = jax.device_put(coder, jax.tree.map(lambda x: x.sharding, abstract_coder(config, mesh)))
    place = make_sharding(mesh, (), ())
    length, outputs = 7, 16
    x, gradients = (
        np.zeros((3, length, config.size), np.float32),
        np.zeros((3, outputs, length, config.size), np.float32),
    )
    arrays = jax.device_put((x, np.ones((3, length), bool), (gradients,) * 3, np.ones((3, outputs), np.float32)), place)
    with jax.set_mesh(mesh):
        encoder, rows = coder.load_encoder(0), coder.decoder_rows(0)
        values, active, _ = score_layer(encoder, rows, *arrays)
        assert values.sharding.spec == jax.P(None, None, "features")
        programs = [score_layer.lower(encoder, rows, *arrays)]
        programs += [choose_highest.lower((values,), active, jnp.asarray(nodes)) for nodes in (5, np.float32(0.5))]
        for program in programs:
            collectives = find_collectives(program.compile().as_text())
            assert collectives and all(op.kind == "all-reduce" for op in collectives), program.as_text()[:200]
            assert not any(op.has_axis(config.features) or op.has_axis(config.features // 4) for op in collectives)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (0, "nodes=0: expected"),
        (1.5, "nodes=1.5: expected"),
        (0.0, "nodes=0.0:"),
        (True, "nodes=True:"),
    ],
)
def test_wrong_numbers_of_nodes_are_errors_of_one_line(nodes, message):
    with pytest.raises(UserError, match=message) as caught:
        attribute(*make_case("llama3", "clt", "float32"), nodes=nodes)
    assert "\n" not in str(caught.value)
    assert parse_nodes(np.int64(3)) == 3 and parse_nodes(np.float32(0.5)) == 0.5 and Options().nodes is None


def test_neurons_are_a_coder_by_name():
    model = golden_model("llama3")
    coder = jclt.load_coder("neurons", model=model)
    assert coder.config == neurons(model).config and coder.config.dense
    assert coder.params["up"] is model.params["up"]
    with pytest.raises(UserError, match="^coder 'neurons': expected model=, the model whose neurons they are$"):
        jclt.load_coder("neurons")
    for argument, value in (("keep", "disk"), ("keep", jclt.make_mesh()), ("dtype", "float16"), ("reads", "mlp_in")):
        with pytest.raises(
            UserError, match=f"^coder 'neurons': {argument}=.*, expected none: they are the model's own"
        ):
            jclt.load_coder("neurons", model=model, **{argument: value})


def test_the_command_takes_neurons_and_says_what_was_chosen(tmp_path, capsys):
    arguments = ["--model", str(FOLDER / "llama3"), "--coder", "neurons", "--nodes", "10", "--out", str(tmp_path)]
    assert main(["attribute", "word4 word9 word6 word7", *arguments]) == 0
    chosen = load_graph(tmp_path / "word4-word9-word6-word7.npz").provenance["chosen"]
    assert chosen["nodes"] == 10 and chosen["of"] == 3 * 36 * 5
    says = f"nodes are 10 of 540 active features, with {chosen['share_of_score']:.1%} of the influence to first order"
    assert says in capsys.readouterr().out.splitlines()
