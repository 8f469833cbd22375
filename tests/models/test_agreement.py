"""Logits, hidden states and greedy text agree with what transformers computed for random models of every family."""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import CASES, FOLDER, golden_model, reference
from more_cases import mark_others

import jclt

SHARED = Path(__file__).parents[2] / ".." / "shared"
SITES = ("resid_pre", "resid_post", "resid_final", "pattern")


@cache
def run_golden(case: str):
    """The pass with which other ways to run the model are compared."""
    return jclt.run(golden_model(case), reference(case)["tokens"], capture=SITES)


@cache
def generate_golden(case: str) -> np.ndarray:
    return jclt.generate(golden_model(case), reference(case)["tokens"], len(reference(case)["greedy"]), stop_tokens=())


@pytest.mark.parametrize("case", CASES)
def test_logits_and_hidden_states(case):
    want = reference(case)
    logits, seen = run_golden(case)
    hidden = np.concatenate([seen["resid_pre"], seen["resid_final"][None]])
    np.testing.assert_allclose(logits, want["logits"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(hidden, want["hidden"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", mark_others(CASES, ["gemma3", "gpt2", "neox"]))
def test_greedy_continuation(case):
    want = reference(case)
    assert generate_golden(case)[0, want["tokens"].shape[1] :].tolist() == want["greedy"].tolist()


def test_text_is_encoded_as_its_tokenizer_says():
    case = next(case for case in CASES if (FOLDER / case / "tokenizer.json").exists())
    want = reference(case)
    assert golden_model(case).encode(str(want["text"])) == want["text_tokens"].tolist()


@pytest.mark.parametrize("case", mark_others(["llama3", "gemma3", "gpt2"], ["gemma3", "gpt2"]))
def test_cached_generation_equals_generation_without_cache(case):
    prompts, generated = reference(case)["tokens"], generate_golden(case)
    length = prompts.shape[1]
    assert generated[:, :length].tolist() == prompts.tolist()
    logits, _ = jclt.run(golden_model(case), generated)  # what stands later changes nothing: one pass has all steps
    assert generated[:, length:].tolist() == np.asarray(logits)[:, length - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("case", mark_others(["llama3", "gemma2"], ["gemma2"]))
def test_bfloat16_stays_near_float32(case):
    exact, _ = run_golden(case)
    rough, _ = jclt.run(jclt.load_model(FOLDER / case, dtype="bfloat16"), reference(case)["tokens"])
    spread = float(exact.std())
    assert rough.dtype == np.float32
    assert 1e-4 * spread < float(abs(rough - exact).mean()) < 0.1 * spread


@pytest.mark.parametrize("case", mark_others(["gpt2", "gemma3"], ["gemma3"]))
def test_float64_is_float64_throughout(case):
    """Nothing is rounded to float32: the float32 pass differs only by its rounding."""
    rough, _ = run_golden(case)
    with jax.enable_x64():
        exact = jclt.load_model(FOLDER / case, dtype="float64")
        logits, seen = jclt.run(exact, reference(case)["tokens"], capture=("pattern", "mlp_neurons"))
        assert {logits.dtype, *(value.dtype for value in seen.values())} == {np.dtype("float64")}
        np.testing.assert_allclose(np.asarray(seen["pattern"]).sum(-1), 1.0, atol=1e-14)
        np.testing.assert_allclose(logits, rough, atol=1e-4, rtol=0)
        tokens = jclt.generate(exact, reference(case)["tokens"][0], 4, stop_tokens=())
    assert tokens.tolist() == [*reference(case)["tokens"][0], *reference(case)["greedy"][:4]]


@pytest.mark.parametrize(
    "case", mark_others(["gpt2_scaled", "gemma2", "gemma3", "neox", "qwen3"], ["gpt2_scaled", "gemma3"])
)
def test_unrolled_layers_equal_scanned_ones(case):
    """By default where layers differ by their number: in the scale of scores; in windows and rotations."""
    model, tokens = golden_model(case), reference(case)["tokens"]
    scanned, seen = run_golden(case)
    unrolled, seen_unrolled = jclt.run(model, tokens, capture=SITES, unroll=True)
    np.testing.assert_allclose(unrolled, scanned, atol=2e-5, rtol=0)
    for name in seen:
        np.testing.assert_allclose(seen_unrolled[name], seen[name], atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", mark_others(["gpt2", "llama3", "gemma3"], ["gemma3"]))
def test_sharded_over_devices_equals_one_device(case):
    tokens = np.tile(reference(case)["tokens"], (2, 1))
    logits, seen = run_golden(case)
    want, want_seen = np.tile(logits, (2, 1, 1)), np.tile(seen["resid_post"], (1, 2, 1, 1))
    mesh = jclt.make_mesh(data=2, features=2)
    model = jclt.load_model(FOLDER / case, mesh=mesh)
    assert "features" in str(model.params["query"].sharding.spec)
    got, seen_sharded = jclt.run(model, tokens, capture=SITES)
    assert len(got.sharding.device_set) == 4 and not got.sharding.is_fully_replicated
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)
    np.testing.assert_allclose(seen_sharded["resid_post"], want_seen, atol=1e-5, rtol=1e-5)
    single, _ = jclt.run(model, tokens[0])  # a batch that does not divide is kept whole
    np.testing.assert_allclose(single, want[0], atol=1e-5, rtol=0)


@pytest.mark.exhaustive  # a larger model of the family of llama3, for which the tests above claim the same
def test_stories_agree_with_their_source():
    folder, golden = SHARED / "models" / "stories260K", SHARED / "golden" / "stories260K"
    if not folder.exists():
        pytest.skip("stories260K (1 MB) is too large for tests/golden and ../shared/models is not here")
    model, want = jclt.load_model(folder), np.load(golden / "reference.npz")
    logits, seen = jclt.run(model, want["tokens"], capture=("resid_pre", "resid_final"))
    hidden = np.concatenate([seen["resid_pre"], seen["resid_final"][None]])
    np.testing.assert_allclose(logits, want["logits"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(hidden, want["hidden"], atol=1e-4, rtol=0)
    prompt = "Once upon a time"
    new = len(want["greedy"]) - len(model.encode(prompt))
    assert jclt.generate(model, model.encode(prompt), new).tolist() == want["greedy"].tolist()
    assert jclt.generate(model, prompt, new) == (golden / "greedy.txt").read_text().rstrip("\n")


def test_sampling_draws_from_the_smallest_set_that_holds_top_p():
    from jclt.models.generate import sample

    logits = np.log(np.float32([[0.5, 0.3, 0.15, 0.05]]))

    @jax.jit
    def draw(seed, temperature, top_p):
        keys = jax.random.split(jax.random.key(seed), 4000)
        return jax.vmap(lambda key: sample(jnp.asarray(logits), key, temperature, top_p)[0])(keys)

    draws = draw(0, np.float32(1.0), np.float32(0.75))
    shares = np.bincount(draws, minlength=4) / len(draws)
    np.testing.assert_allclose(shares, [0.625, 0.375, 0, 0], atol=0.03)
    hot = draw(1, np.float32(2.0), np.float32(1.0))
    want = np.sqrt([0.5, 0.3, 0.15, 0.05])
    np.testing.assert_allclose(np.bincount(hot, minlength=4) / len(hot), want / want.sum(), atol=0.03)
