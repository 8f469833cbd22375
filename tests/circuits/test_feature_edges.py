"""Edges between a coder's features, against runs in which one feature writes a little more."""

import jax
import numpy as np
import pytest
from random_coders import random_coder
from small_models import ROWS, make_model, make_small_pairs

import jclt
from jclt import UserError
from jclt.circuits import score_feature_edges, score_nodes
from jclt.coders import CoderConfig

STEP = 1e-5
KIND = {"norm": "rms", "activation": "silu", "gated": True, "kv_heads": 1}


def make_coder(model):
    return random_coder(CoderConfig("clt", 6, "relu").fit_to_model(model.config, "random"), np.float64)


def measure_target(model, coder, tokens, writes, source, amount, target):
    """The target's activation when the source writes more, and no MLP reacts."""
    (layer, position, feature), (index, at, number) = source, target
    rows = np.asarray(coder.decoder_rows(layer))[feature]
    moved = writes.copy()
    for step, row in enumerate(rows):
        moved[layer + step, position] += amount * row
    reads, held = coder.config.reads, jclt.Replace({coder.config.writes: moved})
    seen = jclt.run(model, tokens, capture=(reads,), edit=held)[1][reads]
    return float(coder.encode(index, seen[index])[at, number])


def measure_metric(model, coder, tokens, pair, source, amount):
    """The metric when the source writes more, and all that follows reacts."""
    (layer, position, feature), (_, _, (right,), (wrong,)) = source, pair
    rows = np.asarray(coder.decoder_rows(layer))[feature]
    where = {"site": coder.config.writes, "position": position}
    edits = [jclt.Add(amount * row, layer=layer + step, **where) for step, row in enumerate(rows)]
    logits = np.asarray(jclt.run(model, tokens, edit=jclt.models.Compose(edits))[0][-1])
    return float(logits[right] - logits[wrong])


def test_an_edge_is_a_product_of_two_differences_times_the_change():
    """Direct from source to target, with MLPs held; then from the target to the metric along all paths."""
    with jax.enable_x64():
        model = make_model(**KIND)
        coder = make_coder(model)
        pairs, pair = make_small_pairs(model, ROWS[:1]), (*ROWS[0][:2], (ROWS[0][2],), (ROWS[0][3],))
        tokens = np.array(ROWS[0][0])
        reads, written = coder.config.reads, coder.config.writes
        runs = [jclt.run(model, np.array(ids), capture=(reads, written))[1] for ids in ROWS[0][:2]]
        active, other = (np.stack([np.asarray(coder.encode(i, run[reads][i])) for i in (0, 1)]) for run in runs)
        targets = np.argwhere(active > 0)
        targets = targets[(targets[:, 0] == 1) & (targets[:, 1] == 4)][:2]
        sources = [tuple(source) for source in np.argwhere(other != active).tolist() if source[0] == 0]
        found = score_feature_edges(model, coder, pairs, targets)
        writes = np.asarray(runs[0][written])
        for number, target in enumerate(targets.tolist()):
            own = [measure_metric(model, coder, tokens, pair, target, sign * STEP) for sign in (1, -1)]
            of_metric = (own[0] - own[1]) / (2 * STEP)
            np.testing.assert_allclose(found.gradients[number], of_metric, rtol=1e-6)
            for source in (sources[0], sources[-1]):
                both = [measure_target(model, coder, tokens, writes, source, sign * STEP, target) for sign in (1, -1)]
                want = (other - active)[source] * (both[0] - both[1]) / (2 * STEP) * of_metric
                np.testing.assert_allclose(found.edges[number][source], want, rtol=1e-6, atol=1e-9)
        assert np.abs(found.edges[:-1, 0, :, :-1]).max() > 1e-3
        assert not found.edges[:-1, 1].any()  # nothing within a layer, and nothing backwards


@pytest.mark.exhaustive  # a plain run tests edges between features
def test_direct_edges_into_the_metric_are_scores_where_no_mlp_follows():
    """Those of features of the last layer, and its errors. Pairs are averaged."""
    with jax.enable_x64():
        model = make_model(**KIND)
        coder = make_coder(model)
        pairs = make_small_pairs(model)
        for reference in ("corrupted", "zero"):
            found = score_feature_edges(model, coder, pairs, np.array([[0, 1, 2]]), reference=reference)
            scores = score_nodes(model, pairs, coder, "atp", reference=reference).values
            np.testing.assert_allclose(found.edges[-1, 1], scores[1], atol=1e-12)
            assert np.abs(scores[1]).max() > 1e-3


def test_edges_of_several_pairs_are_the_mean_of_those_of_each():
    """Over the devices, of which some have a pair that others have, too; each pair alone is on all of them."""
    with jax.enable_x64():
        model = make_model(**KIND)
        coder, targets = make_coder(model), np.array([[1, 3, 2], [1, 3, 4], [0, 1, 0]])
        found = score_feature_edges(model, coder, make_small_pairs(model), targets)
        alone = [score_feature_edges(model, coder, make_small_pairs(model, [row]), targets) for row in ROWS]
        edges = [np.pad(one.edges, ((0, 0), (0, 0), (0, 5 - one.edges.shape[2]), (0, 0))) for one in alone]
        np.testing.assert_allclose(found.edges, np.mean(edges, axis=0), atol=1e-12)
        np.testing.assert_allclose(found.gradients, np.mean([one.gradients for one in alone], axis=0), atol=1e-12)
        assert jax.device_count() > len(ROWS) and np.abs(found.edges[:-1]).max() > 1e-4


def test_a_target_that_does_not_exist_is_refused():
    with jax.enable_x64():
        model = make_model(**KIND)
        with pytest.raises(UserError, match="target.*below"):
            score_feature_edges(model, make_coder(model), make_small_pairs(model), np.array([[2, 0, 0]]))
