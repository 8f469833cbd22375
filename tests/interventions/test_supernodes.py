"""Supernodes of the shipped model: setting one to zero moves the answer, more than random groups do."""

import numpy as np
import pytest

import jclt
from jclt.errors import UserError
from jclt.graphs import add_supernodes, suggest_supernodes
from jclt.interventions import measure_supernodes, scale_nodes
from jclt.interventions.supernodes import draw_alike, draw_comparable

PROMPT = "Question: in the state of South Creek, what is the capital? Answer:"  # its graph has three groups


@pytest.fixture(scope="module")
def traced():
    model = jclt.load_model("demo")
    coder = jclt.load_coder("demo", model=model)
    graph = jclt.attribute(model, coder, PROMPT)
    return model, coder, graph, suggest_supernodes(graph.prune())


@pytest.fixture(scope="module")
def effects(traced):
    model, coder, graph, groups = traced
    return measure_supernodes(model, coder, PROMPT, graph, groups, random=7)


def test_suggested_groups_move_the_output_more_than_random_groups(traced, effects):
    """As the graph predicts, of the output and of the features between."""
    assert len(effects) == len(traced[3]) >= 2
    for effect, group in zip(effects, traced[3], strict=True):
        assert effect.beaten == len(effect.random) == 7 and effect.features == len(group.features)
        assert len(effect.comparable) == 7 and np.abs(effect.comparable).mean() > np.abs(effect.random).mean()
        assert abs(effect.effect) > 3 * np.abs(effect.random).mean()
        assert 0.5 < effect.predicted / effect.effect < 1.5
        assert effect.agreement > 0.95
        assert str(effect).startswith(f"{group.name}: {effect.features} features, {group.share:.1%} of the influence; ")


def test_the_effect_is_that_of_an_intervention(traced, effects):
    model, coder, graph, groups = traced
    graph = add_supernodes(graph, groups)
    edits = scale_nodes(graph, groups[0].name, 0.0)
    result = jclt.intervene(model, coder, PROMPT, edits, reference="current", graph=graph)
    assert graph.logit_tokens.tolist() == result.outputs.tokens[: len(graph.logit_tokens)].tolist()
    count = len(graph.logit_tokens)
    weights = graph.logit_probabilities / graph.logit_probabilities.sum()
    moved = (result.outputs.after - result.outputs.before)[:count] @ weights
    predicted = (result.outputs.predicted - result.outputs.before)[:count] @ weights
    assert effects[0].effect == pytest.approx(moved, abs=1e-4)
    assert effects[0].predicted == pytest.approx(predicted, abs=1e-3)


def test_random_groups_have_as_many_features_of_each_layer(traced):
    graph = traced[2]
    group = tuple(range(0, len(graph.features), 9))
    drawn = draw_alike(graph, group, np.random.default_rng(0))
    layers = graph.features[:, 0]
    assert sorted(layers[list(drawn)]) == sorted(layers[list(group)])
    assert len({*drawn, *group}) == 2 * len(group)
    influence, strong = graph.influence, tuple(np.argsort(-graph.influence[: len(graph.features)])[:4].tolist())
    near = draw_comparable(graph, strong, np.random.default_rng(0))
    assert len({*near, *strong}) == 8 and draw_comparable(graph, (), np.random.default_rng(0)) == ()
    ranks = np.argsort(np.argsort(-influence[: len(graph.features)]))[list(near)]
    assert ranks.min() >= 4 and ranks.max() < 4 + 5 + 3  # of the next 5, then of those that are left
    everything = tuple(range(len(graph.features)))
    assert draw_alike(graph, everything, np.random.default_rng(0)) == ()


def test_wrong_requests_are_named(traced):
    model, coder, graph, groups = traced
    with pytest.raises(UserError, match="random=-1: expected 0 groups or more"):
        measure_supernodes(model, coder, PROMPT, graph, groups, random=-1)
    with pytest.raises(UserError, match="graph: is of another prompt"):
        measure_supernodes(model, coder, "English: rich or", graph, groups)
    assert measure_supernodes(model, coder, PROMPT, graph, []) == []
