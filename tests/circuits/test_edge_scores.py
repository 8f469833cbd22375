"""Scores of edges: each law of the methods in float64, on small random models."""

from dataclasses import replace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import FOLDER
from more_cases import mark_others
from patching_prompts import FAMILIES, get_pairs
from scipy.stats import spearmanr
from small_models import LINEAR, ROWS, make_model, make_small_pairs

import jclt
from jclt import UserError
from jclt.circuits import run_edge_circuits
from jclt.circuits.edge_runs import collect_writes, list_write_sites, run_edges
from jclt.circuits.edge_scores import score_edges
from jclt.circuits.edges import list_edges, list_receivers, list_senders
from jclt.circuits.node_runs import Ablation
from jclt.circuits.passes import measure_metric, pad_prompts, run_pass
from jclt.models import Replace

GELU = {"norm": "layer", "activation": "gelu", "gated": False, "mlp_bias": True, "qkv_bias": True, "kv_heads": 1}


def score(model, pairs, method="eap", **settings):
    return score_edges(model, pairs, method, progress=False, **settings)


@pytest.mark.parametrize("name", mark_others(FAMILIES, ["gemma3"]))
def test_eap_is_the_derivative_by_how_much_of_an_edge_is_kept(name):
    """An independent path: the run that mixes senders, differentiated by the mix at all edges."""
    with jax.enable_x64():
        model, pairs = jclt.load_model(FOLDER / name, dtype="float64"), get_pairs(name)
        config, prompts = model.config, jax.tree.map(jnp.asarray, pad_prompts(pairs))

        @jax.jit
        def differentiate(params):
            clean, _ = run_pass(config, params, prompts.clean, prompts.last)
            _, seen = run_pass(config, params, prompts.corrupted, prompts.last, capture=list_write_sites(config))
            other = collect_writes(config, params, seen)

            def measure(kept):
                logits = run_edges(config, params, prompts.clean, prompts.last, kept, other)
                return measure_metric("difference", logits, prompts.answers, clean)

            return jax.jacfwd(measure)(jnp.ones(list_edges(config).shape))

        want = -np.where(list_edges(config), np.asarray(differentiate(model.params)), 0)
        got = score(model, pairs, metric="difference").per_pair
    size = np.abs(want).max()
    np.testing.assert_allclose(got, want, atol=(1e-12 if name == "gpt2" else 1e-6) * size)  # rotations are in float32
    assert size > 1e-5


def test_senders_sum_to_what_the_receiver_reads():
    """Times the gradient there, taken from the model itself: at the logits, and at what a layer's heads share."""
    with jax.enable_x64():
        model = make_model(**GELU)
        pairs = make_small_pairs(model)
        got = score(model, pairs).per_pair[0]
        (clean, corrupted), layer = (pairs.clean[0], pairs.corrupted[0]), 1
        (_, old), (_, new) = (jclt.run(model, ids, capture=("resid_pre", "resid_post")) for ids in (clean, corrupted))
        right, wrong = pairs.answers[0], pairs.wrong_answers[0]

        def measure(added, site):
            def add(place, value):
                return jnp.where(place.layer == layer, value + added[None], value) if place.site == site else value

            logits = jclt.run(model, clean, edit=add)[0][-1]
            return logits[jnp.array(right)].mean() - logits[jnp.array(wrong)].mean()

        def through_norm(stream):
            centred = stream - stream.mean(axis=-1, keepdims=True)
            normed = centred / jnp.sqrt((centred**2).mean(axis=-1, keepdims=True) + model.config.norm_epsilon)
            return normed * model.params["attn_norm_gain"][layer][None] + model.params["attn_norm_bias"][layer][None]

        nothing = jnp.zeros_like(old["resid_pre"][0])
        differentiate = jax.jit(jax.grad(measure), static_argnums=1)
        at_end = jnp.sum(differentiate(nothing, "resid_post") * (new["resid_post"] - old["resid_post"])[layer])
        _, back = jax.vjp(through_norm, old["resid_pre"][layer])
        at_heads = jnp.sum(back(differentiate(nothing, "attn_in"))[0] * (new["resid_pre"] - old["resid_pre"])[layer])
    receivers = list_receivers(model.config)
    of_heads = [i for i, name in enumerate(receivers) if name.startswith(f"a{layer}.")]
    np.testing.assert_allclose(got[:, -1].sum(), at_end, rtol=1e-9)
    np.testing.assert_allclose(got[:, of_heads].sum(), at_heads, rtol=1e-9)
    assert len(of_heads) == 4  # two heads with one key and value head


def test_points_have_the_names_that_published_code_gives_them():
    """One step is EAP in the paper, and the gradient of the corrupted run in the code; both ends are their mean."""
    with jax.enable_x64():
        model = make_model(**GELU)
        pairs = make_small_pairs(model)
        swapped = make_small_pairs(model, [(row[1], row[0], *row[2:]) for row in ROWS])
        eap, back = score(model, pairs).values, score(model, swapped).values
        left, right = (score(model, pairs, "eap ig inputs", steps=1, quadrature=q).values for q in ("left", "right"))
        both = score(model, pairs, "clean corrupted").values
        np.testing.assert_allclose(left, eap, atol=1e-14)
        np.testing.assert_allclose(right, -back, atol=1e-12)
        np.testing.assert_allclose(both, (eap - back) / 2, atol=1e-12)
        opposite = score(model, make_small_pairs(model, [(*row[:2], row[3], row[2]) for row in ROWS])).values
        np.testing.assert_allclose(opposite, -eap, atol=1e-13)  # linear in the metric


SAME_LENGTH = [(*row[:2], 7 + i, i) for i, row in enumerate([*ROWS, ((3, 2, 9, 1), (3, 2, 5, 1), 2, 6)])]
"""Two pairs of each length, so that each can take what the other one writes."""


@pytest.mark.parametrize("ablation", mark_others(get_args(Ablation), ["mean"]))
def test_on_a_linear_model_scores_are_what_replacing_each_edge_does(ablation):
    with jax.enable_x64():
        model = make_model(**LINEAR)
        biases = model.params["up_bias"] + jnp.array([[0.0], [1e4]])  # all neurons stay active without layer 0, too
        model = replace(model, params={**model.params, "up_bias": biases})
        pairs, edges = make_small_pairs(model, SAME_LENGTH), list_edges(model.config)
        places = np.argwhere(edges)
        without = np.repeat(edges[None], len(places), axis=0)
        without[np.arange(len(places)), *places.T] = False
        masks = np.concatenate([without, edges[None], np.zeros_like(edges)[None]])
        *values, whole, empty = run_edge_circuits(model, pairs, masks, ablation=ablation)
        want = (np.stack(values) - whole).T
        methods = ("eap", "eap ig inputs", "eap ig activations", "exact")
        for method in methods[:1] if ablation == "mean" else methods:
            got = score(model, pairs, method, ablation=ablation)
            np.testing.assert_allclose(got.per_pair[:, edges], want, atol=1e-9, err_msg=method)
            np.testing.assert_allclose([got.clean, got.ablated], [whole, empty], atol=1e-9)
    assert np.abs(want).max() > 0.01 and np.abs(whole - empty).min() > 0.01


@pytest.mark.exhaustive  # a plain run has it on a linear model
@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_moved_inputs_reach_what_replaces_them(ablation):
    """With learned positions, which the input writes, too. The norms are smooth at 0: others jump there, and integrals
    up to it need far more points."""
    with jax.enable_x64():
        model = make_model(**GELU, learned_positions=True, norm_epsilon=1.0)
        pairs, edges = make_small_pairs(model), list_edges(model.config)
        masks = np.stack([edges, edges & (np.arange(len(edges)) > 0)[:, None]])
        whole, empty = run_edge_circuits(model, pairs, masks, ablation=ablation)
        got = score(model, pairs, "eap ig activations", ablation=ablation, quadrature="gauss", steps=16)
    np.testing.assert_allclose(got.per_pair[:, 0].sum(axis=1), empty - whole, rtol=1e-3)


@pytest.mark.exhaustive  # a plain run tests it of nodes
def test_the_way_back_has_the_opposite_scores():
    """Of points that are symmetric; those of the left sum are not."""
    with jax.enable_x64():
        model = make_model(**GELU)
        orders = ((0, 1), (1, 0))
        there, back = (make_small_pairs(model, [(row[i], row[j], *row[2:]) for row in ROWS]) for i, j in orders)
        for quadrature in ("gauss", "midpoint", "left"):
            one, other = (score(model, p, "eap ig inputs", quadrature=quadrature).values for p in (there, back))
            assert (np.abs(one + other).max() < 1e-12 * np.abs(one).max()) == (quadrature != "left")


METHODS = ("eap ig activations", "eap ig activations, all")


@pytest.mark.exhaustive  # slow; a plain run has the sums over senders, and of nodes these integrals
@pytest.mark.parametrize("method", METHODS)
def test_a_sender_that_moves_explains_what_its_move_changes(method):
    """Integrated gradients are complete: the scores of a group's edges add up to the effect of replacing its output.
    Those of published code, which average over all groups, are not."""
    with jax.enable_x64():
        model = make_model(**GELU)
        pairs = make_small_pairs(model)
        got = score(model, pairs, method, quadrature="gauss", steps=8)
        senders, (right, wrong) = list_senders(model.config), (pairs.answers[0], pairs.wrong_answers[0])
        _, seen = jclt.run(model, pairs.corrupted[0], capture=("head_out", "mlp_out"))
        for site, group in (("head_out", ("a0.h0", "a0.h1")), ("mlp_out", ("m0",))):
            logits = np.asarray(jclt.run(model, pairs.clean[0], edit=Replace({site: seen[site]}, layer=0))[0][-1])
            want = logits[list(right)].mean() - logits[list(wrong)].mean() - got.clean[0]
            rows = [senders.index(name) for name in group]
            miss = abs(got.per_pair[0, rows].sum() - want) / abs(want)
            assert miss < 1e-5 if method == METHODS[0] else miss > 1e-3


def test_flow_is_how_near_a_sender_comes_to_what_is_read():
    with jax.enable_x64():
        model = make_model(**GELU)
        pairs = make_small_pairs(model)  # of two lengths
        got = score(model, pairs, "information flow").per_pair
        for row, ids in enumerate(pairs.clean):
            _, seen = jclt.run(model, ids, capture=("token_embedding", "head_out", "mlp_out", "resid_mid"))
            seen = {name: np.asarray(x) for name, x in seen.items()}
            heads = np.einsum("thk,hkd->htd", seen["head_out"][0], np.asarray(model.params["attn_out"])[0])
            x, senders = seen["resid_mid"][0], np.stack([seen["token_embedding"], *heads])
            near = np.maximum(np.abs(x).sum(-1) - np.abs(x[None] - senders).sum(-1), 0)
            total = near.sum(0)
            shares = np.where(total > 0, near / np.where(total > 0, total, 1), 0).mean(-1)
            column = list_receivers(model.config).index("m0")
            np.testing.assert_allclose(got[row, :3, column], shares, atol=1e-12)
            np.testing.assert_array_equal(got[row, 3:, column], 0)
        np.testing.assert_allclose(got[:, 0, :4], 1, atol=1e-12)  # the heads of layer 0 read the input alone


@pytest.mark.exhaustive  # by default agreement is tested where it is exact; this takes 479 edges of the shipped model
def test_integrated_gradients_rank_edges_as_exact_patching_does():
    model = jclt.load_model("demo")
    pairs, edges = jclt.make_world_pairs(model, "agreement", 12), list_edges(model.config)
    exact = score(model, pairs, "exact").values[edges]
    methods = ("eap", "eap ig inputs", "eap ig activations")
    found = {method: spearmanr(score(model, pairs, method).values[edges], exact).statistic for method in methods}
    assert found["eap"] <= found["eap ig inputs"] + 0.02 and found["eap ig inputs"] >= 0.7, found


def test_wrong_settings_are_named():
    model = jclt.load_model(FOLDER / "gpt2")
    pairs = get_pairs("gpt2")
    for settings, message in (
        ({"method": "eapig"}, "method 'eapig': does not exist, expected one of: eap, relp"),
        ({"metric": "rank"}, "metric 'rank': expected one of: logit_difference"),
        ({"method": "eap", "metric": "kl"}, "its gradient on the clean run is 0, expected 'eap ig inputs'"),
        ({"method": "exact", "rules": "relp"}, "rules with method 'exact': expected none"),
        ({"quadrature": "simpson"}, "quadrature 'simpson': expected one of"),
        ({"ablation": "noise"}, "ablation 'noise': expected one of: zero"),
    ):
        with pytest.raises(UserError, match=message):
            score(model, pairs, **settings)
