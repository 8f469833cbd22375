"""Set, Scale, Add and Noise: each is its formula at its place and nothing elsewhere, on every site and family."""

import os

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import golden_model, reference
from more_cases import mark_others

import jclt
from jclt.models import LAYER_SITES, Add, Compose, Noise, Place, Replace, Scale, Set, forward

FAMILIES = ("gemma2", "gemma3", "gpt2", "llama3", "mistral", "neox", "neox_sequential", "qwen2", "qwen3")
POSITION = 6


def list_sites(case: str) -> list[str]:
    """The sites that this model has."""
    tokens = jnp.asarray(reference(case)["tokens"], jnp.int32)
    model = golden_model(case)
    seen = jax.eval_shape(lambda: forward(model.config, model.params, tokens, capture=tuple(jclt.SITES))[1])
    return [name for name in jclt.SITES if name in seen]


def scale_each(sites: list[str], chosen: str | None, factor: float) -> Compose:
    """Scales one site at one position. The edits of the others act nowhere: one compiled program serves every site."""
    edits = []
    for name in sites:
        where = {"site": name, "position": POSITION if name == chosen else slice(0, 0)}
        edits.append(Scale(factor, **where, **({"layer": slice(None)} if name in LAYER_SITES else {})))
    return Compose(edits)


@pytest.mark.optimized
@pytest.mark.parametrize("case", mark_others(FAMILIES, ["gemma2"]))
def test_a_factor_of_one_changes_no_bit_and_another_no_earlier_position(case):
    model, tokens, sites = golden_model(case), reference(case)["tokens"][:1], list_sites(case)
    if "fusion_emitters=false" in os.environ["XLA_FLAGS"]:
        # XLA's older code generator computes these again where they are used twice, in another order of operations.
        sites = [name for name in sites if name not in ("query_denominator", "key_denominator")]
    plain, _ = jclt.run(model, tokens)
    moved = {}
    for name in sites:
        same, _ = jclt.run(model, tokens, edit=scale_each(sites, name, 1.0))
        np.testing.assert_array_equal(same, plain, err_msg=name)
        changed, _ = jclt.run(model, tokens, edit=scale_each(sites, name, 1.7))
        np.testing.assert_array_equal(changed[:, :POSITION], plain[:, :POSITION], err_msg=name)
        moved[name] = float(abs(changed[:, POSITION:] - plain[:, POSITION:]).max())
    assert min(moved.values()) > 1e-6, moved


@pytest.fixture(scope="module")
def model():
    return golden_model("llama3")


@pytest.fixture(scope="module")
def tokens():
    return reference("llama3")["tokens"][:1]


@pytest.fixture(scope="module")
def stream(model, tokens):
    """What the MLPs write, [L, 1, T, D]."""
    return np.asarray(jclt.run(model, tokens, capture=("mlp_out",))[1]["mlp_out"])


def apply(edit, value: np.ndarray, layer: int = 1, site: str = "mlp_out") -> np.ndarray:
    return np.asarray(edit(Place(site, layer), jnp.asarray(value)))


def test_each_edit_is_its_formula(stream):
    x, rng = stream[1], np.random.default_rng(0)
    v = rng.standard_normal(x.shape[-1]).astype(np.float32)
    u = v / np.linalg.norm(v)
    along = (x @ u)[..., None] * u
    one = np.arange(x.shape[1])[None, :, None] == 3
    for edit, want in (
        (Set(2.0, site="mlp_out"), np.full_like(x, 2)),
        (Set(v, site="mlp_out", position=3), np.where(one, v, x)),
        (Scale(-0.5, site="mlp_out", layer=slice(0, 2)), -0.5 * x),
        (Scale(-0.5, site="mlp_out", layer=2), x),
        (Add(v, site="mlp_out", position=slice(2, 5), index=slice(4, None)), None),
        (Set(2.0, site="mlp_out", direction=v), x - along + 2 * u),
        (Scale(3.0, site="mlp_out", direction=v, position=3), np.where(one, x + 2 * along, x)),
        (Add(3.0, site="mlp_out", direction=v), x + 3 * u),
    ):
        if want is None:
            want = x.copy()
            want[:, 2:5, 4:] += v[4:]
        np.testing.assert_allclose(apply(edit, x), want, rtol=1e-5, atol=1e-5)


def test_a_subspace_is_replaced_and_what_is_orthogonal_stays(stream):
    rng, x, new = np.random.default_rng(1), stream[1], stream[2]
    rows = rng.standard_normal((3, x.shape[-1])).astype(np.float32)
    q = np.linalg.qr(rows.T)[0]
    got = apply(Replace({"mlp_out": np.stack([new] * 3)}, direction=rows), x)
    np.testing.assert_allclose(got @ q, new @ q, atol=1e-5)
    np.testing.assert_allclose(got - got @ q @ q.T, x - x @ q @ q.T, atol=1e-5)


def test_order_counts_where_it_is_defined_and_two_values_are_refused(stream):
    x = stream[1]
    scale, add = Scale(2.0, site="mlp_out", position=3), Add(1.0, site="mlp_out")
    first, second = (apply(Compose(edits), x)[:, 3] for edits in ((scale, add), (add, scale)))
    np.testing.assert_allclose(first, 2 * x[:, 3] + 1, rtol=1e-6)
    np.testing.assert_allclose(second, 2 * (x[:, 3] + 1), rtol=1e-6)
    axes = np.eye(x.shape[-1], dtype=np.float32)
    Compose([Set(1.0, site="mlp_out", position=3), Set(2.0, site="mlp_out", position=4)])
    Compose([Set(1.0, site="mlp_out", direction=axes[0]), Set(2.0, site="mlp_out", direction=axes[1])])
    for one, other in (
        ({"position": 3}, {"position": slice(2, None)}),
        ({"layer": 1}, {"index": 5}),
        ({"direction": axes[0]}, {"direction": axes[0] + axes[1]}),
    ):
        with pytest.raises(jclt.UserError, match="two of them set site 'mlp_out' at the same place"):
            Compose([Set(1.0, site="mlp_out", **one), Compose([Set(2.0, site="mlp_out", **other)])])


def test_one_program_serves_every_place_and_number(model, tokens):
    traces = []

    @eqx.filter_jit
    def run(edit):
        traces.append(edit)
        return forward(model.config, model.params, jnp.asarray(tokens), edit=edit)[0]

    places = [
        {"layer": 0, "position": 2},
        {"layer": slice(1, 3), "position": slice(4, None)},
        {"layer": 2, "position": 5},
    ]
    edits = [Add(float(i + 1), site="mlp_out", **place) for i, place in enumerate(places)]
    each = np.stack([run(edit) for edit in edits])
    assert len(traces) == 1 and np.abs(each[0] - each[1]).max() > 1e-3
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *edits)
    together = jax.jit(jax.vmap(lambda edit: forward(model.config, model.params, jnp.asarray(tokens), edit=edit)[0]))
    np.testing.assert_allclose(together(stacked), each, atol=1e-5)


def test_edges_of_attention_are_removed_and_rows_sum_to_one(model, tokens):
    edit = Set(-np.inf, site="attn_scores", layer=1, position=slice(4, 7), key=slice(1, 3), head=2)
    _, plain = jclt.run(model, tokens, capture=("pattern",))
    _, seen = jclt.run(model, tokens, capture=("pattern",), edit=edit)
    pattern = np.asarray(seen["pattern"])
    np.testing.assert_allclose(pattern.sum(axis=-1), 1, atol=1e-6)
    assert (pattern[1, 0, 2, 4:7, 1:3] == 0).all()
    kept = np.delete(np.asarray(plain["pattern"])[1, 0, 2, 4:7], [1, 2], axis=-1)
    want = kept / kept.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(np.delete(pattern[1, 0, 2, 4:7], [1, 2], axis=-1), want, atol=1e-6)
    np.testing.assert_array_equal(pattern[1, 0, :2], np.asarray(plain["pattern"])[1, 0, :2])


def test_noise_is_normal_and_the_same_in_every_pass(model):
    x = jnp.zeros((3, 40, 24))
    noise = Noise(2.0, site="resid_pre", seed=3)
    first, again = (apply(noise, x, 1, "resid_pre") for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert abs(first.std() - 2) < 0.1 and abs(first.mean()) < 0.1
    others = apply(noise, x, 2, "resid_pre"), apply(Noise(2.0, site="resid_pre", seed=4), x, 1, "resid_pre")
    for other in (*others, np.roll(first, 1, axis=0), np.roll(first, 1, axis=1)):
        assert abs(np.mean(first * other)) < 0.3  # independent, where the same would give 4
    # With a cache, one position at a time.
    for position in (0, 7):
        place = Place("resid_pre", 1, jnp.full((3, 1), position))
        np.testing.assert_array_equal(noise(place, x[:, :1])[:, 0], first[:, position])


@pytest.mark.exhaustive  # a plain run generates with edits of features and of a head, in test_intervene.py
def test_generation_with_the_cache_edits_what_a_pass_over_all_tokens_does(model, tokens):
    """Noise, captured patterns of the prompt, a head at an open range and a score: greedy tokens are the same."""
    _, seen = jclt.run(model, tokens, capture=("pattern",))
    edit = Compose(
        [
            Noise(2.0, site="mlp_out", position=slice(3, None)),
            Replace({"pattern": seen["pattern"]}, layer=1),
            Scale(2.0, site="head_out", layer=2, position=slice(10, None), head=1),
            Set(-np.inf, site="attn_scores", layer=2, position=slice(8, None), key=5),
        ]
    )
    length = tokens.shape[1]
    continued = jclt.generate(model, tokens, 6, stop_tokens=(), edit=edit)
    padded = {"pattern": np.zeros((*np.shape(seen["pattern"])[:3], length, length + 5), np.float32)}
    padded["pattern"][..., :length] = seen["pattern"]
    whole = Compose([edit.edits[0], Replace(padded, layer=1, position=slice(0, length)), *edit.edits[2:]])
    positions = np.arange(length + 5)[None]
    logits, _, _ = jax.jit(lambda t, p, e: forward(model.config, model.params, t, positions=p, edit=e))(
        jnp.asarray(continued[:, :-1]), jnp.asarray(positions), whole
    )
    np.testing.assert_array_equal(logits[0, length - 1 :].argmax(axis=-1), continued[0, length:])
    assert (jclt.generate(model, tokens, 6, stop_tokens=()) != continued).any()


def test_places_that_do_not_exist_are_named(model, tokens):
    for edit, message in (
        (Add(1.0, site="mlp_out", layer=9), "site 'mlp_out': layer 9, expected 0 to 2"),
        (Add(1.0, site="mlp_out", position=99), "site 'mlp_out': position 99, expected 0 to 13"),
        (Add(1.0, site="head_out", head=7), "site 'head_out': head 7, expected 0 to 3"),
        (Add(1.0, site="mlp_out", index=500), "site 'mlp_out': index 500, expected 0 to 23"),
        (Add(1.0, site="mlp_outt"), "site 'mlp_outt' does not exist; did you mean 'mlp_out'"),
        (Add(1.0, feature=3), "site 'features': is a coder's, which `jclt.intervene` has"),
        (Add(np.ones(7), site="mlp_out"), "site 'mlp_out': value of shape"),
    ):
        with pytest.raises(jclt.UserError, match=message):
            jclt.run(model, tokens, edit=edit)
    for where, message in (
        ({"site": "mlp_out", "head": 1}, "has no axis for head; its axes are B T D"),
        ({"site": "logits", "layer": 1}, "the site is outside the layers, leave out `layer`"),
        ({"site": "pattern", "index": 1}, "its last axis is S, expected `position` or `key`"),
        ({"site": "mlp_out", "position": -1}, "position -1, expected 0 or more"),
        ({"site": "mlp_out", "position": slice(0, 9, 2)}, "position with step 2"),
        ({}, "no site, expected a site's name or a feature"),
        ({"feature": 1, "site": "mlp_out"}, "expected the feature alone"),
        ({"site": "mlp_out", "direction": np.zeros(24)}, "without zeros"),
        ({"site": "mlp_out", "positions": 3}, "argument 'positions'; did you mean 'position'"),
        ({"site": "mlp_out", "position": slice(5, 3)}, "position from 5 to before 3, expected an end after the start"),
    ):
        with pytest.raises(jclt.UserError, match=message):
            Add(1.0, **where)
