"""The handmade model does what its docstring says, in any basis and with norms. Its exact edges are checked by removing
one source at a time, without attribution code."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from handmade_coders import LAST, VARIANTS, expected_edges, faithful_coder, nodes, unfaithful_coder
from more_cases import mark_others

import jclt
from jclt.coders import CoderReplacement, neurons
from jclt.models import Compose, Replace, save_model
from jclt.world.handmade import (
    ANSWERS,
    CAPITAL_OF,
    CAPITAL_TOKENS,
    PROMPTS,
    STATE_OF_CITY,
    STATE_TOKENS,
    build_two_hop,
)

MODEL = {name: build_two_hop(**options) for name, options in VARIANTS.items()}
TOKENS = np.asarray(PROMPTS)
CITIES = np.arange(len(PROMPTS))
each_model = pytest.mark.parametrize("name", mark_others(VARIANTS, ["plain", "rotated norms"]))


def deviation(logits) -> np.ndarray:
    """Logits minus their mean, at the last position."""
    last = np.asarray(logits, np.float64)[..., LAST, :]
    return last - last.mean(-1, keepdims=True)


def preactivations(model, seen) -> np.ndarray:
    up, bias = np.asarray(model.params["up"], np.float64), np.asarray(model.params["up_bias"], np.float64)
    return np.einsum("lbtd,ldm->lbtm", np.asarray(seen["mlp_in"], np.float64), up) + bias[:, None, None]


@each_model
def test_every_city_is_answered_with_its_capital(name):
    logits, seen = jclt.run(MODEL[name], TOKENS, capture=("pattern",))
    assert np.asarray(logits)[:, LAST].argmax(-1).tolist() == list(ANSWERS)
    previous = np.asarray([[1, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32)
    np.testing.assert_array_equal(np.asarray(seen["pattern"])[0, :, 0], np.broadcast_to(previous, (12, 3, 3)))


@each_model
def test_one_neuron_a_layer_is_active_and_only_at_the_last_position(name):
    model = MODEL[name]
    _, seen = jclt.run(model, TOKENS, capture=("mlp_in", "mlp_neurons", "mlp_denominator"))
    want = np.zeros((2, 12, 3, 12))
    want[0, CITIES, LAST, CITIES] = want[1, CITIES, LAST, np.asarray(STATE_OF_CITY)] = 0.5
    want = want / np.asarray(seen["mlp_denominator"])[..., None]
    assert ((np.asarray(seen["mlp_neurons"]) != 0) == (want != 0)).all()
    np.testing.assert_allclose(seen["mlp_neurons"], want, atol=0 if name == "plain" else 1e-5)
    h = preactivations(model, seen)
    np.testing.assert_allclose(h[want != 0], want[want != 0], atol=0 if name == "plain" else 1e-5)
    assert h[want == 0].max() <= -0.49


def test_logits_are_as_stated():
    logits, _ = jclt.run(MODEL["plain"], TOKENS)
    np.testing.assert_allclose(deviation(logits)[CITIES, ANSWERS], 4 * 0.5 * (1 - 1 / 24) - 2 / 24, atol=1e-6)


@pytest.mark.parametrize("plain", ["plain", "norms"])
def test_a_random_basis_changes_no_logit(plain):
    rotated = MODEL[f"rotated {plain}".removesuffix(" plain")]
    assert np.abs(np.subtract(rotated.params["down"], MODEL[plain].params["down"])).max() > 0.1
    np.testing.assert_allclose(jclt.run(rotated, TOKENS)[0], jclt.run(MODEL[plain], TOKENS)[0], atol=1e-5)


def targets(model, logits, seen, city: int) -> np.ndarray:
    """The values of all features at the last position, before activation, and of the answer's logit."""
    h = preactivations(model, {"mlp_in": np.asarray(seen["mlp_in"])[:, None]})[:, 0, LAST]
    return np.append(h.ravel(), deviation(logits)[ANSWERS[city]])


@each_model
@pytest.mark.parametrize("city", [0, 6])
def test_expected_edges_are_what_each_source_contributes(name, city):
    """With frozen patterns, denominators and MLP outputs, removing a source changes each target by exactly its edge."""
    model = MODEL[name]
    frozen = ("pattern", "attn_denominator", "mlp_denominator", "final_denominator", "mlp_out", "token_embedding")
    sites = (*frozen, "mlp_in", "mlp_neurons")
    _, seen = jax.device_get(jclt.run(model, TOKENS[city], capture=sites))
    down = np.asarray(model.params["down"])

    def measure(**changed) -> np.ndarray:
        values = {site: seen[site] for site in frozen} | changed
        logits, got = jclt.run(model, TOKENS[city], capture=("mlp_in",), edit=Replace(values))
        return targets(model, logits, got, city)

    def without(site: str, *place: int, part: float | np.ndarray) -> np.ndarray:
        """A site's values without a part of those at a place."""
        values = seen[site].copy()
        values[place] -= part
        return values

    complete = measure()
    effects = {}
    for position in range(3):
        changed = without("token_embedding", position, part=seen["token_embedding"][position])
        effects["token", position] = complete - measure(token_embedding=changed)
    for layer, position, index in np.argwhere(seen["mlp_neurons"]).tolist():
        contribution = seen["mlp_neurons"][layer, position, index] * down[layer, index]
        changed = without("mlp_out", layer, position, part=contribution)
        effects["feature", layer, position, index] = complete - measure(mlp_out=changed)
    effects["bias",] = complete - sum(effects.values())

    hop, state, logit = nodes(city)
    width = model.config.mlp_width
    index = {hop: hop[-1], state: width + state[-1], logit: 2 * width}
    want = expected_edges(city, norms=model.config.norm == "rms")
    for target, at in index.items():
        for source, effect in effects.items():
            np.testing.assert_allclose(
                effect[at], want.get((target, source), 0.0), atol=1e-5, err_msg=f"{target} {source}"
            )
        total = sum(value for (into, _), value in want.items() if into == target)
        np.testing.assert_allclose(complete[at], total, atol=1e-5)
    assert {source for _, source in want} <= set(effects)


class Push(eqx.Module):
    """Adds a vector to the stream between the layers, at the last position."""

    vector: jax.Array

    def __call__(self, place, value):
        return value.at[:, LAST].add(self.vector) if place[:2] == ("resid_post", 0) else value


def answers(model, coder=None, push=0.0) -> np.ndarray:
    """The answers of the model, or of its replacement, with a vector added to the stream between the layers."""
    edits = [] if coder is None else [CoderReplacement(coder)]
    push = Push(np.broadcast_to(np.float32(push), (len(TOKENS), model.config.width)))
    logits, _ = jclt.run(model, TOKENS, edit=Compose([*edits, push]), unroll=True)
    return np.asarray(logits)[:, LAST].argmax(-1)


@jax.jit
def encode(coder, reads):
    """The activations and the reconstructions of both layers."""
    activations = [coder.encode(layer, reads[layer]) for layer in range(2)]
    return activations, jnp.stack([coder.write(layer, activations, reads[layer]) for layer in range(2)])


@each_model
@pytest.mark.parametrize("make", [neurons, faithful_coder, unfaithful_coder])
def test_all_coders_reconstruct_exactly_and_the_unfaithful_one_with_a_single_feature(name, make):
    model = MODEL[name]
    coder = make(model)
    _, seen = jclt.run(model, TOKENS, capture=(coder.config.reads, coder.config.writes))
    activations, reconstruction = jax.device_get(encode(coder, seen[coder.config.reads]))
    assert np.abs(reconstruction - np.asarray(seen[coder.config.writes])).max() <= (0.0 if name == "plain" else 3e-6)
    active = [int((a[:, LAST] > 0).sum(-1).max()) for a in activations]
    assert active == ([1, 0] if make is unfaithful_coder else [1, 1])
    assert not any((a[:, :LAST] > 0).any() for a in activations)
    np.testing.assert_array_equal(answers(model, coder), ANSWERS)


@each_model
def test_another_state_between_the_layers_moves_all_but_the_unfaithful_replacement(name):
    model = MODEL[name]
    directions, state = np.asarray(model.params["token_embedding"])[list(STATE_TOKENS)], np.asarray(STATE_OF_CITY)
    other = (state + 1) % len(STATE_TOKENS)
    push = directions[other] - directions[state]
    moved = np.asarray(CAPITAL_TOKENS)[np.asarray(CAPITAL_OF)[other]]
    np.testing.assert_array_equal(answers(model, push=push), moved)
    np.testing.assert_array_equal(answers(model, faithful_coder(model), push), moved)
    np.testing.assert_array_equal(answers(model, neurons(model), push), moved)
    np.testing.assert_array_equal(answers(model, unfaithful_coder(model), push), ANSWERS)


@pytest.mark.parametrize("faithful", [True, False])
@each_model
def test_expected_edges_into_the_logit_sum_to_it(name, faithful):
    logits = deviation(jclt.run(MODEL[name], TOKENS)[0])
    for city in CITIES:
        edges = expected_edges(city, norms="norms" in name, faithful=faithful)
        into_logit = sum(value for (into, _), value in edges.items() if into == nodes(city)[-1])
        assert into_logit == pytest.approx(logits[city, ANSWERS[city]], abs=1e-5)


def test_a_model_without_norms_is_refused_by_the_published_layouts(tmp_path):
    with pytest.raises(jclt.UserError, match="family gpt2: norm=none cannot be written in its layout, expected layer"):
        save_model(MODEL["plain"], tmp_path / "model")
    assert not list(tmp_path.iterdir())
