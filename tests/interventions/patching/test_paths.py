"""Path patching: all senders together are the corrupted input of the receiver, one sender is its direct path alone."""

from itertools import product

import numpy as np
import pytest
from golden_cases import golden_model
from more_cases import mark_others
from patching_prompts import FAMILIES, compute_difference, get_pairs, get_tokens

import jclt
from jclt import Component
from jclt.models import Add, Replace


def patch_paths(*arguments, **settings):
    return jclt.patch_paths(*arguments, metric="logit_difference", progress=False, **settings)


@pytest.mark.parametrize(
    ("name", "site"), mark_others(product(FAMILIES, ("queries", "mlp_in")), [("gemma3", "queries"), ("neox", "mlp_in")])
)
def test_all_senders_into_a_receiver_patch_its_input(name, site):
    """And senders after the receiver do nothing."""
    model, pairs, (clean, corrupted) = golden_model(name), get_pairs(name), get_tokens(name)
    layers = range(model.config.layers)
    every = [Component("resid_pre"), *(Component(s, layer) for s in ("attn_out", "mlp_out") for layer in layers)]
    receiver = Component(site, 1, head=1 if site == "queries" else None, position="last")
    result = patch_paths(model, pairs, [every, Component("mlp_out", 1)], [receiver])
    _, seen = jclt.run(model, corrupted, capture=(site,))
    head = {"head": 1} if site == "queries" else {}
    edit = Replace({site: seen[site]}, layer=1, position=clean.shape[1] - 1, **head)
    want = compute_difference(np.asarray(jclt.run(model, clean, edit=edit)[0][:, -1]))
    unchanged = result.clean_measures.logit_difference
    np.testing.assert_allclose(result.per_pair[:, 0], want, atol=5e-6)
    np.testing.assert_allclose(result.per_pair[:, 1], unchanged, atol=5e-6)
    assert abs(want - unchanged).max() > 1e-5 and result.changed == "clean"


def test_the_direct_path_to_the_logits_is_what_a_sender_adds_to_the_last_stream():
    name = "gpt2"
    model, pairs, (clean, corrupted) = golden_model(name), get_pairs(name), get_tokens(name)
    last = model.config.layers - 1
    result = patch_paths(model, pairs)
    assert result.axes["sender"][:2] == ("head_out 0.0", "head_out 0.1") and "to logits" in result.method
    (_, old), (_, new) = (jclt.run(model, tokens, capture=("head_out", "mlp_out")) for tokens in (clean, corrupted))
    heads = np.asarray(new["head_out"]) - np.asarray(old["head_out"])
    for layer, head in ((0, 1), (last, 0)):
        change = np.einsum("btk,kd->btd", heads[layer][:, :, head], np.asarray(model.params["attn_out"])[layer, head])
        want = jclt.run(model, clean, edit=Add(change, site="resid_post", layer=last))[0][:, -1]
        at = result.axes["sender"].index(f"head_out {layer}.{head}")
        np.testing.assert_allclose(result.per_pair[:, at], compute_difference(np.asarray(want)), atol=5e-6)
    change = np.asarray(new["mlp_out"])[0] - np.asarray(old["mlp_out"])[0]
    want = jclt.run(model, clean, edit=Add(change, site="resid_post", layer=last))[0][:, -1]
    at = result.axes["sender"].index("mlp_out 0")
    np.testing.assert_allclose(result.per_pair[:, at], compute_difference(np.asarray(want)), atol=5e-6)


def test_what_cannot_send_or_receive_is_named():
    model, pairs = golden_model("gpt2"), get_pairs("gpt2")
    head = Component("head_out", 0, 0)
    for senders, receivers, message in (
        ([Component("queries")], (Component("logits"),), "component 'queries': expected one of: resid_pre"),
        ([Component("resid_pre", 1)], (Component("logits"),), "sender 'resid_pre' of layer 1: expected layer 0"),
        ([Component("head_out", 0, 99)], (Component("logits"),), "component 'head_out': head 99, expected 0 to"),
        ([head], (Component("mlp_out"),), "component 'mlp_out': expected one of: queries"),
        ([head], (Component("logits"), Component("mlp_in")), "receivers: logits and others"),
        ([head], (), "an empty set"),
    ):
        with pytest.raises(jclt.UserError, match=message):
            patch_paths(model, pairs, senders, receivers)
