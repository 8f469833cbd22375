"""The laws that patching, relevance and edge scores rely on, for every site; for most families with `-m exhaustive`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import CASES, golden_model, reference
from more_cases import mark_others

import jclt
from jclt.models import LAYER_SITES, PATTERNS_AND_DENOMINATORS, PEER_NAMES, SITES, Compose, Freeze, Replace, forward

FAMILIES = [case for case in CASES if case not in ("gpt2_scaled", "gpt2_unscaled", "llama_linear", "llama2")]

FEW = ("gemma2", "gpt2", "neox")
"""Post-norms, soft caps and windows; learned positions and biases; parallel blocks."""

FEWER = ("gemma2", "neox")
"""Without GPT-2: for tests whose programs take long to compile."""


def sites_of(case: str) -> list[str]:
    """The sites that this model has."""
    tokens = jnp.asarray(reference(case)["tokens"], jnp.int32)
    model = golden_model(case)
    seen = jax.eval_shape(lambda: forward(model.config, model.params, tokens, capture=tuple(SITES))[1])
    return [name for name in SITES if name in seen]


def two_prompts(case: str) -> tuple[np.ndarray, np.ndarray]:
    tokens = reference(case)["tokens"]
    return tokens[:1], tokens[1:2]


def replace_only(seen: dict, site: str, **where) -> Compose:
    """Replaces one site. The edits of all other sites act nowhere, so that one compiled program serves every site."""
    return Compose([Replace({name: value}, **one_range(name, name == site, where)) for name, value in seen.items()])


def one_range(name: str, chosen: bool, where: dict) -> dict:
    """The same ranges for every site, layers only for sites that have them."""
    nowhere = {"position": slice(0, 0)}
    everywhere = {"position": slice(None)}
    ranges = everywhere | where if chosen else nowhere | {"layer": 0}
    if name not in LAYER_SITES:
        return {key: value for key, value in ranges.items() if key != "layer"}
    return {"layer": slice(None)} | ranges


@pytest.mark.optimized
@pytest.mark.parametrize("case", mark_others(FAMILIES, FEWER))
def test_putting_back_what_was_captured_changes_no_bit(case):
    model, (tokens, _) = golden_model(case), two_prompts(case)
    sites = sites_of(case)
    plain, _ = jclt.run(model, tokens)
    logits, seen = jclt.run(model, tokens, capture=sites)
    assert set(seen) == set(sites)
    np.testing.assert_array_equal(logits, plain)
    for name in sites:
        again, after = jclt.run(model, tokens, ("resid_post",), edit=replace_only(seen, name))
        np.testing.assert_array_equal(again, plain, err_msg=name)
        np.testing.assert_array_equal(after["resid_post"], seen["resid_post"], err_msg=name)


@pytest.mark.exhaustive
@pytest.mark.optimized
def test_putting_back_a_single_site_changes_no_bit():
    """The same law if the compiler sees only one site, and may fuse everything else: for a site of each kind."""
    model, (tokens, _) = golden_model("gemma2"), two_prompts("gemma2")
    plain, _ = jclt.run(model, tokens)
    for name in ("resid_mid", "attn_denominator", "queries", "attn_scores", "pattern", "head_out", "mlp_neurons"):
        logits, seen = jclt.run(model, tokens, capture=(name,))
        again, _ = jclt.run(model, tokens, edit=Replace(seen))
        np.testing.assert_array_equal(logits, plain, err_msg=name)
        np.testing.assert_array_equal(again, plain, err_msg=name)


@pytest.mark.optimized
@pytest.mark.parametrize("case", mark_others(FAMILIES, FEWER))
def test_a_change_never_moves_an_earlier_position(case):
    """Every site is changed at one position; all before it must keep every bit.

    The programs are those of `test_putting_back_what_was_captured_changes_no_bit`."""
    model, (tokens, _) = golden_model(case), two_prompts(case)
    position = 6
    sites = sites_of(case)
    plain, seen = jclt.run(model, tokens, capture=sites)
    seen = {name: np.asarray(value) for name, value in seen.items()}
    strange = {name: np.float32(1.5) * value + np.cos(3 * value) for name, value in seen.items()}  # no norm undoes this
    moved = {}
    for name in sites:
        changed, after = jclt.run(model, tokens, ("resid_post",), edit=replace_only(strange, name, position=position))
        np.testing.assert_array_equal(changed[:, :position], plain[:, :position], err_msg=name)
        np.testing.assert_array_equal(after["resid_post"][:, :, :position], seen["resid_post"][:, :, :position])
        moved[name] = float(abs(changed[:, position:] - plain[:, position:]).max())
    assert min(moved.values()) > 1e-6, moved


@pytest.mark.parametrize("case", mark_others(FAMILIES, FEW))
def test_replacing_a_layer_cut_gives_the_other_prompts_logits(case):
    model, (tokens, others) = golden_model(case), two_prompts(case)
    # In a parallel block the stream does not pass through resid_mid.
    cuts = ["resid_pre", "resid_post", "resid_final", *([] if model.config.parallel else ["resid_mid"])]
    want, seen = jclt.run(model, others, capture=cuts)
    unchanged, _ = jclt.run(model, tokens, capture=cuts)
    assert float(abs(unchanged - want).max()) > 1e-2
    for name in seen:
        for layer in range(model.config.layers) if name in LAYER_SITES else [None]:
            where = {} if layer is None else {"layer": layer}
            got, _ = jclt.run(model, tokens, edit=replace_only(seen, name, **where))
            np.testing.assert_allclose(got, want, atol=1e-5, rtol=0, err_msg=f"{name} {layer}")


@pytest.mark.parametrize("case", mark_others(FAMILIES, FEWER))
def test_with_patterns_and_denominators_frozen_and_mlps_constant_the_model_is_linear(case):
    """The Jacobian-vector product of the frozen model equals the finite difference of the model with these values
    replaced, at any step size; the free model fails this comparison."""
    model, (tokens, _) = golden_model(case), two_prompts(case)
    frozen = [name for name in sites_of(case) if name in PATTERNS_AND_DENOMINATORS]
    _, seen = jclt.run(model, tokens, capture=[*frozen, "mlp_out", "token_embedding"])
    start = np.asarray(seen["token_embedding"])
    direction = np.random.default_rng(0).standard_normal(start.shape, np.float32)

    def normed_final(embedding, freeze=(), put_back=()):
        values = {name: seen[name] for name in ("mlp_out", *put_back)} | {"token_embedding": embedding}
        edit = Compose((Replace(values), Freeze(freeze)))
        _, final = jclt.run(model, tokens, capture=("resid_final",), edit=edit)
        return final["resid_final"]

    _, slope = jax.jvp(lambda e: normed_final(e, freeze=frozen), (start,), (direction,))
    difference = np.subtract(*(normed_final(e, put_back=frozen) for e in (start + 3 * direction, start)))
    np.testing.assert_allclose(difference / 3, slope, atol=1e-4, rtol=1e-4)
    free = np.subtract(*(normed_final(e) for e in (start + 3 * direction, start)))
    assert float(abs(free / 3 - slope).max()) > 1e-2


def test_the_mlp_is_an_argument():
    model, (tokens, others) = golden_model("gemma2"), two_prompts("gemma2")
    want, seen = jclt.run(model, others, capture=("mlp_out", "mlp_in", "mlp_normalized", "resid_mid"))
    reads_seen = {}

    def record_reads(layer, reads, true):
        reads_seen.update(reads)
        return true()

    same, _ = jclt.run(model, others, mlp=record_reads)
    np.testing.assert_array_equal(same, want)
    assert set(reads_seen) == {"resid_mid", "mlp_normalized", "mlp_in"}
    silent, silent_seen = jclt.run(
        model,
        tokens,
        capture=("resid_mid", "resid_post"),
        mlp=lambda layer, reads, true: jnp.zeros_like(reads["mlp_in"]),
    )
    np.testing.assert_array_equal(silent_seen["resid_post"], silent_seen["resid_mid"])
    replaced, _ = jclt.run(model, others, mlp=lambda layer, reads, true: seen["mlp_out"][layer])
    np.testing.assert_array_equal(replaced, want)


def test_an_edit_is_any_function_of_place_and_value():
    model, (tokens, _) = golden_model("llama3"), two_prompts("llama3")

    def knock_out(place, value):
        return jnp.where(place.layer == 1, 0.0, value) if place.site == "head_out" else value

    _, seen = jclt.run(model, tokens, capture=("head_out",), edit=knock_out)
    silent = [float(abs(heads).max()) == 0 for heads in seen["head_out"]]
    assert silent == [layer == 1 for layer in range(model.config.layers)]


def test_capture_costs_nothing_when_not_asked_for():
    """The program without capture has no barriers except those of the norms; an edit that returns the value itself
    changes no instruction of the compiled program."""
    model, (tokens, _) = golden_model("llama3"), two_prompts("llama3")
    tokens = jnp.asarray(tokens, jnp.int32)

    def lower(**options):
        return jax.jit(lambda t: forward(model.config, model.params, t, **options)[:2]).lower(tokens)

    def list_instructions(**options):
        lines = lower(**options).compile().as_text().splitlines()
        return [re.sub(r"metadata=\{[^}]*\}", "", line) for line in lines if " = " in line]

    plain, watched = (lower(capture=sites).as_text() for sites in ((), ("resid_mid", "pattern")))
    assert watched.count("optimization_barrier") == plain.count("optimization_barrier") + 2
    assert plain.count("optimization_barrier") == 6  # each norm's input and denominator: two norms a layer, one outside
    assert list_instructions(edit=lambda place, value: value) == list_instructions()


def test_program_size_does_not_grow_with_depth():
    from dataclasses import replace

    from jclt.models import abstract_params

    config, (tokens, _) = golden_model("llama3").config, two_prompts("llama3")

    def size(layers: int) -> int:
        deep = replace(config, layers=layers)
        lowered = jax.jit(lambda p, t: forward(deep, p, t)[0]).lower(
            abstract_params(deep), jax.ShapeDtypeStruct(tokens.shape, jnp.int32)
        )
        return len(lowered.as_text().splitlines())

    assert size(48) == size(4)


def test_unknown_sites_are_named():
    model, (tokens, _) = golden_model("llama3"), two_prompts("llama3")
    with pytest.raises(jclt.UserError, match=r"site 'resid_mit' does not exist; did you mean 'resid_mid'\?"):
        jclt.run(model, tokens, capture=("resid_mit",))
    with pytest.raises(jclt.UserError, match="site 'hook_resid_mid': this is called 'resid_mid' here"):
        jclt.run(model, tokens, capture=("hook_resid_mid",))
    with pytest.raises(
        jclt.UserError, match="site 'mlp_post_denominator': a llama model of this configuration has none"
    ):
        jclt.run(model, tokens, capture=("mlp_post_denominator",))
    assert set(PEER_NAMES.values()) <= set(SITES)


def test_what_is_put_back_has_to_fit():
    model, (tokens, _) = golden_model("llama3"), two_prompts("llama3")
    plain, seen = jclt.run(model, tokens[0], capture=("resid_mid",))
    again, _ = jclt.run(model, tokens[0], edit=Replace(seen))
    np.testing.assert_array_equal(again, plain)
    with pytest.raises(
        jclt.UserError, match=r"of site 'resid_mid': values of shape \(1, 14, 24\), expected \(1, 9, 24\)"
    ):
        jclt.run(model, tokens[0, :9], edit=Replace(seen))
    with pytest.raises(jclt.UserError, match="'mlp_post_denominator': a llama model of this configuration has none"):
        jclt.run(model, tokens, edit=Freeze(("mlp_post_denominator",)))
