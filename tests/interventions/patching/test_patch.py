"""Patching: each place of a grid is what one edited pass gives, and the laws hold on every kind of block."""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from golden_cases import golden_model
from more_cases import mark_others
from patching_prompts import FAMILIES, FEW, LENGTH, RIGHT, WRONG, compute_difference, get_pairs, get_tokens, run_one

import jclt
from jclt.interventions import batches
from jclt.interventions.patching.metrics import check_metric
from jclt.interventions.patching.patch import check_source
from jclt.world.facts import ASKED, CITIES, STATE_OF, STATES, value_of

GRID = {"sites": ("attn_out", "mlp_out"), "positions": (3, "subject", range(2, 6))}
"""What several tests patch, so that they share programs."""


def patch(*arguments, **settings):
    return jclt.patch(*arguments, progress=False, **settings)


@pytest.mark.parametrize("name", mark_others(FAMILIES, FEW))
@pytest.mark.parametrize("mode", ["denoising", "noising"])
def test_each_place_of_the_grid_is_one_edited_pass(name, mode):
    model, (clean, corrupted) = golden_model(name), get_tokens(name)
    base, other = (corrupted, clean) if mode == "denoising" else (clean, corrupted)
    sites, positions, layers = ("resid_pre", "attn_out", "mlp_out"), (0, 2, LENGTH - 1), range(model.config.layers)
    _, seen = jclt.run(model, other, capture=(*sites, "head_out"))
    result = patch(model, get_pairs(name), sites, positions=positions, mode=mode, metric="logit_difference")
    assert result.values.shape == (3, len(layers), 3) and list(result.axes) == ["site", "layer", "position"]
    unchanged = compute_difference(run_one(name, base, seen, "", layer=0, position=0))
    moved = []
    for (i, site), layer, (k, position) in product(enumerate(sites), layers, enumerate(positions)):
        want = compute_difference(run_one(name, base, seen, site, layer=layer, position=position))
        np.testing.assert_allclose(result.per_pair[:, i, layer, k], want, atol=5e-6)
        moved.append(abs(want - unchanged).max())
    assert max(moved) > 1e-3
    np.testing.assert_allclose(result.values, result.per_pair.mean(axis=0), rtol=1e-12)


@pytest.mark.parametrize("name", mark_others(FAMILIES, FEW[:1]))
def test_each_head_of_the_grid_is_one_edited_pass(name):
    model, (clean, corrupted) = golden_model(name), get_tokens(name)
    result = patch(model, get_pairs(name), "head_out", heads=True, positions=(3,), metric="logit_difference")
    assert result.per_pair.shape == (2, 1, model.config.layers, 1, model.config.heads)
    _, seen = jclt.run(model, clean, capture=("resid_pre", "attn_out", "mlp_out", "head_out"))
    for layer, head in product(range(model.config.layers), range(model.config.heads)):
        want = compute_difference(run_one(name, corrupted, seen, "head_out", layer=layer, position=3, head=head))
        np.testing.assert_allclose(result.per_pair[:, 0, layer, 0, head], want, atol=5e-6)


@pytest.mark.parametrize("name", mark_others(FAMILIES, ["llama3"]))
def test_a_whole_cut_gives_the_other_prompt_and_a_prompt_without_changes_gives_itself(name):
    """All positions of a layer's stream, and what the grid's positions do not reach."""
    model, pairs = golden_model(name), get_pairs(name)
    cut = patch(model, pairs, "resid_pre", positions=("all", 0, 1))
    np.testing.assert_allclose(cut.values[0, :, 0], 1, atol=1e-4)
    np.testing.assert_allclose(cut.use_metric("kl").values[0, :, 0], 0, atol=1e-6)
    # Before the first token that differs there is nothing to restore.
    np.testing.assert_allclose(cut.values[0, :, 1:], 0, atol=1e-5)
    assert cut.clean == 1 and cut.corrupted == 0 and cut.total_effect == 1
    clean, corrupted = get_tokens(name)
    for tokens, measures in ((clean, cut.clean_measures), (corrupted, cut.corrupted_measures)):
        want = compute_difference(np.asarray(jclt.run(model, tokens)[0][:, -1]))
        np.testing.assert_allclose(measures.logit_difference, want, atol=1e-6)


def test_batches_lengths_and_starts_change_nothing(monkeypatch):
    """Three pairs of two lengths, many at a time and few at a time, from the first position and from a later one."""
    name = "llama3"
    model, (clean, corrupted) = golden_model(name), get_tokens(name)
    rows = [(clean[i, :n], corrupted[i, :n], RIGHT[i], WRONG[i]) for i, n in ((0, LENGTH), (1, 5), (1, LENGTH))]
    where = {"positions": (2, -1, "all"), "metric": "kl"}
    whole = patch(model, jclt.make_pairs(model, rows), "resid_pre", **where)
    monkeypatch.setattr(batches, "BATCH_TOKENS", {"cpu": LENGTH})
    monkeypatch.setattr(batches, "WORTH_A_PROGRAM", 1.0)
    monkeypatch.setattr(batches, "STARTING_POSITIONS", 2)
    split = patch(model, jclt.make_pairs(model, rows[::2]), "resid_pre", **where)
    np.testing.assert_allclose(split.per_pair, whole.per_pair[::2], atol=1e-6)
    assert abs(whole.per_pair[0] - whole.per_pair[2]).max() > 1e-4
    want = compute_difference(np.asarray(jclt.run(model, clean)[0][:, -1]))
    np.testing.assert_allclose(whole.clean_measures.logit_difference[::2], want, atol=1e-6)
    with pytest.raises(jclt.UserError, match="the prompts have 5 to 8 tokens, expected one length"):
        patch(model, whole.pairs)


def test_ablations_put_what_they_say():
    """Zero, means and another prompt's value are one edited pass each; noise depends on the seed and the pair alone."""
    name = "llama3"
    model, pairs, (clean, _) = golden_model(name), get_pairs(name), get_tokens(name)
    _, seen = jclt.run(model, clean, capture=GRID["sites"])
    seen = {site: np.asarray(value) for site, value in seen.items()}
    changes = {
        "zero": np.zeros_like,
        "mean": lambda x: np.broadcast_to(x.mean(axis=(1, 2), keepdims=True), x.shape),
        "position mean": lambda x: np.broadcast_to(x.mean(axis=1, keepdims=True), x.shape),
        "resample": lambda x: x[:, ::-1],
    }
    for source, change in changes.items():
        got = patch(model, pairs, source=source, metric="logit_difference", **GRID)
        values = {site: change(value) for site, value in seen.items()}
        for i, site in enumerate(GRID["sites"]):
            want = compute_difference(run_one(name, clean, values, site, layer=1, position=3))
            np.testing.assert_allclose(got.per_pair[:, i, 1, 0], want, atol=5e-6)
        assert got.changed == "clean" and source in got.method
    alone = replace(pairs, corrupted=(None,) * len(pairs))  # an ablation needs no corrupted prompts
    got = patch(model, alone, source="resample", metric="logit_difference", **GRID)
    np.testing.assert_allclose(got.per_pair[:, i, 1, 0], want, atol=5e-6)
    noisy, again, other = (patch(model, pairs, source="noise", seed=seed, **GRID).per_pair for seed in (1, 1, 2))
    np.testing.assert_array_equal(noisy, again)
    assert abs(noisy - other).max() > 1e-4


def test_a_result_has_labels_other_metrics_and_a_picture(tmp_path):
    name = "llama3"
    result = patch(golden_model(name), get_pairs(name), **GRID)
    assert result.axes["position"] == ("3 *", "subject", "2-5") and result.axes["layer"] == (0, 1, 2)
    by_rank = result.use_metric("rank")
    assert by_rank.values.shape == result.values.shape and (by_rank.per_pair == np.round(by_rank.per_pair)).all()
    np.testing.assert_allclose(result.effects, result.values - result.corrupted)
    assert "denoising" in repr(result) and "2 pairs" in repr(result) and "layer 2" in result.summarize(18)
    jclt.viewer.draw_patching(result, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(jclt.UserError, match="cannot draw 'txt'"):
        jclt.viewer.draw_patching(result, tmp_path / "grid.txt")


def test_what_cannot_be_patched_is_named():
    model, pairs = golden_model("llama3"), get_pairs("llama3")
    for settings, message in (
        ({"sites": "mlp_outt"}, "site 'mlp_outt' does not exist"),
        ({"sites": "resid_final"}, "site 'resid_final': is outside the layers"),
        ({"sites": "mlp_out", "heads": True}, "site 'mlp_out': has no axis of heads"),
        ({"sites": ("head_out", "keys"), "heads": True}, "have 2 and 4 heads"),
        ({"layers": (3,)}, "layer 3: expected 0 to 2"),
        ({"positions": (8,)}, "position 8: pair 0 has 8 tokens"),
        ({"positions": ("middle",)}, "position 'middle': expected a number"),
        ({"source": "zero", "mode": "denoising"}, "mode 'denoising' with source 'zero'"),
    ):
        with pytest.raises(jclt.UserError, match=message):
            patch(model, pairs, **settings)
    with pytest.raises(jclt.UserError, match="metric 'loss': does not exist"):
        check_metric("loss", pairs)
    with pytest.raises(jclt.UserError, match="source 'none': expected one of"):
        check_source(pairs, (), "none", "noising")
    with pytest.raises(jclt.UserError, match="the only prompt of its length"):
        patch(model, pairs.take([0]), source="resample")


def test_denoising_finds_where_the_small_world_computes_the_capital():
    """The stream carries the answer at the city, and from the layer on that moves it there at the last position; other
    positions carry nothing. Nor does a city of the same state: its answer is the same."""
    model, form = jclt.load_model("demo"), ASKED[0]
    by_state = {state: [city for city in CITIES if STATE_OF[city] == state][:2] for state in STATES}
    capitals = {state: f" {value_of(state, 'capital')}" for state in STATES}
    rows = {"other": [], "same": []}
    for state, another in pairwise(STATES[:5]):
        city, *twin = by_state[state]
        for which, donor in (("other", by_state[another][0]), ("same", *twin)):
            prompts = (form.format(city=name, relation="capital") for name in (city, donor))
            rows[which].append((*prompts, capitals[state], capitals[another], city))
    where = {"sites": ("resid_pre", "attn_out"), "positions": ("subject", "last", 1, 2), "metric": "logit_difference"}
    other, same = (patch(model, jclt.make_pairs(model, rows[which]), **where) for which in ("other", "same"))
    assert len(other.pairs) == len(same.pairs) == 4
    stream, attention = other.use_metric("normalised").values
    assert stream[0, 0] == pytest.approx(1, abs=1e-3) and stream[-1, 1] > 0.9
    assert abs(stream[0, 1]) < 0.05 and abs(stream[-1, 0]) < 0.1
    assert attention[:, 1].max() > 0.8, "attention at the last position moves it"
    assert abs(other.effects[:, :, 2:]).max() < 0.05 * other.total_effect, "other positions"
    assert abs(same.effects).max() < 0.2 * other.total_effect, "the same answer"
