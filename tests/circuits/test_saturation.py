"""Queries and keys with exact softmaxes: what follows the patterns is linear, so a model with one layer tells."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import FOLDER
from more_cases import mark_others
from patching_prompts import get_pairs
from small_models import make_model, make_small_pairs

import jclt
from jclt.circuits import score_nodes
from jclt.circuits.saturation import recompute_scores, score_keys
from jclt.models import Model
from jclt.models.transformer import make_context

PLAIN = {"norm": "none", "activation": "relu", "gated": False, "mlp_bias": True}


def make_sharp_model() -> Model:
    """One layer, whose neurons are all active, and in which each query attends to one key."""
    model = make_model(**PLAIN)
    params = {n: x[:1] if x.shape[0] == 2 and n != "unembedding" else x for n, x in model.params.items()}
    params |= {"query": 4 * params["query"], "up_bias": params["up_bias"] + 100}
    return Model(replace(model.config, layers=1), params, None, "sharp")


@pytest.mark.parametrize("basis", mark_others(["queries", "keys"], ["keys"]))
def test_they_are_the_exact_effects_where_all_but_the_softmax_is_linear_and_plain_gradients_are_not(basis):
    with jax.enable_x64():
        model = make_sharp_model()
        pairs = make_small_pairs(model)
        exact, fixed, plain = (
            score_nodes(model, pairs, basis, method).per_pair for method in ("exact", "saturation fix", "atp")
        )
    np.testing.assert_allclose(fixed, exact, atol=1e-10)
    assert np.abs(exact).max() > 0.1
    if basis == "keys":
        assert np.abs(plain - exact).max() > 0.3 * np.abs(exact).max()


def test_one_new_key_is_a_softmax_with_one_new_score():
    with jax.enable_x64():
        scores, rise, slopes = np.random.default_rng(0).standard_normal((3, 1, 2, 4, 4))
        scores, rise = 20 * scores, 20 * rise
        mask = np.tril(np.ones((1, 4, 4), bool))
        pattern = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1)
        found = score_keys(pattern, jnp.asarray(rise), jnp.asarray(slopes), jnp.asarray(mask))
        for key in range(4):
            changed = scores + rise * (np.arange(4) == key)
            new = jax.nn.softmax(jnp.where(mask[:, None], changed, -1e30), axis=-1)
            np.testing.assert_allclose(found[..., key], jnp.sum((new - pattern) * slopes, axis=(2, 3)), atol=1e-9)


@pytest.mark.parametrize("name", mark_others(["gemma3", "gpt2_scaled", "gemma2", "neox"], ["gemma3"]))
def test_scores_are_recomputed_as_the_model_computes_them(name):
    """Rotations, soft caps, grouped heads, windows, scales by layer."""
    model, tokens = jclt.load_model(FOLDER / name), jnp.asarray(get_pairs(name).clean)
    _, seen = jclt.run(model, tokens, capture=("queries", "keys", "attn_scores"))
    positions = jnp.broadcast_to(jnp.arange(8, dtype=tokens.dtype), tokens.shape)
    context = make_context(model.config, positions, 8, jnp.float32)
    for layer in range(model.config.layers):
        found = recompute_scores(context, layer, seen["queries"][layer], seen["keys"][layer])
        np.testing.assert_allclose(found, seen["attn_scores"][layer], atol=1e-5)
