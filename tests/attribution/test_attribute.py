"""`attribute`: many prompts at once, parts of graphs and what they lack, targets, and bad input."""

import itertools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import golden_model
from random_coders import random_coder
from tokenizers import Tokenizer, models
from traced_graphs import assert_close, assert_same, make_case, measure_residual, trace_whole_graph

import jclt
from jclt.attribution import Direction, attribute, attribute_batch, attribute_each, calls, placement, sizes
from jclt.attribution import schedule as tracing
from jclt.attribution.local import LocalModel, Weights
from jclt.attribution.options import Options, count_silent_positions
from jclt.attribution.prompts import encode_prompt, list_unknown_words
from jclt.attribution.ranking import PromptRows
from jclt.attribution.sizes import estimate_sizes
from jclt.attribution.targets import choose_likeliest, parse_targets
from jclt.attribution.true_pass import run_true_pass
from jclt.coders import Coder, CoderConfig
from jclt.errors import UserError
from jclt.fingerprints import fingerprint
from jclt.graphs import Graph
from jclt.graphs.adjacency import SparseRows
from jclt.models import Tokenizer as ModelTokenizer
from jclt.models import declare
from jclt.models.chat import ChatTemplate
from jclt.models.weights import declare_layer_weights

attributing = sys.modules["jclt.attribution.attribute"]  # the package has a function of this name

CASE = ("llama3", "clt", "float32")
"""Programs are compiled for numbers of prompts, tokens and active features, rounded up. Nearly all tests have the same:
this model, with prompts of five tokens or some of them, one by one or in batches of three."""


def change_weights(coder: Coder, name: str, change: Callable[[np.ndarray], Any]) -> Coder:
    """The coder with other arrays in place of those of this name."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.device_put(change(np.array(x))) if path[-1].name == name else x, coder
    )


def change_first(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """Puts this value in place of an array's first entry or row."""
    return lambda x: np.concatenate([np.full_like(x[:1], value), x[1:]])


def convert(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(np.asarray(x).astype(dtype)), tree)


def weights_of(graph: Graph) -> np.ndarray:
    assert graph.logit_weights is not None
    return graph.logit_weights


# Many prompts.


def draw_prompt(seed: int, length: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 96, length)


def test_many_prompts_have_the_graphs_that_each_has_alone():
    """On four devices. The batches have fewer prompts than devices, and differ in length and number of prompts: three
    of at most 8 tokens, and one of more."""
    assert len(jax.local_devices()) == 4
    model, coder, tokens = make_case(*CASE)
    prompts = [draw_prompt(0, 9), tokens, draw_prompt(1), draw_prompt(2, 4)]  # not in order of length
    graphs = attribute_batch(model, coder, prompts)
    assert [len(graph.tokens) for graph in graphs] == [len(prompt) for prompt in prompts]
    assert len({len(graph.features) for graph in graphs}) == 4
    for graph, prompt in zip(graphs, prompts, strict=True):
        assert measure_residual(graph) < 1e-5
        if len(prompt) <= 8:  # the other is of a shape of its own
            assert_same(graph, attribute(model, coder, prompt))


def test_a_batch_may_be_smaller_than_the_prompts_or_empty(monkeypatch):
    monkeypatch.setattr("jclt.attribution.ranking.ROUND_SIZE", 40)  # some prompts are done a round before others
    model, coder, tokens = make_case(*CASE)
    others = [tokens[:2], draw_prompt(0), tokens, draw_prompt(1)]
    assert attribute_batch(model, coder, []) == []
    graphs = attribute_batch(model, coder, others, max_features=60, batch=3)
    assert [len(graph.features) < 60 for graph in graphs] == [True, False, False, False]
    for graph, prompt in zip(graphs, others, strict=True):
        np.testing.assert_array_equal(graph.tokens, prompt)
        assert measure_residual(graph) < 1e-5 and (len(graph.features) == 60) == bool(graph.rest.any())


# Parts of graphs.


@pytest.fixture
def many_rounds(monkeypatch):
    monkeypatch.setattr("jclt.attribution.ranking.ROUND_SIZE", 8)


def test_the_features_kept_do_not_depend_on_how_rows_are_computed(many_rounds, monkeypatch):
    want = attribute(*make_case(*CASE), max_features=45)
    monkeypatch.setattr("jclt.attribution.sweep.blocks.BLOCK_OVERHEAD", 0)
    monkeypatch.setattr("jclt.attribution.sizes.LARGEST_BLOCK", {"cpu": 16})
    assert_same(attribute(*make_case(*CASE), max_features=45), want)
    full_graph = trace_whole_graph(*CASE)
    assert len(want.features) == 45 < len(full_graph.features)
    assert_same(attribute(*make_case(*CASE)), full_graph)  # in blocks and windows, too


def test_the_first_round_keeps_the_most_influential_features(monkeypatch):
    full_graph = trace_whole_graph(*CASE)
    monkeypatch.setattr("jclt.attribution.ranking.ROUND_SIZE", 10)
    graph = attribute(*make_case(*CASE), max_features=10)
    # Before any feature is traced, influence is the rows of the outputs, divided by their sums.
    rows = np.abs(full_graph.adjacency[full_graph.nodes.find("output")])
    direct = weights_of(full_graph) @ (rows / rows.sum(axis=1, keepdims=True))
    first = np.sort(np.argsort(-direct[full_graph.nodes.find("feature")])[:10])
    np.testing.assert_array_equal(graph.features, full_graph.features[first])


def test_a_budget_of_all_features_is_no_budget(many_rounds):
    full_graph = trace_whole_graph(*CASE)
    assert not full_graph.rest.any() and full_graph.missing == 0
    assert_same(attribute(*make_case(*CASE), max_features=len(full_graph.features)), full_graph)
    part = attribute(*make_case(*CASE), tolerance=1e-9)  # round by round, but for features that are never visited
    is_kept = np.ones(len(full_graph), bool)
    is_kept[: len(full_graph.features)] = (full_graph.features[:, None] == part.features[None]).all(axis=2).any(axis=1)
    assert (full_graph.influence[~is_kept] == 0).all() and not is_kept.all()
    assert_same(part, full_graph.keep(is_kept))


@pytest.mark.parametrize("options", [{"tolerance": 0.5}, {"tolerance": 0.15}, {"max_features": 20}])
def test_what_is_missing_bounds_every_influence_and_score(many_rounds, options):
    full_graph, part = trace_whole_graph(*CASE), attribute(*make_case(*CASE), **options)
    lost = part.missing
    assert 0 < lost < options.get("tolerance", 1.0)
    assert len(part.features) < len(full_graph.features) and len(part.features) <= options.get("max_features", 7500)
    assert measure_residual(part) < 1e-5

    order = [tuple(place) for place in full_graph.features]
    at = [order.index(tuple(place)) for place in part.features]
    at += list(range(len(full_graph.features), len(full_graph)))
    below = full_graph.influence[at] - part.influence
    assert below.min() >= -1e-5 and below.max() <= lost * weights_of(full_graph).sum() + 1e-5
    assert below.max() > 1e-3
    for name in ("replacement", "completeness"):
        low, high = getattr(part.scores, f"{name}_interval")
        assert low - 1e-5 <= getattr(full_graph.scores, name) <= high + 1e-5
        assert high - low > 1e-3
    if "tolerance" in options:  # ranked alike, features of the first layer would leave more rows to compute
        budgets = (attribute(*make_case(*CASE), max_features=8 * rounds) for rounds in itertools.count(1))
        by_rank = next(graph for graph in budgets if graph.missing < options["tolerance"])
        assert np.count_nonzero(part.features[:, 0]) <= np.count_nonzero(by_rank.features[:, 0])


def test_rows_hold_what_can_reach_their_targets_and_are_dropped_for_the_graph(many_rounds, monkeypatch):
    """Otherwise each row would have a column for every active feature, and the graph would copy all rows."""
    rows_kept, build_graph = [], PromptRows.build_graph

    def watch(self, *arguments):
        rows_kept.append((self.source_count, [(rows.layer, *rows.edges.shape) for rows in self.rows]))
        graph = build_graph(self, *arguments)
        assert not self.rows
        return graph

    monkeypatch.setattr(PromptRows, "build_graph", watch)
    for options in ({}, {"max_features": 30}):
        graph = attribute(*make_case(*CASE), **options)
        sources, shapes = rows_kept.pop()
        count = len(graph.features) + len(graph.logit_tokens)
        assert sum(rows for _, rows, _ in shapes) == count
        assert all(columns <= sources * (layer + 1) / (graph.layers + 1) + 20 for layer, _, columns in shapes)
        assert sum(rows * columns for _, rows, columns in shapes) < 0.7 * count * sources
        if not options:
            counts = np.zeros((graph.layers, len(graph.tokens)), int)
            np.add.at(counts, (graph.features[:, 0], graph.features[:, 1]), 1)
            embeddings = 1 + bool(len(graph.positions))
            covered = tuple(range(graph.layers))
            outputs = len(graph.logit_tokens)
            estimate = estimate_sizes(counts, covered, graph.layers, embeddings, len(graph.features), outputs)
            numbers = sum(rows * columns for _, rows, columns in shapes)
            assert 0.5 * numbers < estimate.rows < 1.1 * numbers and estimate.nodes == len(graph)
            assert np.count_nonzero(graph.adjacency) <= estimate.edges
            assert estimate.count_bytes(4) == 4 * graph.adjacency.size


def test_a_large_graph_is_the_same_without_zeros(many_rounds, monkeypatch):
    monkeypatch.setattr("jclt.graphs.adjacency.LARGEST_ARRAY", 0)
    for options, want in (({}, trace_whole_graph(*CASE)), ({"max_features": 45}, None)):
        got = attribute(*make_case(*CASE), **options)
        assert isinstance(got.adjacency, SparseRows) and got.adjacency.weights.all()
        assert measure_residual(got) < 1e-5 and measure_residual(got.prune()) < 1e-5
        if want is not None:
            assert_same(got, want)


@pytest.mark.optimized
def test_the_true_pass_widens_the_weights_of_one_layer_at_a_time():
    config = replace(golden_model("llama3").config, layers=8, mlp_width=2048)
    layer_weights, length = declare_layer_weights(config), 5
    params = {
        name: jax.ShapeDtypeStruct(weight.shape, jnp.bfloat16 if name in layer_weights else jnp.float32)
        for name, weight in declare(config).items()
    }
    arrays = (
        jax.ShapeDtypeStruct((config.layers, config.width), jnp.float32),
        jax.ShapeDtypeStruct((1, length), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    local = LocalModel(config, "resid_mid", "mlp_out")
    memory = run_true_pass.lower(local, Weights(params, None), *arrays, 0).compile().memory_analysis()
    of_layer = 4 * sum(math.prod(weight.shape) for weight in layer_weights.values())
    assert memory.temp_size_in_bytes < 2 * of_layer


def test_blocks_are_computed_in_as_many_calls_as_memory_asks_for(monkeypatch):
    seen, trace = [], calls.trace_blocks

    def count(*arguments):
        seen.append(arguments[-1].numbers.shape[0])
        return trace(*arguments)

    monkeypatch.setattr(calls, "trace_blocks", count)
    monkeypatch.setattr(sizes, "LARGEST_BLOCK", {"cpu": 16})
    monkeypatch.setattr(sizes, "CALL_BYTES", {"cpu": 1})
    assert_same(attribute(*make_case(*CASE)), trace_whole_graph(*CASE))
    assert len(seen) > 3 and set(seen) == {1}


def test_features_that_write_to_one_layer_are_kept_for_that_layer_alone(monkeypatch):
    seen, gather = [], tracing.gather_sources

    def watch(coder, layout, plan, nodes, counts, *others):
        slots, sources = gather(coder, layout, plan, nodes, counts, *others)
        seen.append((np.asarray(counts), sources, layout))
        return slots, sources

    monkeypatch.setattr(tracing, "gather_sources", watch)
    model, coder, tokens = make_case("llama3", "skip", "float32")
    attribute(model, coder, tokens)
    ((counts, sources, layout),) = seen
    assert len(counts) == 1
    active, positions = counts.sum(), np.count_nonzero(counts)
    assert sources.tiles.size <= 2 * model.config.width * (active + positions * layout.tile_size)


def test_prompts_that_take_too_much_memory_together_are_traced_in_parts(monkeypatch):
    model, coder, tokens = make_case(*CASE)
    prompts = [tokens, draw_prompt(0), draw_prompt(1)]
    want, batch_sizes, gather = attribute_batch(model, coder, prompts), [], tracing.gather_sources
    monkeypatch.setattr(tracing, "gather_sources", lambda *args: (batch_sizes.append(len(args[4])), gather(*args))[1])
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(tracing, "BATCH_BYTES", {"cpu": 1})
    for got, expected in zip(attribute_batch(model, coder, prompts), want, strict=True):
        assert_same(got, expected)
    assert batch_sizes == [1, 1, 1]


def test_a_graph_that_does_not_fit_is_refused_before_it_is_traced(monkeypatch):
    model, coder, tokens = make_case(*CASE)
    monkeypatch.setattr(sizes, "CALL_BYTES", {"cpu": 1})
    monkeypatch.setattr(tracing, "gather_sources", lambda *_: pytest.fail("computed"))
    monkeypatch.setattr("jclt.attribution.sizes.measure_free_host_memory", lambda: 50_000)
    monkeypatch.setattr("jclt.memory.measure_free_host_memory", lambda: 50_000)
    monkeypatch.setattr(tracing, "estimate_prompt_bytes", lambda *_: 0)
    with pytest.raises(UserError, match=r"^prompt: a graph of \d+ of its \d+ active features: needs .* would fit$"):
        attribute(model, coder, tokens)
    monkeypatch.undo()
    monkeypatch.setattr("jclt.memory.measure_free_host_memory", lambda: 5_000)
    with pytest.raises(UserError, match="^prompt: the pass over its 5 tokens: needs .*; a shorter prompt would fit$"):
        attribute(model, coder, tokens)


def test_the_size_that_is_said_to_fit_is_the_one_that_fits(monkeypatch):
    model, coder, tokens = make_case(*CASE)
    full_graph = trace_whole_graph(*CASE)
    free = full_graph.adjacency.nbytes + 400_000
    monkeypatch.setattr(tracing, "estimate_source_bytes", lambda *_: 400_000)
    monkeypatch.setattr(sizes, "CALL_BYTES", {"cpu": 1})
    monkeypatch.setattr(sizes, "COLUMN_BYTES", {"cpu": 0})
    for module in ("jclt.attribution.sizes", "jclt.memory"):
        monkeypatch.setattr(f"{module}.measure_free_host_memory", lambda: free)
    with pytest.raises(UserError, match="max_features=") as caught:
        attribute(model, coder, tokens)
    fits = int(str(caught.value).partition("max_features=")[2].split()[0])
    assert 10 < fits < len(full_graph.features)
    assert len(attribute(model, coder, tokens, max_features=fits).features) == fits
    with pytest.raises(UserError, match=f"max_features={fits} would fit$"):
        attribute(model, coder, tokens, max_features=fits + 1)


def test_memory_that_ends_ends_one_prompt(monkeypatch):
    model, coder, tokens = make_case(*CASE)
    trace = attributing.trace_prompts

    def run_out(setup, prompts, targets):
        if any(len(prompt) == 4 for prompt in prompts):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")
        return trace(setup, prompts, targets)

    monkeypatch.setattr(attributing, "trace_prompts", run_out)
    results = dict(attribute_each(model, coder, [tokens, tokens[:4], draw_prompt(0)], Options()))
    assert isinstance(results[0], Graph) and isinstance(results[2], Graph)
    assert str(results[1]).startswith("prompt: not enough memory for the graph of its 4 tokens, expected")
    monkeypatch.setattr(attributing, "trace_prompts", trace)
    monkeypatch.setattr(PromptRows, "build_graph", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(UserError, match="^prompt: not enough memory"):
        attribute(model, coder, tokens)
    monkeypatch.setattr(PromptRows, "build_graph", lambda *_: (_ for _ in ()).throw(KeyError()))
    with pytest.raises(KeyError):
        attribute(model, coder, tokens)


def test_sizes_are_rounded_up_to_powers_of_two_and_one_and_a_half_times_these():
    assert [sizes.round_up(n) for n in (1, 2, 3, 4, 5, 6, 7, 9, 13, 97)] == [1, 2, 3, 4, 6, 6, 8, 12, 16, 128]
    assert sizes.round_up(3, 16) == 16 and sizes.round_up(17, 16) == 24


# Half precision.


def test_half_precision_is_widened_before_anything_is_computed():
    """The graph of a coder and a model in bfloat16 is that of the same numbers in float32."""
    model, coder, tokens = make_case("llama3", "skip", "float32")
    params_half, coder_half = convert((dict(model.params), coder), jnp.bfloat16)
    params, same_coder = convert((params_half, coder_half), np.float32)
    model_half, same_model = replace(model, params=params_half), replace(model, params=params)
    got, want = attribute(model_half, coder_half, tokens), attribute(same_model, same_coder, tokens)
    assert got.adjacency.dtype == np.float32 and measure_residual(got) < 1e-5
    assert_same(got, want)
    features = got.nodes.find("feature")
    thresholds = np.stack([layer.threshold for layer in same_coder.layers])
    # An activation is what the graph says reaches it.
    assert (got.values[features] > thresholds[got.features[:, 0], got.features[:, 2]]).all()
    np.testing.assert_allclose(got.activations, got.values[features], rtol=1e-4, atol=1e-5)


def test_a_float16_coder_of_large_numbers_is_finite():
    _, coder, _ = make_case(*CASE)
    large = convert(change_weights(coder, "encoder_bias", lambda x: np.full_like(x, 3e4)), np.float16)
    placement.check_finite(large)  # though the sum of these numbers is not


def test_a_threshold_may_be_infinite_but_not_nan():
    model, coder, tokens = make_case(*CASE)
    broken = change_weights(coder, "threshold", change_first(np.nan))
    with pytest.raises(UserError, match="^coder: its thresholds hold NaN or -infinity, expected numbers$"):
        attribute(model, broken, tokens)
    off = change_weights(coder, "threshold", change_first(np.inf))
    assert 0 not in attribute(model, off, tokens).features[:, 2]


# Provenance.


def test_a_graph_says_which_weights_made_it():
    model, coder, tokens = make_case(*CASE)
    vector = np.ones(model.config.width)
    about = attribute(model, coder, tokens, targets=[Direction(vector, 1, name="d")], max_features=5).provenance
    assert about["model_fingerprint"] == model.fingerprint and about["coder_fingerprint"] == fingerprint(coder)
    assert (about["model_dtype"], about["coder_dtype"]) == ("float32", "float32")
    (target,) = about["settings"]["targets"]
    assert (target["direction"], target["layer"], target["position"]) == ("d", 1, -1)
    other = Options([Direction(2 * vector, 1, name="d")]).summary()["targets"][0]
    assert other["vector"] != target["vector"] and other | {"vector": ""} == target | {"vector": ""}


# circuit-tracer's conventions.


def test_under_circuit_tracers_conventions_prompts_begin_with_a_special_token():
    model = make_case(*CASE).model
    plain = replace(model, tokenizer=None, config=replace(model.config, bos_token=7, stop_tokens=(9,)))
    assert encode_prompt(plain, [3, 4]).tolist() == [3, 4]
    assert encode_prompt(plain, [3, 4], "circuit-tracer").tolist() == [7, 3, 4]
    assert encode_prompt(plain, [7, 4], "circuit-tracer").tolist() == [7, 4]
    assert encode_prompt(plain, [9, 4], "circuit-tracer").tolist() == [9, 4]
    ends = replace(plain, config=replace(plain.config, bos_token=None))
    assert encode_prompt(ends, [3], "circuit-tracer").tolist() == [9, 3]
    none = replace(plain, config=replace(plain.config, bos_token=None, stop_tokens=()))
    assert encode_prompt(none, [3], "circuit-tracer").tolist() == [3]
    with pytest.raises(UserError, match="tokens, expected at most"):
        encode_prompt(plain, [3] * plain.config.context, "circuit-tracer")
    assert encode_prompt(model, "word5", "circuit-tracer").tolist() == model.encode("word5") == [1, 5]
    special = Tokenizer(models.WordLevel({"a": 0, "[PAD]": 1, "[UNK]": 2}, unk_token="[UNK]"))
    special.add_special_tokens(["[PAD]", "[UNK]"])
    padded = replace(ends, tokenizer=ModelTokenizer(special))
    assert encode_prompt(padded, "a", "circuit-tracer").tolist() == [1, 0]


def test_an_instruction_tuned_gemma_3_has_four_silent_positions():
    """It is known by its name."""
    model, coder, _ = make_case(*CASE)
    wide = replace(model.config, vocabulary=2400)
    table = jax.device_put(np.resize(model.params["token_embedding"], (2400, wide.width)))
    params = {**model.params, "token_embedding": table}
    named = replace(model, config=wide, params=params, name="google/gemma-3-1b-it")
    prompt = [2, 105, 2364, 107, 5, 6, 7]
    graph = attribute(named, coder, prompt, conventions="circuit-tracer")
    assert set(graph.features[:, 1]) == {4, 5, 6} and measure_residual(graph) < 1e-5
    errors = graph.nodes.find("error")[graph.errors[:, 1] < 4]
    assert not graph.adjacency[:, errors].any()
    with pytest.raises(UserError, match="^prompt: begins with the tokens .*, expected .2, 105, 2364, 107."):
        attribute(named, coder, prompt[1:], conventions="circuit-tracer")
    assert encode_prompt(named, prompt[1:]).tolist() == prompt[1:]
    assert count_silent_positions(named, Options()) == 0


def test_under_circuit_tracers_conventions_features_are_chosen_in_its_rounds(monkeypatch):
    """Compared with circuit-tracer's loop, which runs here on the full graph's matrix."""
    model, coder, tokens = make_case(*CASE)
    full_graph = attribute(model, coder, tokens, conventions="circuit-tracer")
    assert full_graph.tokens.tolist() == [model.config.bos_token, *tokens]
    assert set(full_graph.features[:, 1]) == {1, 2, 3, 4, 5}  # no node at the first position
    count, outs, chances = len(full_graph.features), full_graph.nodes.find("output"), full_graph.logit_probabilities
    visited = np.zeros(count, bool)
    while visited.sum() < 50:
        rows = np.append(np.flatnonzero(visited), outs)
        shares = np.zeros(full_graph.adjacency.shape)
        shares[rows] = np.abs(full_graph.adjacency[rows])
        shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1e-8)
        walkers, influence = np.zeros(len(full_graph)), np.zeros(len(full_graph))
        walkers[outs] = chances
        while walkers.any():
            walkers = walkers @ shares
            influence += walkers
        order = np.argsort(-influence[:count], kind="stable")
        visited[order[~visited[order]][: min(20, 50 - visited.sum())]] = True
    monkeypatch.setattr(tracing, "PEER_ROUND_SIZE", 20)
    part = attribute(model, coder, tokens, conventions="circuit-tracer", max_features=50)
    np.testing.assert_array_equal(part.features, full_graph.features[visited])
    monkeypatch.setattr(tracing, "PEER_ROUND_SIZE", 50)
    other = attribute(model, coder, tokens, conventions="circuit-tracer", max_features=50)
    assert (other.features != part.features).any()


def test_a_graph_says_how_its_prompt_was_written():
    model, coder, _ = make_case(*CASE)
    assert model.tokenizer is not None
    template = ChatTemplate("{{ messages[0].content }} word7")
    model = replace(model, tokenizer=replace(model.tokenizer, template=template))
    chat, bos = [{"role": "user", "content": "word5 word6"}], model.config.bos_token
    written = attribute(model, coder, chat, max_features=2)
    assert written.token_texts == attribute(model, coder, [5, 6, 7], max_features=2).token_texts
    batch = attribute_batch(model, coder, [chat, [bos, 5, 6]], max_features=2)
    begun = [(g.provenance["begins_with_bos"], g.provenance["chat_template"]) for g in (written, *batch)]
    assert begun == [(False, True), (False, True), (True, False)]


# Targets.


def test_one_target_may_stand_for_itself_and_numbers_may_be_numpys(tmp_path):
    model, coder, prompt = make_case(*CASE)
    graph = attribute(model, coder, prompt, targets=" word5", max_features=3)
    assert graph.logit_names == (" word5",)
    token = np.int64(graph.logit_tokens[0])
    same = attribute(model, coder, prompt, targets=[token], max_features=3)
    np.testing.assert_array_equal(same.adjacency, graph.adjacency)
    same.save(tmp_path / "graph.npz")
    assert jclt.load_graph(tmp_path / "graph.npz").provenance["settings"]["targets"] == [int(token)]
    assert parse_targets(np.array([3, 4])) == [3, 4] and parse_targets([[3, "a"]]) == [(3, "a")]
    plain = Options(cast(Any, np.int64(4)), cast(Any, np.int32(3)), cast(Any, np.float32(0.5))).check()
    assert json.loads(json.dumps(plain.summary())) == {
        "targets": [4],
        "max_features": 3,
        "tolerance": 0.5,
        "nodes": None,
        "conventions": "jclt",
        "precision": "float32",
    }


def test_targets_that_make_no_sense_are_refused_before_anything_is_computed(monkeypatch):
    model, coder, tokens = make_case(*CASE)
    monkeypatch.setattr(attributing, "trace_prompts", lambda *_: pytest.fail("computed"))
    twice = Direction(np.ones(model.config.width), name="d")
    for targets, says in (
        ([" word5", " word5"], "^target ' word5': given twice, expected different targets$"),
        ([" word5", model.encode(" word5")[-1]], "given twice"),
        ([(5, 6), (5, 6)], "given twice"),
        ([twice, twice], "^target 'd': given twice"),
        ([-1], "^target -1: expected a token id"),
    ):
        with pytest.raises(UserError, match=says):
            attribute(model, coder, tokens, targets=targets)
    for targets, says in (  # `attribute` would refuse these by its types, which are checked in tests alone
        ([1.5], "^target 1.5: expected a token"),
        ([True], "^target True: expected a token"),
        ([(1, 2, 3)], r"^target \(1, 2, 3\): expected a token"),
        (1.5, "^targets: 1.5, expected a list"),
    ):
        with pytest.raises(UserError, match=says):
            Options(cast(Any, targets)).check()
    with pytest.raises(UserError, match="^prompts: a text, expected a list of prompts"):
        attribute_batch(model, coder, "ab")
    with pytest.raises(UserError, match="^max_features=2.5: expected"):
        Options(max_features=cast(Any, 2.5)).check()


def test_words_without_a_token_are_named(caplog):
    model = replace(make_case(*CASE).model, name="small")
    assert list_unknown_words(model, "word5 word6") == []
    encode_prompt(model, "zzz word5 qqq zzz")
    assert "model small has no token for 'zzz', 'qqq'" in caplog.text and caplog.text.count("no token") == 1


def test_targets_are_tokens_differences_and_directions():
    model, coder, tokens = make_case(*CASE)
    logits, seen = jclt.run(model, tokens, capture=("mlp_in", "resid_final"))
    logits, reads, final = (np.asarray(x) for x in (logits, seen["mlp_in"], seen["resid_final"]))
    first, second = model.encode(" word5")[-1], model.encode(" word6")[-1]
    vector = np.random.default_rng(0).standard_normal(model.config.width).astype(np.float32)
    inner, outer = Direction(vector, 2, 3, "inner"), Direction(vector, name="outer")
    earlier = Direction(vector, position=2)
    targets = [" word5", second, (" word5", second), inner, outer, earlier]
    graph = attribute(model, coder, tokens, targets=targets, max_features=20)
    want = [
        *(logits[-1, token] - logits[-1].mean() for token in (first, second)),
        logits[-1, first] - logits[-1, second],
        vector @ reads[2, 3],
        vector @ final[-1],
        vector @ final[2],
    ]
    assert_close(graph.values[graph.nodes.find("output")], want, 1e-5)
    assert measure_residual(graph) < 1e-5
    assert graph.logit_tokens.tolist() == [first, second, -1, -1, -1, -1]
    assert graph.logit_names == (" word5", " word6", " word5 -  word6", "inner", "outer", "direction")
    assert graph.logit_positions.tolist() == [len(tokens) - 1] * 3 + [3, len(tokens) - 1, 2]
    probability = np.exp(logits[-1] - logits[-1].max())
    weights = np.array([*(probability / probability.sum())[[first, second]], 1, 1, 1, 1])
    np.testing.assert_allclose(weights_of(graph), weights / weights.sum(), rtol=1e-4)
    np.testing.assert_allclose(graph.logit_probabilities, [*weights[:2], 0, 0, 0, 0], rtol=1e-4)  # the model's
    # Nothing reaches a target from the MLP of its layer or a higher one, or from a later position.
    row = graph.adjacency[graph.nodes.find("output")[3]]
    reaching = np.flatnonzero(row)
    assert (graph.nodes.layer[reaching] < 2).all() and (graph.nodes.position[reaching] <= 3).all() and len(reaching)


def test_the_likeliest_tokens_are_the_default():
    model, coder, tokens = make_case(*CASE)
    logits = np.asarray(jclt.run(model, tokens)[0][-1])
    graph = trace_whole_graph(*CASE)
    assert graph.logit_tokens.tolist() == np.argsort(-logits)[: len(graph.logit_tokens)].tolist()
    assert weights_of(graph).sum() == pytest.approx(1)
    chance = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    np.testing.assert_allclose(graph.logit_probabilities, chance[graph.logit_tokens], rtol=1e-4)


@pytest.mark.parametrize(
    ("probabilities", "want"),
    [
        ([0.02, 0.96, 0.02], [1]),
        ([0.3, 0.06, 0.64], [2, 0, 1]),
        ([0.3, 0.04, 0.66], [2, 0]),
        ([0.5, 0.25, 0.25], [0, 1, 2]),
        ([0.01] * 100, list(range(10))),
    ],
)
def test_the_likeliest_tokens_have_most_of_the_probability(probabilities, want):
    assert choose_likeliest(np.log(np.float32(probabilities)) + 7) == want


# Bad input.


def test_bad_input_gets_one_line():
    model, coder, tokens = make_case(*CASE)
    config, layers = coder.config, model.config.layers

    def refuses(match: str, tokens: Any = tokens, coder=coder, **options):
        with pytest.raises(UserError, match=match) as caught:
            attribute(model, coder, tokens, **options)
        assert len(str(caught.value).splitlines()) == 1

    refuses("^prompt: empty, expected at least one token", tokens=[])
    refuses(r"^prompt: \d+ tokens, expected at most \d+", tokens=[1] * (model.config.context + 1))
    refuses("^prompt: 2 rows of token ids, expected one; attribute_batch", tokens=[[1, 2], [3, 4]])

    refuses("^max_features=0: expected at least 1$", max_features=0)
    refuses("^tolerance=1.0: expected from 0 to below 1$", tolerance=1.0)
    refuses("^tolerance=-0.1: expected", tolerance=-0.1)
    with pytest.raises(UserError, match="^conventions 'ours': expected jclt or circuit-tracer$"):
        # `attribute` would refuse it by its types, which are checked in tests alone.
        Options(conventions=cast(Any, "ours")).check()

    refuses("^targets: none given, expected at least one", targets=[])
    refuses("^target 96: expected a token id from 0 to 95$", targets=[96])
    refuses("^target -1: expected a token id", targets=[(1, -1)])
    refuses(r"^target 'far': layer 3, position 5, expected layers 0 to 2, 5 positions", targets=[far(layers)])
    refuses(
        r"^target 'short': a vector of shape \(3,\), expected \(24,\)", targets=[Direction(np.ones(3), name="short")]
    )

    wide = random_coder(replace(config, width=25, features=4))
    refuses(r"^coder: made for layer 2, width 25, expected .* layers 0 to 2 of width 24$", coder=wide)
    deep = random_coder(replace(config, layers=(0, 3), features=4))
    refuses(r"^coder: made for layer 3, width 24, expected .* layers 0 to 2 of width 24$", coder=deep)
    sae = random_coder(CoderConfig("sae", 4, reads="resid_post", writes="resid_post", layers=(0,), width=24))
    refuses("^coder: reads resid_post and writes resid_post, expected one that stands in for MLPs", coder=sae)


def far(layers: int) -> Direction:
    return Direction(np.ones(24), layers, 5, "far")


def test_a_target_of_several_tokens_is_refused():
    model, coder, tokens = make_case(*CASE)
    with pytest.raises(UserError, match=r"^target ' word5 word6': 2 tokens of model .*, expected exactly one$"):
        attribute(model, coder, tokens, targets=[" word5 word6"])
    nameless = replace(model, tokenizer=None)
    with pytest.raises(UserError, match="has no tokenizer, expected a token id"):
        attribute(nameless, coder, tokens, targets=["a"])


def test_weights_that_are_no_numbers_and_coders_that_never_fire_are_refused():
    model, coder, tokens = make_case(*CASE)
    down = np.array(model.params["down"])
    down[1, 0, 0] = np.nan
    broken = replace(model, params={**model.params, "down": jax.device_put(down)})
    with pytest.raises(UserError, match="its logits are not finite, expected weights without NaN or infinity"):
        attribute(broken, coder, tokens)
    silent = change_weights(coder, "threshold", lambda x: x + 1e6)
    with pytest.raises(UserError, match="^prompt: no feature of the coder is active on it, expected at least one$"):
        attribute(model, silent, tokens)


def test_a_coder_whose_weights_are_no_numbers_is_refused():
    model, coder, tokens = make_case(*CASE)
    broken = change_weights(coder, "decoder", lambda x: x * np.nan)
    with pytest.raises(UserError, match="^coder: what its active features write is not finite, expected weights"):
        attribute(model, broken, tokens)
    deaf = change_weights(coder, "encoder", change_first(np.nan))
    with pytest.raises(UserError, match="^coder: its encoders are not finite, expected weights"):
        attribute(model, deaf, tokens)
