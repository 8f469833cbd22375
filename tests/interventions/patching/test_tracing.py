"""Causal tracing: restored and severed runs are one edited pass each, noise reaches the subject alone, and in the small
world it is the city that brings the capital back."""

import numpy as np
import pytest
from golden_cases import golden_model
from more_cases import mark_others
from patching_prompts import compute_difference, get_pairs, get_tokens

import jclt
from jclt.interventions import make_world_pairs
from jclt.interventions.patching.runs import prepare_job
from jclt.interventions.patching.tracing import draw_noise, measure_subjects
from jclt.models import Compose, Replace
from jclt.world import TASKS


def trace(*arguments, **settings):
    return jclt.trace_causes(*arguments, progress=False, **settings)


@pytest.mark.parametrize("severed", mark_others([None, "mlp_out"], ["mlp_out"]))
def test_each_restoration_is_one_edited_pass(severed):
    name, site, window = "llama3", "attn_out", 2
    model, pairs, (clean, _) = golden_model(name), get_pairs(name), get_tokens(name)
    result = trace(
        model, pairs, site, window=window, positions=(3, "last"), draws=2, severed=severed, metric="logit_difference"
    )
    assert result.axes["layer"] == (0, 1, 2) and result.changed == "corrupted"
    scale = 3.0 * measure_subjects(prepare_job(model, pairs))
    _, seen = jclt.run(model, clean, capture=(site, "token_embedding"))
    embedded, restored = np.asarray(seen["token_embedding"]), Replace({site: seen[site]}, layer=slice(0, 2), position=3)
    want = []
    for draw in range(2):
        noise = draw_noise(pairs, np.arange(2), model.config.width, scale, (0, draw))
        assert noise[:, 2:4].all() and not noise[:, :2].any() and not noise[:, 4:].any()

        add = Replace({"token_embedding": embedded + noise})
        logits, noised = jclt.run(model, clean, capture=("mlp_out",), edit=add)
        want.append(compute_difference(np.asarray(logits[:, -1])))
        edits = [add, restored]
        if severed:
            edits.append(Replace({severed: noised[severed]}, layer=slice(1, None), position=3))
        want.append(compute_difference(np.asarray(jclt.run(model, clean, edit=Compose(edits))[0][:, -1])))
    np.testing.assert_allclose(result.corrupted, np.mean(want[::2]), atol=5e-6)
    np.testing.assert_allclose(result.per_pair[:, 0, 1, 0], np.mean(want[1::2], axis=0), atol=5e-6)
    np.testing.assert_allclose(result.total_effect, result.clean - result.corrupted)
    assert abs(result.effects[0, 1, 0]) > 1e-4


def test_restoring_the_subject_at_the_bottom_restores_all_and_other_positions_nothing():
    model = golden_model("llama3")
    result = trace(model, get_pairs("llama3"), positions=("subject", "all", 0, 1), draws=2, metric="normalised")
    np.testing.assert_allclose(result.values[0, 0, 0], 1, atol=1e-4)
    np.testing.assert_allclose(result.values[0, :, 1], 1, atol=1e-4)
    np.testing.assert_allclose(result.values[0, :, 2:], 0, atol=1e-5)


def test_what_cannot_be_traced_is_named():
    model, pairs = golden_model("llama3"), get_pairs("llama3")
    for settings, message in (
        ({"draws": 0}, "draws=0"),
        ({"window": 0}, "window 0: expected at least 1 layer"),
        ({"sites": ("mlp_out",), "severed": "mlp_out"}, "severed 'mlp_out': is restored too"),
    ):
        with pytest.raises(jclt.UserError, match=message):
            trace(model, pairs, **settings)
    without = jclt.make_pairs(model, [([1, 2], None, 3)])
    with pytest.raises(jclt.UserError, match="pair 0 has no subject"):
        trace(model, without)


def test_the_city_brings_the_capital_back():
    """In the first layers the city's state restores the answer, at the end the last position's; <bos> never does."""
    model = jclt.load_model("demo")
    pairs = make_world_pairs(model, "two_hop", 40).keep_one_length().take(range(6))
    result = trace(model, pairs, positions=("subject", "last", 0), draws=3)
    subject, last, control = result.effects[0].T
    assert result.total_effect > 0.3
    assert subject[0] == pytest.approx(result.total_effect, abs=1e-3) and subject[-1] < 0.1 * result.total_effect
    assert last[-1] > 0.9 * result.total_effect and last[0] < 0.1 * result.total_effect
    assert abs(control).max() < 0.05


@pytest.mark.parametrize("task", mark_others(TASKS, ["antonym"]))
def test_on_every_task_the_answer_moves_from_what_differs_to_the_end(task):
    """The generator knows the tokens that decide the answer: at the bottom they carry all of it, and the end nothing;
    at the top the end carries a part or all of it. Noise and the other prompt's values say the same."""
    model = jclt.load_model("demo")
    pairs = make_world_pairs(model, task, 16)
    before_end = [span[1] < len(ids) for span, ids in zip(pairs.subjects, pairs.clean, strict=True)]
    pairs = pairs.take(np.flatnonzero(before_end)).keep_one_length()  # each length has programs of its own
    positions = ("subject", "last")
    traced = trace(model, pairs, "resid_pre", positions=positions, draws=2, metric="logit_difference")
    patched = jclt.patch(model, pairs, "resid_pre", positions=positions, progress=False)
    shares = (traced.effects / traced.total_effect)[0]
    np.testing.assert_allclose(shares[0], [1, 0], atol=0.02)
    assert shares[-1, 0] < 0.8 and shares[-1, 1] > 0.2
    np.testing.assert_allclose(patched.values[0], shares, atol=0.25)
