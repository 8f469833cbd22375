"""Interventions on features: direct effects are the graph's edges, nothing reacts that is clamped, and a change of
nothing changes nothing."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from more_cases import mark_others
from traced_graphs import DOUBLE, make_case, trace_whole_graph

import jclt
from jclt.coders import CoderReplacement
from jclt.graphs import Graph
from jclt.interventions import ablate
from jclt.models import Compose

LAW = sorted({*DOUBLE.items(), ("gpt2", "skip"), ("gemma2", "clt"), ("neox", "skip")})
FEW = [("gpt2", "clt"), ("neox", "some skips")]


def scale_everything(graph: Graph, seed: int) -> tuple[list, np.ndarray]:
    """Edits that multiply every feature and every error by a random number; and these numbers minus one, by node."""
    rng = np.random.default_rng(seed)
    factors = rng.uniform(-1.5, 2.5, len(graph))
    edits = []
    for node in graph.nodes.find("feature", "error").tolist():
        place = {"layer": int(graph.nodes.layer[node]), "position": int(graph.nodes.position[node])}
        if graph.nodes.kind[node] == "feature":
            place["feature"] = int(graph.nodes.index[node])
        else:
            place["site"] = "errors"
        edits.append(jclt.Scale(factors[node], **place))
    relative = np.where(graph.nodes.is_kind("feature", "error"), factors - 1, 0)
    return edits, relative


def measure_changes(graph: Graph, result: jclt.Intervention) -> np.ndarray:
    """By node, how much the pre-activations of features and the centred logits of outputs changed."""
    f, o = result.features, result.outputs
    moved = dict(
        zip(
            zip(f.layer, f.position, f.feature, strict=True),
            f.preactivation_after - f.preactivation_before,
            strict=True,
        )
    )
    changes = np.zeros(len(graph))
    for node, cell in zip(graph.nodes.find("feature"), map(tuple, graph.features), strict=True):
        changes[node] = moved[cell]
    of_tokens = dict(zip(o.tokens.tolist(), o.after - o.before, strict=True))
    changes[graph.nodes.find("output")] = [of_tokens[token] for token in graph.logit_tokens.tolist()]
    return changes


@pytest.mark.parametrize(("name", "kind"), mark_others(LAW, FEW))
def test_direct_effects_are_the_graphs_edges(name, kind):
    """Every feature and every error is changed at once, in all layers, with attention and norms frozen: each target
    changes by the sum of its edges times the relative changes of their sources."""
    with jax.enable_x64():
        case, graph = make_case(name, kind, "float64"), trace_whole_graph(name, kind, "float64")
        edits, relative = scale_everything(graph, 0)
        if kind == "neurons":  # they leave no errors to scale
            edits = [edit for edit in edits if edit.site == "features"]
        result = jclt.intervene(*case, edits, layers=(0, case.model.config.layers - 1), graph=graph)
        want = graph.adjacency @ relative
    got = measure_changes(graph, result)
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10 * np.abs(want).max())
    f, o = result.features, result.outputs
    for after, predicted in ((f.preactivation_after, f.preactivation_predicted), (o.after, o.predicted)):
        known = ~np.isnan(predicted)
        assert known.any()
        np.testing.assert_allclose(predicted[known], after[known], rtol=0, atol=1e-10 * np.abs(want).max())
    assert result.unpredicted == 0


@pytest.mark.exhaustive  # a plain run has them in double precision
def test_they_are_so_in_single_precision():
    case, graph = plain_case(), trace_whole_graph("gpt2", "clt", "float32")
    edits, relative = scale_everything(graph, 1)
    got = measure_changes(graph, jclt.intervene(*case, edits, layers=range(case.model.config.layers), graph=graph))
    want = graph.adjacency @ relative
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


SETTINGS = {
    "clamped": {"layers": (0, 1)},
    "clamped, free": {"layers": (1, 2), "attention": "free", "norms": "free"},
    "replacement": {},
    "replacement, free": {"attention": "free", "norms": "free"},
    "model": {"reference": "current"},
    "model, free": {"reference": "current", "attention": "free", "norms": "free"},
}


@cache
def plain_case():
    return make_case("gpt2", "clt", "float32")


@pytest.mark.parametrize("setting", mark_others(SETTINGS, ["clamped", "replacement, free", "model, free"]))
def test_a_change_of_nothing_changes_nothing_and_a_change_no_earlier_position(setting):
    case = plain_case()
    layer, position, feature = first_active(case, layer=1)
    place = {"layer": layer, "position": position, "feature": feature}
    same = jclt.intervene(*case, jclt.Scale(1.0, **place), predict=False, **SETTINGS[setting])
    np.testing.assert_allclose(same.logits, same.original_logits, atol=2e-5)
    assert same.kl < 1e-6
    moved = jclt.intervene(*case, jclt.Scale(-2.0, **place), predict=False, **SETTINGS[setting])
    np.testing.assert_allclose(moved.logits[:position], moved.original_logits[:position], atol=2e-5)
    assert np.abs(moved.logits[position:] - moved.original_logits[position:]).max() > 0.01


def first_active(case, layer: int) -> tuple[int, int, int]:
    """An active feature of a layer, at the first position after the beginning that has one."""
    graph = trace_whole_graph("gpt2", "clt", "float32")
    inside = graph.features[(graph.features[:, 0] == layer) & (graph.features[:, 1] > 0)]
    return tuple(map(int, inside[np.argsort(inside[:, 1], kind="stable")[0]]))


def test_without_edits_and_errors_the_replacement_is_the_replacement_model():
    case = plain_case()
    result = jclt.intervene(*case, [], attention="free", norms="free", errors="dropped", predict=False)
    want, _ = jclt.run(case.model, case.tokens, edit=CoderReplacement(case.coder), unroll=True)
    np.testing.assert_allclose(result.logits, want, atol=2e-5)


def test_under_the_models_own_reaction_a_features_change_is_what_its_decoder_adds():
    """By hand: the change times the decoder's rows is added at each later layer, and attention and norms are free."""
    case = plain_case()
    layer, position, feature = first_active(case, layer=1)
    graph = trace_whole_graph("gpt2", "clt", "float32")
    at = np.flatnonzero((graph.features == (layer, position, feature)).all(axis=1))[0]
    rows = np.asarray(case.coder.decoder_rows(layer))[feature] * (3.0 - graph.activations[at])
    adds = [jclt.Add(rows[i], site="mlp_out", layer=layer + i, position=position) for i in range(len(rows))]
    want, _ = jclt.run(case.model, case.tokens, edit=Compose(adds))
    edit = jclt.Set(3.0, layer=layer, position=position, feature=feature)
    result = jclt.intervene(*case, edit, predict=False, **SETTINGS["model, free"])
    np.testing.assert_allclose(result.logits, want, atol=1e-4)


def test_a_prediction_counts_what_it_leaves_out():
    """The errors are dropped, one of them is scaled beside; and a head is changed, which the graph does not have."""
    case, graph = plain_case(), trace_whole_graph("gpt2", "clt", "float32")
    every = {"layers": (0, case.model.config.layers - 1), "graph": graph}

    def measure_deviation(result) -> float:
        o, known = result.outputs, ~np.isnan(result.outputs.predicted)
        return np.abs(o.predicted - o.after)[known].max() / np.abs(o.after - o.before).max()

    dropped = jclt.intervene(*case, [], errors="dropped", **every)
    assert measure_deviation(dropped) < 1e-4 and dropped.unpredicted == 0
    of_errors = [
        jclt.Scale(3.0, site="errors", layer=0, position=2),
        jclt.Scale(0.5, site="errors", position=2),
        jclt.Set(0.0, site="errors", layer=1),
    ]
    scaled = jclt.intervene(*case, of_errors, **every)
    assert measure_deviation(scaled) < 1e-4 and scaled.unpredicted == 0
    moved = [jclt.Add(0.5, site="errors", layer=1, position=3), jclt.Scale(0.0, site="head_out", layer=1, head=0)]
    assert jclt.intervene(*case, moved, **every).unpredicted == 2


def test_the_prediction_of_total_effects_is_that_of_repeated_direct_ones():
    """Iterative patching of a ReLU network that nothing switches on or off: with a small change, the prediction through
    other features is the measured change."""
    with jax.enable_x64():
        case, graph = make_case("gpt2", "clt", "float64"), trace_whole_graph("gpt2", "clt", "float64")
        layer, position, feature = (int(x) for x in graph.features[0])
        edit = jclt.Scale(1 + 1e-6, layer=layer, position=position, feature=feature)
        result = jclt.intervene(*case, edit, graph=graph)
    f, o = result.features, result.outputs
    known = ~np.isnan(f.preactivation_predicted) & ~f.edited
    change, predicted = (
        (f.preactivation_after - f.preactivation_before)[known],
        (f.preactivation_predicted - f.preactivation_before)[known],
    )
    assert np.abs(change).max() > 1e-7
    np.testing.assert_allclose(predicted, change, rtol=0, atol=1e-4 * np.abs(change).max())
    known = ~np.isnan(o.predicted)
    change, predicted = (o.after - o.before)[known], (o.predicted - o.before)[known]
    np.testing.assert_allclose(predicted, change, rtol=0, atol=1e-4 * np.abs(change).max())


def test_a_sweep_gives_what_each_strength_gives_alone():
    case = plain_case()
    layer, position, feature = first_active(case, layer=1)
    strengths = np.array([-1.0, 0.0, 2.0])
    edit = jclt.Scale(strengths, layer=layer, position=position, feature=feature)
    together = jclt.sweep(*case, edit, predict=False)
    for strength, result in zip(strengths, together, strict=True):
        edit = jclt.Scale(strength, layer=layer, position=position, feature=feature)
        alone = jclt.intervene(*case, edit, predict=False)
        np.testing.assert_allclose(result.logits, alone.logits, atol=2e-5)
        assert result.features.after[result.features.edited] == alone.features.after[alone.features.edited]


def test_changes_that_grow_beyond_all_numbers_are_reported(caplog):
    case = make_case("gemma2", "neurons", "float32")
    for factor in (0.0, 1e20):
        ablate(*case, factor=factor, progress=False)
        assert ("norms='free'" in caplog.text) == (factor > 1)


@pytest.mark.parametrize(
    ("clamped", "attention", "norms"),
    mark_others(
        [(0, "frozen", "frozen"), (0, "free", "free"), (2, "frozen", "free"), (2, "free", "free")],
        [(0, "frozen", "frozen"), (2, "free", "free")],
    ),
)
def test_ablations_are_what_each_intervention_gives_alone(clamped, attention, norms):
    case = plain_case()
    found = ablate(*case, clamped=clamped, attention=attention, norms=norms, batch=8, progress=False)
    graph = trace_whole_graph("gpt2", "clt", "float32")
    assert {tuple(x) for x in found.features} == {tuple(x) for x in graph.features}
    last = case.model.config.layers - 1
    for row in np.linspace(0, len(found.features) - 1, 4).astype(int):
        layer, position, feature = map(int, found.features[row])
        layers = {"layers": (layer, min(layer + clamped - 1, last))} if clamped else {"reference": "current"}
        edit = jclt.Scale(0.0, layer=layer, position=position, feature=feature)
        alone = jclt.intervene(*case, edit, attention=attention, norms=norms, predict=False, **layers)
        np.testing.assert_allclose(found.logits[row], alone.logits[-1][found.tokens], atol=1e-4)
        assert found.kl[row] == pytest.approx(alone.kl, abs=1e-5)
        assert found.likeliest[row] == alone.logits[-1].argmax()
    assert np.abs(found.effects).max() > 0.1


GENERATING = ["gemma2", "gemma3", "gpt2", "llama3", "mistral", "neox", "neox_sequential", "qwen2", "qwen3"]


@pytest.mark.parametrize("name", mark_others(GENERATING, ["gemma2"]))
def test_generation_with_the_cache_is_that_without_it(name):
    """Features at one position and at an open range, and a head, are changed; each new token's logits are those of a
    pass over all tokens before it."""
    model, coder, tokens = make_case(name, "clt", "float32")
    edits = [
        jclt.Set(4.0, layer=0, position=2, feature=3),
        jclt.Add(1.5, layer=1, position=slice(3, None), feature=5),
        jclt.Scale(0.0, site="head_out", layer=1, position=slice(4, None), head=0),
    ]
    steered = jclt.steer(model, coder, tokens, edits, 6, stop_tokens=())
    assert len(steered.tokens) == len(tokens) + 6
    free = {"reference": "current", "attention": "free", "norms": "free", "predict": False}
    whole = jclt.intervene(model, coder, steered.tokens[:-1], edits, **free)
    np.testing.assert_allclose(steered.logits, whole.logits[len(tokens) - 1 :], atol=1e-5)
    assert (steered.logits.argmax(axis=-1) == steered.tokens[len(tokens) :]).all()
    unedited = jclt.intervene(model, coder, steered.tokens[:-1], [], **free).logits
    assert np.abs(unedited[-1] - whole.logits[-1]).max() > 1e-3


@pytest.mark.exhaustive  # a plain run generates the likeliest tokens
def test_sampled_tokens_have_the_logits_of_a_pass_without_the_cache():
    model, coder, tokens = make_case("gemma2", "clt", "float32")
    edit = jclt.Set(4.0, layer=0, position=2, feature=3)
    likeliest = jclt.steer(model, coder, tokens, edit, 6, stop_tokens=())
    sampled = jclt.steer(model, coder, tokens, edit, 6, temperature=0.7, seed=1, stop_tokens=())
    assert (sampled.tokens != likeliest.tokens).any()
    free = {"reference": "current", "attention": "free", "norms": "free", "predict": False}
    whole = jclt.intervene(model, coder, sampled.tokens[:-1], edit, **free)
    np.testing.assert_allclose(sampled.logits, whole.logits[len(tokens) - 1 :], atol=1e-5)


@pytest.mark.exhaustive  # a plain run generates with one strength
def test_several_strengths_at_once_write_what_each_writes_alone():
    model, coder, tokens = make_case("llama3", "clt", "float32")
    edit = jclt.Add(np.array([0.0, 2.0, 6.0]), layer=0, position=slice(2, None), feature=3)
    several = jclt.sweep_steering(model, coder, tokens, edit, 4, stop_tokens=())
    for steered, value in zip(several, (0.0, 2.0, 6.0), strict=True):
        alone = jclt.steer(
            model, coder, tokens, jclt.Add(value, layer=0, position=slice(2, None), feature=3), 4, stop_tokens=()
        )
        np.testing.assert_array_equal(steered.tokens, alone.tokens)
        np.testing.assert_allclose(steered.logits, alone.logits, atol=1e-5)
        assert (steered.tokens == steered.original_tokens).all() == (value == 0)
    with pytest.raises(jclt.UserError, match="`jclt.sweep_steering` takes several"):
        jclt.steer(model, coder, tokens, edit, 4)


def test_frozen_attention_in_generation_is_that_of_the_prompt():
    """With patterns of the prompt kept, an edit before the last position changes no pattern of the prompt: the first
    new token's logits are those of `intervene` with frozen attention."""
    model, coder, tokens = make_case("gpt2", "clt", "float32")
    edit = jclt.Set(4.0, layer=0, position=slice(2, None), feature=3)
    steered = jclt.steer(model, coder, tokens, edit, 2, attention="frozen", norms="frozen", stop_tokens=())
    alone = jclt.intervene(model, coder, tokens, edit, reference="current", predict=False)
    np.testing.assert_allclose(steered.logits[0], alone.logits[-1], atol=1e-5)


def test_impossible_requests_are_refused_in_one_line():
    case = plain_case()
    edit = jclt.Scale(0.0, layer=1, position=2, feature=3)

    def refuse(message: str, edits=edit, **options):
        with pytest.raises(jclt.UserError, match=message):
            jclt.intervene(*case, edits, predict=False, **options)

    refuse("reference 'current' with layers", layers=(0, 1), reference="current")
    refuse("errors 'dropped' with reference 'current'", errors="dropped", reference="current")
    refuse("of layer 1: expected within the clamped layers 2 to 2", layers=(2, 2))
    refuse("layer 7, expected 0 to 2", jclt.Scale(0.0, layer=7, position=2, feature=3))
    refuse("position 9, expected 0 to 4", jclt.Scale(0.0, layer=1, position=9, feature=3))
    refuse("feature 99: expected 0 to 15", jclt.Scale(0.0, layer=1, position=2, feature=99))
    refuse("two of them set one feature at the same place", [jclt.Set(1.0, layer=1, position=2, feature=3)] * 2)
    refuse("changes nothing while attention is frozen", jclt.Scale(0.0, site="keys", layer=1))
    refuse("changes nothing while features stand in", jclt.Scale(0.0, site="mlp_neurons", layer=1))
    of_neurons = jclt.Scale(0.0, site="mlp_neurons", layer=slice(0, 2))
    refuse("site 'mlp_neurons': changes nothing in clamped layers", of_neurons, layers=(0, 1))
    refuse("edit of errors: there are none", jclt.Scale(0.0, site="errors", layer=1), reference="current")
    refuse("of layers 0 to 2: expected within the clamped layers 0 to 1", jclt.Scale(0.0, feature=3), layers=(0, 1))
    refuse("5 and 3 values|3 and 5 values", [jclt.Scale(np.ones(n), layer=0, position=2, feature=n) for n in (3, 5)])
    graph = trace_whole_graph("gpt2", "clt", "float32")
    other = make_case("gpt2", "some layers", "float32").coder
    with pytest.raises(jclt.UserError, match="graph: was made with another coder"):
        jclt.intervene(case.model, other, case.tokens, [], graph=graph)
    with pytest.raises(jclt.UserError, match="graph: is of another prompt"):
        jclt.intervene(case.model, case.coder, case.tokens[:-1], [], graph=graph)
    refuse("values of several rows", jclt.Scale(np.ones(2), layer=1, position=2, feature=3))
    with pytest.raises(jclt.UserError, match="position -1, expected 0 or more"):
        jclt.Scale(0.0, layer=1, position=-1, feature=3)


@pytest.mark.exhaustive  # programs for a mesh of their own; what they share with one device is tested above
def test_a_model_on_a_mesh_gives_what_it_gives_on_one_device():
    from golden_cases import FOLDER

    case = plain_case()
    layer, position, feature = first_active(case, layer=1)
    edit = jclt.Scale(-2.0, layer=layer, position=slice(position, None), feature=feature)
    sharded = jclt.load_model(FOLDER / "gpt2", mesh=jclt.make_mesh(data=2, features=2))
    for setting in ("clamped", "model, free"):
        want = jclt.intervene(*case, edit, predict=False, **SETTINGS[setting])
        got = jclt.intervene(sharded, case.coder, case.tokens, edit, predict=False, **SETTINGS[setting])
        np.testing.assert_allclose(got.logits, want.logits, atol=1e-5)
    np.testing.assert_allclose(
        ablate(sharded, case.coder, case.tokens, progress=False).logits, ablate(*case, progress=False).logits, atol=1e-5
    )
    want, got = (jclt.steer(model, case.coder, case.tokens, edit, 3).tokens for model in (case.model, sharded))
    np.testing.assert_array_equal(got, want)


def test_supernodes_are_measured_and_maxima_found():
    """After members are halved, a supernode has half its activation; the maxima are those of the original passes."""
    case, graph = plain_case(), trace_whole_graph("gpt2", "clt", "float32")
    members = tuple(graph.nodes.find("feature")[:4].tolist())
    named = replace(graph, supernodes={"some": members, "errors": (int(graph.nodes.find("error")[0]),)})
    result = jclt.intervene(*case, jclt.scale_nodes(named, "some", 0.5), layers=(0, 2), predict=False)
    assert jclt.measure_shares(named, result) == pytest.approx({"some": 0.5})
    maxima = jclt.find_maxima(case.model, case.coder, np.stack([case.tokens, case.tokens[::-1]]), batch=1)
    both = [
        jclt.intervene(case.model, case.coder, t, [], predict=False) for t in (case.tokens, case.tokens[::-1].copy())
    ]
    want = np.zeros_like(maxima)
    for f in (result.features for result in both):
        np.maximum.at(want, (f.layer, f.feature), f.before)
    np.testing.assert_allclose(maxima, want, atol=1e-5)
