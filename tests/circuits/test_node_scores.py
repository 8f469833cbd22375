"""Scores of nodes: the methods agree where they must, and on real bends only as far as they should."""

import jax
import numpy as np
import pytest
from golden_cases import FOLDER
from more_cases import mark_others
from patching_prompts import get_pairs
from random_coders import random_coder
from small_models import LINEAR, ROWS, make_model, make_small_pairs

import jclt
from jclt import UserError
from jclt.circuits import Basis, score_nodes
from jclt.circuits.gradients import find_points
from jclt.coders import CoderConfig

SMOOTH = {"activation": "gelu", "gated": False, "norm": "layer", "norm_epsilon": 1.0, "mlp_bias": True}
"""Norms that hardly bend, so that few points integrate to float64."""
STEPS = 24


def swap(rows):
    return [(corrupted, clean, right, wrong) for clean, corrupted, right, wrong in rows]


def measure(model, pairs):
    """The metric of the clean and of the corrupted prompts."""
    both = []
    for side in (pairs.clean, pairs.corrupted):
        logits = [np.asarray(jclt.run(model, ids)[0][-1]) for ids in side]
        answers = zip(logits, pairs.answers, pairs.wrong_answers, strict=True)
        both.append(np.array([row[list(right)].mean() - row[list(wrong)].mean() for row, right, wrong in answers]))
    return both


@pytest.mark.parametrize("basis", mark_others(["neurons", "heads", "residual", "streams", "values"], ["heads"]))
def test_on_a_linear_model_all_methods_agree_at_every_node(basis):
    with jax.enable_x64():
        model = make_model(**LINEAR)
        pairs = make_small_pairs(model)
        exact = score_nodes(model, pairs, basis, "exact").per_pair
        assert np.abs(exact).max() > 0.1 and exact.dtype == np.float64
        for method in ("atp", "relp", "ig inputs", "ig activations"):
            np.testing.assert_allclose(score_nodes(model, pairs, basis, method).per_pair, exact, atol=2e-12)


def test_integrated_gradients_of_the_embeddings_sum_to_the_difference_of_the_runs():
    """The more points, the closer; and each quadrature as close as its order lets it be."""
    with jax.enable_x64():
        model = make_model(**SMOOTH)
        pairs = make_small_pairs(model)
        clean, corrupted = measure(model, pairs)

        def find_error(quadrature):
            scores = score_nodes(model, pairs, "embeddings", "ig inputs", quadrature=quadrature, steps=STEPS)
            return np.abs(scores.per_pair.sum(axis=(1, 2, 3)) - (corrupted - clean)).max()

        assert find_error("gauss") < 1e-9
        left, middle = find_error("left"), find_error("midpoint")
        assert middle < left / 10 and 1e-4 < left < 0.1 * np.abs(corrupted - clean).max()


def test_swapped_runs_give_the_opposite_scores():
    with jax.enable_x64():
        model = make_model(**SMOOTH)
        runs = make_small_pairs(model), make_small_pairs(model, swap(ROWS))
        forth, back = (score_nodes(model, pairs, "embeddings", "ig inputs", steps=STEPS).per_pair for pairs in runs)
        np.testing.assert_allclose(forth, -back, atol=1e-14)


@pytest.mark.exhaustive  # the names of single points and runs; the default of each is tested above and below
def test_one_point_is_the_gradient_at_a_run():
    with jax.enable_x64():
        model = make_model(**SMOOTH)
        forth, back = make_small_pairs(model), make_small_pairs(model, swap(ROWS))
        clean = score_nodes(model, forth, "neurons", "atp").per_pair
        corrupted = score_nodes(model, forth, "neurons", "atp", at="corrupted").per_pair
        np.testing.assert_allclose(corrupted, -score_nodes(model, back, "neurons", "atp").per_pair, atol=1e-14)
        for quadrature, want in (("left", clean), ("right", corrupted)):
            found = score_nodes(model, forth, "neurons", "ig inputs", quadrature=quadrature, steps=1).per_pair
            np.testing.assert_allclose(found, want, atol=1e-14)


def test_activations_of_a_layer_move_while_the_rest_of_the_run_stays():
    """All neurons of the last layer at the last position: their scores sum to what they do together."""
    with jax.enable_x64():
        model = make_model(**SMOOTH)
        pairs = make_small_pairs(model)
        scores = score_nodes(model, pairs, "neurons", "ig activations", steps=STEPS).per_pair[:, 1].sum(axis=2)
        clean, corrupted = pairs.clean[0], np.array(ROWS[0][1])
        there = jclt.run(model, corrupted, capture=("mlp_neurons",))[1]
        edit = jclt.Replace(there, layer=1, position=4)
        (right,), (wrong,) = pairs.answers[0], pairs.wrong_answers[0]
        rows = [np.asarray(jclt.run(model, clean, edit=e)[0][-1]) for e in (None, edit)]
        moved = [row[right] - row[wrong] for row in rows]
        np.testing.assert_allclose(scores[0, 4], moved[1] - moved[0], atol=1e-9)


@pytest.mark.parametrize("name", mark_others(["gemma2", "neox", "gpt2", "qwen3"], ["gemma2"]))
@pytest.mark.parametrize("basis", mark_others(["heads", "mlps"], ["heads"]))
def test_exact_scores_are_those_of_patching(name, basis):
    model, pairs = jclt.load_model(FOLDER / name), get_pairs(name)
    scores = score_nodes(model, pairs, basis, "exact").per_pair
    site, heads = {"heads": ("head_out", True), "mlps": ("mlp_out", False)}[basis]
    options = {"heads": heads, "mode": "noising", "metric": "logit_difference", "progress": False}
    result = jclt.patch(model, pairs, site, **options)
    clean = result.clean_measures.logit_difference
    want = result.per_pair[:, 0] - clean.reshape(-1, *(1,) * (result.per_pair.ndim - 2))
    np.testing.assert_allclose(scores if heads else scores[..., 0], want, atol=2e-5)


def test_what_nothing_reads_has_no_effect_at_all():
    """In float32: ranks of effects would be those of rounding. Heads of the last layer before a prompt's last token."""
    model, pairs = jclt.load_model(FOLDER / "neox"), get_pairs("neox")
    scores = score_nodes(model, pairs, "heads", "exact").per_pair
    for row, ids in zip(scores, pairs.clean, strict=True):
        assert not row[-1, : len(ids) - 1].any() and row[-1, len(ids) - 1].any() and row[0, : len(ids) - 1].any()


def test_a_neuron_s_score_is_one_edited_pass_and_that_of_zero_needs_no_corrupted_prompt():
    with jax.enable_x64():
        model = make_model(**SMOOTH)
        alone = make_small_pairs(model, [(clean, None, right, wrong) for clean, _, right, wrong in ROWS])
        exact = score_nodes(model, alone, "neurons", "exact", reference="zero").per_pair
        clean, right, wrong = ROWS[1][0], [9, 10], [6]
        rows = [
            np.asarray(jclt.run(model, clean, edit=edit)[0][-1])
            for edit in (None, jclt.Set(0.0, site="mlp_neurons", layer=1, position=3, index=5))
        ]
        values = [row[right].mean() - row[wrong].mean() for row in rows]
        np.testing.assert_allclose(exact[1, 1, 3, 5], values[1] - values[0], atol=1e-12)
        assert not exact[1, :, 4].any()  # beyond the end of the second prompt
        with pytest.raises(UserError, match="pair 0 has no corrupted prompt"):
            score_nodes(model, alone, "neurons")


@pytest.mark.parametrize(
    ("method", "reference"),
    [("relp", "corrupted"), pytest.param("ig activations", "zero", marks=pytest.mark.exhaustive)],
)
def test_neurons_as_a_coder_have_the_scores_of_neurons_and_no_error(method, reference):
    with jax.enable_x64():
        model = make_model(**SMOOTH)
        pairs, coder = make_small_pairs(model), jclt.load_coder("neurons", model=model)
        of_coder, of_neurons = (
            score_nodes(model, pairs, basis, method, reference=reference, steps=2).per_pair
            for basis in (coder, "neurons")
        )
        np.testing.assert_allclose(of_coder[..., :-1], of_neurons, atol=1e-13)
        np.testing.assert_allclose(of_coder[..., -1], 0, atol=1e-13)


def test_features_and_errors_share_what_the_whole_site_has():
    """Of a coder that reconstructs badly: changes of features and errors sum to the change of the site."""
    model, pairs = jclt.load_model(FOLDER / "gpt2"), get_pairs("gpt2")
    coder = random_coder(CoderConfig("clt", 6, "relu").fit_to_model(model.config, "gpt2"))
    shares = score_nodes(model, pairs, coder, "atp").per_pair
    whole = score_nodes(model, pairs, Basis("whole", coder.config.writes, whole=True), "atp").per_pair
    assert shares.shape[1:] == (model.config.layers, 8, coder.config.features + 1)
    np.testing.assert_allclose(shares.sum(axis=(1, 3)), whole.sum(axis=(1, 3)), atol=1e-5)
    assert np.abs(shares[..., :-1]).max() > 1e-3 and np.abs(shares[..., -1]).max() > 1e-3


def test_summaries_orders_and_positions():
    with jax.enable_x64():
        model = make_model(**SMOOTH)
        scores = score_nodes(model, make_small_pairs(model), "heads", "atp")
        flat = scores.values.ravel()
        assert np.abs(flat[scores.rank_nodes()]).argmax() == 0
        assert flat[scores.rank_nodes("support")[0]] == flat.min()
        np.testing.assert_allclose(scores.over_positions, scores.per_pair.sum(2).mean(0))
        assert repr(scores) == "<NodeScores: atp of 20 nodes (heads) over 3 pairs>"
        assert len(scores.summarize(3).splitlines()) == 4 and "layer" in scores.summarize(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"basis": "neuron"}, r"basis 'neuron': does not exist, expected a coder or one of: embeddings"),
        ({"method": "lrp"}, r"method 'lrp': does not exist, expected one of: atp"),
        ({"metric": "rank"}, r"metric 'rank': expected one with a gradient"),
        ({"reference": "mean"}, r"reference 'mean': expected 'corrupted' or 'zero'"),
        ({"method": "ig inputs", "at": "corrupted"}, r"expected 'clean'"),
        ({"method": "exact", "rules": "relp"}, r"has no backward pass"),
        ({"method": "saturation fix"}, r"expected 'queries' or 'keys'"),
        ({"quadrature": "simpson"}, r"quadrature 'simpson': expected one of: gauss"),
        ({"steps": 0}, r"steps=0: expected at least 1"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(settings, message):
    with jax.enable_x64():
        model = make_model(**SMOOTH)
        with pytest.raises(UserError, match=message):
            score_nodes(model, make_small_pairs(model), **settings)


def test_a_site_with_keys_is_no_basis_and_points_have_weights_that_sum_to_one():
    for site in ("pattern", "logits", "neurons"):
        with pytest.raises(UserError, match="expected embeddings or a layer's, with axes B T"):
            Basis("other", site)
    for quadrature in ("gauss", "midpoint", "left", "right"):
        points, weights = find_points(quadrature, 7)
        assert abs(weights.sum() - 1) < 1e-12 and points.min() >= 0 and points.max() <= 1
