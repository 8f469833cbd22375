"""Edits of a forward pass: an edit that changes nothing changes no bit, edits compose in order, frozen sites have no
gradient, and one compiled program serves many values."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import golden_model, reference

import jclt
from jclt.models import Compose, Freeze, Replace, forward
from jclt.models.edits import list_edited_sites

SITES = ("resid_pre", "pattern", "attn_denominator", "mlp_out", "final_denominator")


@pytest.fixture(scope="module")
def model():
    return golden_model("llama3")


@pytest.fixture(scope="module")
def tokens():
    return reference("llama3")["tokens"][:1]


@pytest.fixture(scope="module")
def captured(model, tokens):
    return jclt.run(model, tokens, capture=SITES)[1]


@pytest.mark.optimized
@pytest.mark.parametrize("unroll", [False, True])
def test_edits_that_change_nothing_change_no_bit(model, tokens, unroll):
    plain, captured = jclt.run(model, tokens, capture=SITES, unroll=unroll)
    few = {name: value[1:2] for name, value in captured.items() if name != "final_denominator"}
    edits = {
        "replace": Replace(captured),
        "replace in one layer": Replace(few, layers=(1,)),
        "replace in no layer": Replace({name: value[:0] for name, value in few.items()}, layers=()),
        "freeze values": Freeze(captured),
        "freeze names": Freeze(SITES),
        "compose": Compose((Replace(captured), Freeze(SITES), lambda site, layer, value: value)),
        "compose nothing": Compose(()),
    }
    for name, edit in edits.items():
        if name == "replace in no layer" and not unroll:
            continue  # a scanned pass has no way to skip a layer, so it needs at least one
        again, _ = jclt.run(model, tokens, edit=edit, unroll=unroll)
        np.testing.assert_array_equal(again, plain, err_msg=name)


def test_layers_say_of_which_layers_the_values_are(model, tokens, captured):
    """In any order, scanned and unrolled; the other layers do not change."""
    new = 2 * captured["mlp_out"]
    everywhere = Replace({"mlp_out": new}, {"mlp_out": jnp.asarray([True, False, True])[:, None, None, None]})
    replacement = Replace({"mlp_out": new[jnp.asarray([2, 0])]}, layers=(2, 0))
    want, want_seen = jclt.run(model, tokens, capture=("mlp_out",), edit=everywhere)
    for unroll in (False, True):
        got, seen = jclt.run(model, tokens, capture=("mlp_out",), edit=replacement, unroll=unroll)
        np.testing.assert_allclose(got, want, atol=1e-5)
        np.testing.assert_allclose(seen["mlp_out"], want_seen["mlp_out"], atol=1e-5)
        np.testing.assert_array_equal(seen["mlp_out"][0], new[0])
    with pytest.raises(jclt.UserError, match="of site 'mlp_out': values of 3 layers, expected 2"):
        jclt.run(model, tokens, edit=Replace({"mlp_out": new}, layers=(0, 1)))


def test_values_of_size_one_are_repeated(model, tokens):
    mean = jnp.arange(2 * model.config.width, dtype=jnp.float32).reshape(2, 1, 1, -1)
    _, seen = jclt.run(model, tokens, capture=("mlp_out",), edit=Replace({"mlp_out": mean}, layers=(0, 1)))
    np.testing.assert_array_equal(seen["mlp_out"][:2], np.broadcast_to(mean, (2, *seen["mlp_out"].shape[1:])))
    assert not np.array_equal(seen["mlp_out"][2, 0, 0], seen["mlp_out"][2, 0, 1])


def test_compose_applies_edits_in_the_order_given(model, tokens, captured):
    def add_one(site, layer, value):
        return value + 1 if site == "mlp_out" else value

    def see(*edits):
        return jclt.run(model, tokens, capture=("mlp_out",), edit=Compose(edits))[1]["mlp_out"]

    replace = Replace({"mlp_out": jnp.zeros_like(captured["mlp_out"])})
    assert (np.asarray(see(replace, add_one)) == 1).all()
    assert (np.asarray(see(add_one, replace)) == 0).all()
    assert (np.asarray(see(Compose((replace, add_one)), add_one)) == 2).all()


def test_freeze_stops_gradients_and_replace_does_not(model, tokens, captured):
    """Every path from the embedding to the logits passes the frozen site, so the gradient is 0."""
    embedding = jclt.run(model, tokens, capture=("token_embedding",))[1]["token_embedding"]

    @eqx.filter_jit
    def loss(embedding, *edits):
        edit = Compose((Replace({"token_embedding": embedding}), *edits))
        return jnp.sum(jnp.square(forward(model.config, model.params, jnp.asarray(tokens), edit=edit)[0]))

    gradient = eqx.filter_jit(jax.grad(loss))
    assert float(abs(gradient(embedding)).max()) > 1e-3
    cut = {"resid_post": jclt.run(model, tokens, capture=("resid_post",))[1]["resid_post"]}
    for edit in (Freeze(("resid_post",)), Freeze("resid_post"), Freeze(cut)):
        assert not np.asarray(gradient(embedding, edit)).any()
        np.testing.assert_allclose(loss(embedding, edit), loss(embedding), rtol=1e-5)
    # With constant patterns and denominators the gradient is another one, and the value is the same.
    partly = gradient(embedding, Freeze(("pattern", "attn_denominator")))
    assert float(abs(partly).max()) > 1e-3 and float(abs(partly - gradient(embedding)).max()) > 1e-3

    def loss_of_frozen(values):
        return loss(embedding, Freeze({"mlp_out": values}))

    def loss_of_replaced(values):
        return loss(embedding, Replace({"mlp_out": values}))

    assert not np.asarray(jax.jit(jax.grad(loss_of_frozen))(captured["mlp_out"])).any()
    assert float(abs(jax.jit(jax.grad(loss_of_replaced))(captured["mlp_out"])).max()) > 1e-3


def test_a_single_block_takes_values_without_a_layer_axis(captured):
    value = jnp.zeros((1, *captured["attn_denominator"].shape[2:]))
    edit = Freeze({"attn_denominator": captured["attn_denominator"][1, 0]})
    np.testing.assert_array_equal(edit("attn_denominator", None, value), captured["attn_denominator"][1])
    assert edit("mlp_in", None, value) is value


def test_one_program_serves_edits_of_other_values(model, tokens, captured):
    """The arrays of an edit are arguments of the program; its layers and sites are part of the program."""
    traces = []

    @eqx.filter_jit
    def run(edit):
        traces.append(edit)
        return forward(model.config, model.params, jnp.asarray(tokens), edit=edit)[0]

    one, two = (Compose((Replace({"mlp_out": scale * captured["mlp_out"]}), Freeze(("pattern",)))) for scale in (1, 2))
    assert float(abs(run(one) - run(two)).max()) > 1e-3 and len(traces) == 1
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, two)
    both = jax.vmap(lambda edit: forward(model.config, model.params, jnp.asarray(tokens), edit=edit)[0])(stacked)
    np.testing.assert_allclose(both, jnp.stack([run(one), run(two)]), atol=1e-5)


def test_unknown_sites_are_named_wherever_the_edit_stands(model, tokens):
    edit = Compose((Freeze("pattern"), Compose((Replace({"mlp_outt": jnp.zeros((3, 1, 1, 1))}),))))
    assert list_edited_sites(edit) == ("pattern", "mlp_outt") and list_edited_sites(None) == ()
    with pytest.raises(jclt.UserError, match="site 'mlp_outt' does not exist; did you mean 'mlp_out'"):
        jclt.run(model, tokens, edit=edit)
