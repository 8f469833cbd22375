"""Attention knockout: each is one edited pass, rows of the pattern still sum to 1, and none may lose all its keys."""

import numpy as np
import pytest
from golden_cases import golden_model
from more_cases import mark_others
from patching_prompts import FAMILIES, compute_difference, get_pairs, get_tokens

import jclt
from jclt.models import Compose, Set

LOWEST = np.finfo(np.float32).min


def knock_out(*arguments, **settings):
    return jclt.knock_out(*arguments, progress=False, **settings)


@pytest.mark.parametrize("name", mark_others(FAMILIES, ["gemma3"]))
def test_each_knockout_is_one_edited_pass_and_rows_sum_to_one(name):
    model, pairs, (clean, _) = golden_model(name), get_pairs(name), get_tokens(name)
    last = clean.shape[1] - 1
    edges = {"one": [("last", -3)], "two": [("last", "subject"), (5, 4)]}
    whole = knock_out(model, pairs, edges, window=2, metric="logit_difference")
    heads = knock_out(model, pairs, edges, window=2, heads=True, metric="logit_difference")
    assert list(whole.axes) == ["site", "layer", "edge"] and whole.axes["edge"] == ("one", "two")
    assert heads.values.shape == (*whole.values.shape, model.config.heads)
    for head, sets in ((None, (1,)), (1, (0,))):
        where = {"layer": slice(0, 2), "head": head}
        one = Set(LOWEST, site="attn_scores", position=last, key=last - 2, **where)
        two = [
            Set(LOWEST, site="attn_scores", position=last, key=slice(2, 4), **where),
            Set(LOWEST, site="attn_scores", position=5, key=4, **where),
        ]
        for number in sets:
            edit = (one, Compose(two))[number]
            logits, seen = jclt.run(model, clean, capture=("pattern",), edit=edit)
            got = whole.per_pair[:, 0, 1, number] if head is None else heads.per_pair[:, 0, 1, number, head]
            np.testing.assert_allclose(got, compute_difference(np.asarray(logits[:, -1])), atol=5e-6)
            np.testing.assert_allclose(np.asarray(seen["pattern"]).sum(axis=-1), 1, atol=1e-6)
            removed = np.asarray(seen["pattern"])[:2, :, slice(None) if head is None else head, ..., last, :]
            assert not removed[..., last - 2 if number == 0 else slice(2, 4)].any()


def test_a_query_must_keep_a_key():
    """Also within the sliding window of a local layer."""
    gemma, llama = golden_model("gemma3"), golden_model("llama3")
    with pytest.raises(jclt.UserError, match="position 0 of pair 0 would attend to nothing"):
        knock_out(llama, get_pairs("llama3"), [(0, 0)])
    with pytest.raises(
        jclt.UserError, match="edges 'last attends to all': position 7 of pair 0 would attend to nothing"
    ):
        knock_out(llama, get_pairs("llama3"), [("last", "all")])
    near = [("last", range(4, 8))]
    assert knock_out(llama, get_pairs("llama3"), near, layers=(0,)).values.shape == (1, 1, 1)
    with pytest.raises(jclt.UserError, match="position 7 of pair 0 would attend to nothing"):
        knock_out(gemma, get_pairs("gemma3"), near)
    for edges, message in (([], "edges: none"), ({"a": []}, "edges: none, or a set of none")):
        with pytest.raises(jclt.UserError, match=message):
            knock_out(llama, get_pairs("llama3"), edges)
    with pytest.raises(jclt.UserError, match="metric 'normalised': a knockout has no corrupted run"):
        knock_out(llama, get_pairs("llama3"), [("last", 1)], metric="normalised")
