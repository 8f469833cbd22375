"""Runs along some edges: all of them are the plain pass, none of them is the other pass, and one replaced edge is what
path patching says."""

from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import CASES, FOLDER, golden_model
from more_cases import mark_others
from patching_prompts import get_pairs, get_tokens

import jclt
from jclt import Component
from jclt.circuits.edge_runs import collect_writes, list_write_sites, run_edges
from jclt.circuits.edge_scores import score_edges
from jclt.circuits.edges import list_edges


@pytest.mark.parametrize("name", mark_others(CASES, ["gemma3", "neox"]))
def test_all_edges_are_the_clean_run_and_none_the_corrupted(name):
    clean, corrupted = get_tokens(name)
    with jax.enable_x64():
        model = jclt.load_model(FOLDER / name, dtype="float64")
        config, last = model.config, jnp.full(len(clean), clean.shape[1] - 1)
        (first, _), (second, seen) = (jclt.run(model, side, list_write_sites(config)) for side in (clean, corrupted))
        want = np.asarray(first)[:, -1], np.asarray(second)[:, -1]
        run = jax.jit(partial(run_edges, config))
        other = collect_writes(config, model.params, seen)
        for kept, row in ((1.0, want[0]), (0.0, want[1])):
            edges = jnp.full(list_edges(config).shape, kept)
            np.testing.assert_allclose(run(model.params, jnp.asarray(clean), last, edges, other), row, atol=1e-11)
    assert np.abs(want[0] - want[1]).max() > 0.01


RECEIVERS = {
    "queries": ("a1.h1<q>", Component("queries", 1, 1)),
    "keys": ("a1.h0<k>", Component("keys", 1, 0)),
    "values": ("a1.h0<v>", Component("values", 1, 0)),
    "mlp": ("m1", Component("mlp_in", 1)),
    "logits": ("logits", Component("logits")),
}
SENDERS = {
    "input": Component("resid_pre"),
    "a0.h1": Component("head_out", 0, 1),
    "m0": Component("mlp_out", 0),
}


@cache
def replace_every_edge(name):
    return score_edges(golden_model(name), get_pairs(name), "exact", progress=False)


@pytest.mark.parametrize(
    ("name", "receiver"),
    mark_others(product(["neox", "qwen3", "gpt2"], RECEIVERS), [("neox", "keys")]),
)
def test_one_replaced_edge_is_path_patching(name, receiver):
    """Where no norm follows attention, whose denominator path patching computes anew."""
    found, (number, component) = replace_every_edge(name), RECEIVERS[receiver]
    settings = {"metric": "logit_difference", "progress": False}
    want = jclt.patch_paths(golden_model(name), get_pairs(name), list(SENDERS.values()), [component], **settings)
    rows, column = [found.senders.index(sender) for sender in SENDERS], found.receivers.index(number)
    np.testing.assert_allclose(found.per_pair[:, rows, column], want.per_pair - found.clean[:, None], atol=2e-5)
    assert np.abs(found.per_pair[:, rows, column]).max() > 1e-4
