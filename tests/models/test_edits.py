"""Edits of a forward pass: an edit that changes nothing changes no bit, edits compose in order, frozen sites have no
gradient, and one compiled program serves many values."""

from itertools import product

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import golden_model, reference
from more_cases import mark_others

import jclt
from jclt.models import Compose, Freeze, Place, Replace, forward
from jclt.models.edits import list_edited_sites

SITES = ("resid_pre", "pattern", "attn_denominator", "mlp_out", "final_denominator")
UNCHANGING = (
    "replace",
    "replace in one layer",
    "replace in no layer",
    "freeze values",
    "freeze names",
    "compose",
    "compose nothing",
)


@pytest.fixture(scope="module")
def model():
    return golden_model("llama3")


@pytest.fixture(scope="module")
def tokens():
    return reference("llama3")["tokens"][:1]


@pytest.fixture(scope="module")
def captured(model, tokens):
    return jclt.run(model, tokens, capture=(*SITES, "token_embedding", "resid_post"))[1]


def build_unchanging_edits(captured: dict) -> dict:
    one = {name: value[1:2] for name, value in captured.items() if name != "final_denominator"}
    return {
        "replace": Replace(captured),
        "replace in one layer": Replace(one, value_layers=(1,)),
        "replace in no layer": Replace({name: value[:0] for name, value in one.items()}, value_layers=()),
        "freeze values": Freeze(captured),
        "freeze names": Freeze(SITES),
        "compose": Compose(
            (Freeze(captured), Replace(one, value_layers=(1,)), Freeze(SITES), lambda place, value: value)
        ),
        "compose nothing": Compose(()),
    }


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("unroll", "name"),
    mark_others(
        # A scanned pass has no way to skip a layer, so it needs at least one.
        [case for case in product((False, True), UNCHANGING) if case != (False, "replace in no layer")],
        [(False, "compose"), (True, "compose")],
    ),
)
def test_edits_that_change_nothing_change_no_bit(model, tokens, unroll, name):
    """A plain run tests the composed edit, which contains nearly all of the others."""
    plain, captured = jclt.run(model, tokens, capture=SITES, unroll=unroll)
    edit = build_unchanging_edits({name: np.asarray(value) for name, value in captured.items()})[name]
    again, _ = jclt.run(model, tokens, edit=edit, unroll=unroll)
    np.testing.assert_array_equal(again, plain)


def test_values_of_some_layers_leave_the_others_as_they_are(model, tokens, captured):
    """Layers may come in any order; scanned and unrolled."""
    new = 2 * np.asarray(captured["mlp_out"])
    everywhere = Compose([Replace({"mlp_out": new}, layer=layer) for layer in (0, 2)])
    replacement = Replace({"mlp_out": new[[2, 0]]}, value_layers=(2, 0))
    want, want_seen = jclt.run(model, tokens, capture=("mlp_out",), edit=everywhere)
    for unroll in (False, True):
        got, seen = jclt.run(model, tokens, capture=("mlp_out",), edit=replacement, unroll=unroll)
        np.testing.assert_allclose(got, want, atol=1e-5)
        np.testing.assert_allclose(seen["mlp_out"], want_seen["mlp_out"], atol=1e-5)
        np.testing.assert_array_equal(np.asarray(seen["mlp_out"])[0], new[0])
    with pytest.raises(jclt.UserError, match="of site 'mlp_out': values of 3 layers, expected 2"):
        jclt.run(model, tokens, edit=Replace({"mlp_out": new}, value_layers=(0, 1)))


def test_values_of_size_one_are_repeated(model, tokens):
    mean = np.arange(2 * model.config.width, dtype=np.float32).reshape(2, 1, 1, -1)
    _, seen = jclt.run(model, tokens, capture=("mlp_out",), edit=Replace({"mlp_out": mean}, value_layers=(0, 1)))
    got = np.asarray(seen["mlp_out"])
    np.testing.assert_array_equal(got[:2], np.broadcast_to(mean, (2, *got.shape[1:])))
    assert not np.array_equal(got[2, 0, 0], got[2, 0, 1])


def test_compose_applies_edits_in_the_order_given(model, tokens, captured):
    def add_one(place, value):
        return value + 1 if place.site == "mlp_out" else value

    def see(*edits):
        return jclt.run(model, tokens, capture=("mlp_out",), edit=Compose(edits))[1]["mlp_out"]

    replace = Replace({"mlp_out": np.zeros(captured["mlp_out"].shape, np.float32)})
    assert (np.asarray(see(add_one, replace)) == 0).all()
    assert (np.asarray(see(Compose((replace, add_one)), add_one)) == 2).all()


def test_freeze_stops_gradients_and_replace_does_not(model, tokens, captured):
    """Every path from the embedding to the logits passes the frozen site, so the gradient is 0."""

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def differentiate(arguments):
        embedding, *edits = arguments
        edit = Compose((Replace({"token_embedding": embedding}), *edits))
        return jnp.sum(jnp.square(forward(model.config, model.params, jnp.asarray(tokens), edit=edit)[0]))

    def gradients(*edits):
        """The loss, and its gradients by the embedding and by the values of each edit."""
        loss, found = differentiate((captured["token_embedding"], *edits))
        return float(loss), np.asarray(found[0]), [edit.values for edit in found[1:]]

    loss, free, _ = gradients()
    assert abs(free).max() > 1e-3
    cut = {"resid_post": captured["resid_post"]}
    for edit in (Freeze(("resid_post",)), Freeze("resid_post"), Freeze(cut)):
        same, by_embedding, (by_values,) = gradients(edit)
        assert same == pytest.approx(loss, rel=1e-5) and not by_embedding.any()
    assert not np.asarray(by_values["resid_post"]).any()
    _, _, (by_values,) = gradients(Replace(cut))
    assert float(abs(np.asarray(by_values["resid_post"])).max()) > 1e-3
    # With constant patterns and denominators the gradient is another one, and the value is the same.
    same, partly, _ = gradients(Freeze(("pattern", "attn_denominator")))
    assert same == pytest.approx(loss, rel=1e-5)
    assert abs(partly).max() > 1e-3 and abs(partly - free).max() > 1e-3


def test_a_single_block_takes_values_without_a_layer_axis(captured):
    frozen = np.asarray(captured["attn_denominator"])[1]
    value = jnp.zeros(frozen.shape)
    edit = Freeze({"attn_denominator": frozen[0]})
    np.testing.assert_array_equal(edit(Place("attn_denominator", None), value), frozen)
    assert edit(Place("mlp_in", None), value) is value


def test_one_program_serves_edits_of_other_values(model, tokens, captured):
    """The arrays of an edit are arguments of the program; its layers and sites are part of the program."""
    traces = []

    @eqx.filter_jit
    def run(edit):
        traces.append(edit)
        return forward(model.config, model.params, jnp.asarray(tokens), edit=edit)[0]

    value = np.asarray(captured["mlp_out"])
    one, two = (Compose((Replace({"mlp_out": scale * value}), Freeze(("pattern",)))) for scale in (1, 2))
    each = np.stack([run(one), run(two)])
    assert abs(each[0] - each[1]).max() > 1e-3 and len(traces) == 1
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), one, two)
    both = jax.jit(jax.vmap(lambda edit: forward(model.config, model.params, jnp.asarray(tokens), edit=edit)[0]))(
        stacked
    )
    np.testing.assert_allclose(both, each, atol=1e-5)


def test_unknown_sites_are_named_wherever_the_edit_stands(model, tokens):
    edit = Compose((Freeze("pattern"), Compose((Replace({"mlp_outt": jnp.zeros((3, 1, 1, 1))}),))))
    assert list_edited_sites(edit) == ("pattern", "mlp_outt") and list_edited_sites(None) == ()
    with pytest.raises(jclt.UserError, match="site 'mlp_outt' does not exist; did you mean 'mlp_out'"):
        jclt.run(model, tokens, edit=edit)
