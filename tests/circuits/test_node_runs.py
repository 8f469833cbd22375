"""The model with all nodes outside a circuit ablated: each kind of node and ablation is one edited pass."""

import jax
import numpy as np
import pytest
from golden_cases import FOLDER
from more_cases import mark_others
from patching_prompts import get_pairs
from random_coders import random_coder
from small_models import make_model, make_small_pairs

import jclt
from jclt import UserError
from jclt.circuits import run_circuits, score_nodes
from jclt.coders import CoderConfig

SMOOTH = {"activation": "gelu", "gated": True, "norm": "rms"}


def measure(model, pairs, pair, edit=None):
    row = np.asarray(jclt.run(model, pairs.clean[pair], edit=edit)[0][-1])
    return row[list(pairs.answers[pair])].mean() - row[list(pairs.wrong_answers[pair])].mean()


def read(model, tokens, site):
    return np.asarray(jclt.run(model, tokens, capture=(site,))[1][site])


def test_a_kept_neuron_reacts_and_the_others_have_their_mean_over_corrupted_prompts_at_their_position():
    """Of pairs of two lengths: the last position only the longer prompts have."""
    with jax.enable_x64():
        model = make_model(**SMOOTH)
        pairs = make_small_pairs(model)
        neurons = [read(model, ids, "mlp_neurons") for ids in pairs.corrupted]
        mean = [np.mean([x[:, t] for x in neurons if x.shape[1] > t], axis=0) for t in range(5)]
        keep = np.random.default_rng(0).random((2, 2, 5, 12)) < 0.5
        found = run_circuits(model, pairs, "neurons", keep)
        for pair, ids in enumerate(pairs.clean):

            def edit(place, value, number):
                if place.site != "mlp_neurons":
                    return value
                there = np.stack([x[place.layer] for x in mean[: value.shape[1]]])
                return jax.numpy.where(keep[number, place.layer, : value.shape[1]][None], value, there[None])

            for number in range(2):
                row = jclt.run(model, ids, edit=lambda p, v, n=number: edit(p, v, n), unroll=True)[0][-1]
                row = np.asarray(row)
                right, wrong = list(pairs.answers[pair]), list(pairs.wrong_answers[pair])
                np.testing.assert_allclose(found[number, pair], row[right].mean() - row[wrong].mean(), atol=1e-12)


@pytest.mark.parametrize("basis", mark_others(["neurons", "heads", "embeddings"], ["heads"]))
def test_with_all_nodes_it_is_the_model_and_with_none_what_the_ablation_says(basis):
    with jax.enable_x64():
        model = make_model(**SMOOTH)
        pairs = make_small_pairs(model)
        shape = score_nodes(model, pairs, basis, "atp").values.shape
        ends = np.stack([np.ones(shape, bool), np.zeros(shape, bool)])
        clean = [measure(model, pairs, pair) for pair in range(3)]
        site = {"neurons": "mlp_neurons", "heads": "head_out", "embeddings": "token_embedding"}[basis]
        for ablation in ("zero", "counterfactual", "mean"):
            found = run_circuits(model, pairs, basis, ends, ablation=ablation)
            np.testing.assert_allclose(found[0], clean, atol=1e-12)
            for pair, ids in enumerate(pairs.corrupted):
                values = read(model, ids, site)
                if ablation == "mean":
                    assert abs(found[1, pair] - clean[pair]) > 1e-6
                    continue
                edit = jclt.Replace({site: values if ablation == "counterfactual" else 0 * values})
                np.testing.assert_allclose(found[1, pair], measure(model, pairs, pair, edit), atol=1e-12)


def test_resampling_takes_the_values_of_another_pair():
    model, pairs = jclt.load_model(FOLDER / "neox"), get_pairs("neox")
    shape = (model.config.layers, 8, model.config.heads)
    (found,) = run_circuits(model, pairs, "heads", np.zeros((1, *shape), bool), ablation="resample")
    for pair in range(2):  # of two pairs each takes the other's
        edit = jclt.Replace({"head_out": read(model, pairs.clean[1 - pair], "head_out")})
        np.testing.assert_allclose(found[pair], measure(model, pairs, pair, edit), atol=1e-5)


@pytest.mark.parametrize("kind", mark_others(["clt", "sae"], ["clt"]))
def test_features_and_errors_are_kept_and_ablated_by_themselves(kind):
    """By hand: the site has what the kept features and the ablated ones write, and an error."""
    model, pairs = jclt.load_model(FOLDER / "gpt2"), get_pairs("gpt2")
    sites = {"reads": "resid_post", "writes": "resid_post"} if kind == "sae" else {}
    coder = random_coder(CoderConfig(kind, 6, "relu", **sites).fit_to_model(model.config, "gpt2"))
    shape = (model.config.layers, 8, 7)
    keep = np.random.default_rng(0).random((3, *shape)) < 0.5
    keep[0], keep[1, ..., -1] = True, False
    kept = keep.astype(np.float32)
    found = run_circuits(model, pairs, coder, keep, ablation="zero")
    for pair in range(2):
        np.testing.assert_allclose(found[0, pair], measure(model, pairs, pair), atol=2e-4)

        for number in (1, 2):
            seen, active, put = {}, [], []

            def edit(place, value, number=number, seen=seen, active=active, put=put):
                layer = place.layer
                if place.site == coder.config.reads:
                    seen[layer] = value
                    active.append(coder.encode(layer, value))
                    put.append(active[-1] * kept[number, layer, None, :, :-1])
                if place.site != coder.config.writes:
                    return value
                error = value - coder.write(layer, active, seen[layer])
                return coder.write(layer, put, seen[layer]) + error * kept[number, layer, None, :, -1:]

            row = np.asarray(jclt.run(model, pairs.clean[pair], edit=edit, unroll=True)[0][-1])
            want = row[list(pairs.answers[pair])].mean() - row[list(pairs.wrong_answers[pair])].mean()
            np.testing.assert_allclose(found[number, pair], want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ablation": "resample"}, r"is the only prompt of its length, expected two"),
        ({"metric": "kl"}, r"metric 'kl': expected one with a gradient"),
        ({"circuits": np.ones((1, 2, 4, 12), bool)}, r"expected booleans \[circuits, 2 layers, 5 positions, units\]"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(settings, message):
    with jax.enable_x64():
        model = make_model(**SMOOTH)
        circuits = settings.pop("circuits", np.ones((1, 2, 5, 12), bool))
        with pytest.raises(UserError, match=message):
            run_circuits(model, make_small_pairs(model), "neurons", circuits, **settings)
