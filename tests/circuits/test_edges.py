"""The edges of a model: as many as published, connected, and named as in published files."""

from dataclasses import replace

import numpy as np
import pytest
from golden_cases import golden_model

from jclt import ModelConfig, UserError
from jclt.circuits.edges import (
    find_edges,
    find_readers,
    list_edges,
    list_receivers,
    list_senders,
    name_edges,
    prune_edges,
    take_best,
    take_best_connected,
)

GPT2_SMALL = ModelConfig("gpt2", 50257, 768, 12, 12, 3072, 1024, norm="layer", learned_positions=True)
SMALL = replace(GPT2_SMALL, layers=2, heads=2, width=8)


def test_gpt2_has_as_many_edges_as_published():
    edges = list_edges(GPT2_SMALL)
    assert edges.sum() == 32_491 and edges.shape == (158 - 1, 445)
    assert len(list_senders(GPT2_SMALL)) == 157 and len(list_receivers(GPT2_SMALL)) == 445


def test_names_lead_back_to_the_edges():
    edges = list_edges(SMALL)
    names = name_edges(SMALL, edges)
    assert {"input->a0.h0<q>", "a0.h1->m0", "m0->a1.h1<v>", "a1.h0->m1", "m1->logits"} <= set(names)
    assert not {"a0.h0->a0.h1<q>", "m0->m0", "a1.h0->m0", "m1->a1.h0<k>"} & set(names)
    np.testing.assert_array_equal(find_edges(SMALL, names), edges)
    parallel = replace(SMALL, parallel=True)
    assert "a0.h1->m0" not in name_edges(parallel, list_edges(parallel))
    with pytest.raises(UserError, match="edge 'a0.h9->m0': does not exist"):
        find_edges(SMALL, ["a0.h9->m0"])


def test_heads_of_a_group_read_through_the_same_keys_and_values():
    config = golden_model("llama3").config
    assert config.key_heads < config.heads
    receivers, reads = list_receivers(config), find_readers(config)
    head, group = config.heads - 1, config.key_heads - 1
    read = {receivers[r] for r in np.flatnonzero(reads[list_senders(config).index(f"a1.h{head}")])}
    assert read == {f"a1.h{head}<q>", f"a1.h{group}<k>", f"a1.h{group}<v>"}


def test_edges_that_lead_nowhere_are_pruned_until_none_is_left():
    way = ["input->a0.h0<v>", "a0.h0->m0", "m0->logits"]
    dead = ["input->a0.h1<q>", "a0.h1->a1.h0<k>", "m0->a1.h0<q>", "a1.h1->logits", "a1.h1->m1"]
    np.testing.assert_array_equal(prune_edges(SMALL, find_edges(SMALL, way + dead)), find_edges(SMALL, way))
    assert not prune_edges(SMALL, find_edges(SMALL, dead)).any()
    np.testing.assert_array_equal(prune_edges(SMALL, list_edges(SMALL)), list_edges(SMALL))


def test_the_best_edges_are_nested_and_those_from_the_logits_are_connected():
    scores = np.random.default_rng(0).standard_normal(list_edges(SMALL).shape)
    sets = [take_best(SMALL, scores, count) for count in (0, 3, 10, int(list_edges(SMALL).sum()))]
    assert [kept.sum() for kept in sets] == [0, 3, 10, list_edges(SMALL).sum()]
    assert all((small <= large).all() for small, large in zip(sets, sets[1:], strict=False))
    kept = take_best_connected(SMALL, scores, 12)
    assert kept.sum() == 12 and (kept & list_edges(SMALL) == kept).all()
    leads_on = (find_readers(SMALL) & kept.any(axis=1)[:, None]).any(axis=0)
    assert leads_on[kept[:, :-1].any(axis=0).nonzero()].all() and kept[:, -1].any()
    with pytest.raises(UserError, match="circuit of 999 edges: expected 0 to"):
        take_best(SMALL, scores, 999)
