"""Interventions on the handmade model, where it is known what each of them must do: whatever says that the city lies in
another state makes the model answer with the other state's capital."""

from functools import cache
from typing import Any

import numpy as np
import pytest
from handmade_coders import LAST, VARIANTS, expected_edges, faithful_coder, nodes, unfaithful_coder
from more_cases import mark_others

import jclt
from jclt.graphs import Graph, with_supernodes
from jclt.interventions import scale_nodes, swap_nodes
from jclt.world.handmade import (
    ANSWERS,
    CAPITAL_OF,
    CAPITAL_TOKENS,
    PROMPTS,
    STATE_OF_CITY,
    STATE_TOKENS,
    build_two_hop,
)

CITIES = range(len(PROMPTS))
SETTINGS: dict[str, dict[str, Any]] = {
    "model": {"reference": "current"},
    "model, free": {"reference": "current", "attention": "free", "norms": "free"},
    "clamped": {"layers": (0, 1)},
    "replacement": {},
}
each_model = pytest.mark.parametrize("name", mark_others(VARIANTS, ["plain", "rotated norms"]))
each_setting = pytest.mark.parametrize("setting", mark_others(SETTINGS, ["model", "clamped"]))


@cache
def handmade(name: str):
    model = build_two_hop(**VARIANTS[name])
    return model, faithful_coder(model)


@cache
def trace(name: str, city: int) -> Graph:
    return jclt.attribute(*handmade(name), np.asarray(PROMPTS[city]))


def find_features(graph: Graph, layer: int) -> list[int]:
    """The features of a layer at the last position."""
    features = graph.nodes.find("feature")
    return features[(graph.features[:, :2] == (layer, LAST)).all(axis=1)].tolist()


def activation(name: str, layer: int) -> float:
    """What the one active feature of a layer is on every prompt: the sum of its edges."""
    target = nodes(0)[layer]
    edges = expected_edges(0, norms="norms" in name)
    return sum(value for (into, _), value in edges.items() if into == target)


def other_states(city: int) -> list[int]:
    return [state for state in range(len(STATE_TOKENS)) if state != STATE_OF_CITY[city]]


def capital(state: int) -> int:
    return CAPITAL_TOKENS[CAPITAL_OF[state]]


def answer(result: jclt.Intervention) -> int:
    return int(result.logits[-1].argmax())


def replace_state(city: int, value: float, position: int) -> list:
    """The state's feature becomes 0, and that of another state gets the value: one row for each other state."""
    others = other_states(city)
    place: dict[str, Any] = {"layer": 1, "position": position}
    edits: list = [jclt.Set(0.0, **place, feature=STATE_OF_CITY[city])]
    return edits + [jclt.Set(value * np.eye(3)[row], **place, feature=state) for row, state in enumerate(others)]


@each_model
@each_setting
def test_another_states_feature_gives_its_capital(name, setting):
    """For every city and every other state. At another position it does nothing to the answer."""
    value = activation(name, 1)
    assert value == 0.5 or "norms" in name
    options: dict[str, Any] = {"predict": False, **SETTINGS[setting]}
    for city in CITIES:
        prompt = np.asarray(PROMPTS[city])
        results = jclt.sweep(*handmade(name), prompt, replace_state(city, value, LAST), **options)
        assert [answer(result) for result in results] == [capital(state) for state in other_states(city)]
        # The other state's capital is as likely as that of the right state was.
        for result, state in zip(results, other_states(city), strict=True):
            want = result.original_logits[-1, ANSWERS[city]]
            np.testing.assert_allclose(result.logits[-1, capital(state)], want, atol=1e-5)
        elsewhere = jclt.sweep(*handmade(name), prompt, replace_state(city, value, LAST - 1), **options)
        for result in elsewhere:
            np.testing.assert_allclose(result.logits[-1], result.original_logits[-1], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "site"),
    mark_others(
        [(name, site) for name in VARIANTS for site in ("resid_post", "mlp_in")],
        [("plain", "resid_post"), ("rotated norms", "mlp_in")],
    ),
)
def test_a_change_between_the_layers_moves_all_but_the_unfaithful_replacement(name, site):
    """The stream, or what the second MLP reads, says another state: the model's own MLP and the faithful features
    follow; the unfaithful ones have written the old capital already."""
    model, faithful = handmade(name)
    directions = np.asarray(model.params["token_embedding"])[list(STATE_TOKENS)]
    unfaithful = unfaithful_coder(model)
    factor = activation(name, 1) / 0.5 if site == "mlp_in" else 1.0  # what the norm makes of the direction
    for city in CITIES:
        state = STATE_OF_CITY[city]
        other = (state + 1 + city // 4) % len(STATE_TOKENS)  # each other state once
        push = np.float32(factor) * (directions[other] - directions[state])
        edit = jclt.Add(push, site=site, layer=int(site == "mlp_in"), position=LAST)

        def run(coder, edit=edit, city=city, **options: Any) -> int:
            return answer(jclt.intervene(model, coder, np.asarray(PROMPTS[city]), edit, predict=False, **options))

        assert run(faithful, reference="current") == capital(other)
        assert run(faithful) == capital(other)
        assert run(unfaithful) == ANSWERS[city]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", mark_others(VARIANTS, ["plain"]))
def test_edits_of_nodes_are_those_by_hand(name, layer):
    """Of a supernode or of nodes by number. Cities and states that are swapped swap the answers."""
    city, other = 0, 5
    case, prompt, source = handmade(name), np.asarray(PROMPTS[city]), trace(name, other)
    members, others = find_features(trace(name, city), layer), find_features(source, layer)
    graph = with_supernodes(trace(name, city), {"here": members})
    place = {"layer": layer, "position": LAST}
    old, new = (nodes(number)[layer][-1] for number in (city, other))
    swap = [jclt.Set(0.0, **place, feature=old), jclt.Set(activation(name, layer), **place, feature=new)]
    pairs = [
        (scale_nodes(graph, "here", -0.5), jclt.Scale(-0.5, **place, feature=old)),
        (scale_nodes(graph, members, 2.0), jclt.Scale(2.0, **place, feature=old)),
        (swap_nodes(graph, "here", source, others), swap),
    ]
    for setting in (SETTINGS["model"], SETTINGS["replacement"]):
        for by_nodes, by_hand in pairs:
            got, want = (jclt.intervene(*case, prompt, e, predict=False, **setting) for e in (by_nodes, by_hand))
            np.testing.assert_allclose(got.logits, want.logits, atol=1e-5)
            assert np.abs(got.logits - got.original_logits).max() > 0.1
            assert answer(got) == ANSWERS[other] or by_hand is not swap
