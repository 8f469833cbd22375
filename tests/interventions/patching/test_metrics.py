"""Metrics of the next token, beside their formulas in NumPy; what is undefined or saturated is said."""

import jax
import numpy as np
import pytest

from jclt.errors import UserError
from jclt.interventions.patching.metrics import AnswerSets, Measures, compute_metric, list_warnings, measure_rows


def make_measures(**columns):
    count = len(next(iter(columns.values())))
    return Measures(**{name: np.asarray(columns.get(name, np.zeros(count))) for name in Measures._fields})


def test_measures_are_their_formulas():
    random = np.random.default_rng(0)
    logits, clean = (random.normal(size=shape).astype(np.float32) for shape in ((5, 11), (11,)))
    logits[3, 4] = logits[3, 7] = 9.0  # token 7 is an answer, token 4 is not
    right, wrong = [2, 7], [0]
    sets = AnswerSets(np.array([2, 7, 0]), np.array([True, True, False]), np.array([0, 0]), np.array([True, False]))
    got = jax.jit(measure_rows)(logits, clean, sets)
    p, p_clean = (
        np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True) for x in (logits.astype(float), clean.astype(float))
    )
    np.testing.assert_allclose(got.logit_difference, logits[:, right].mean(1) - logits[:, wrong].mean(1), rtol=1e-5)
    np.testing.assert_allclose(got.probability, p[:, right].sum(1), rtol=1e-5)
    np.testing.assert_allclose(got.difference, p[:, right].sum(1) - p[:, wrong].sum(1), atol=1e-6)
    np.testing.assert_allclose(got.kl, (p_clean * (np.log(p_clean) - np.log(p))).sum(1), atol=1e-6)
    best = logits[:, right].max(1, keepdims=True)
    np.testing.assert_array_equal(got.rank, (logits > best).sum(1))
    assert got.rank[3] == 0 and np.asarray(got.ties).tolist() == [0, 0, 0, 1, 0]


def test_normalised_is_the_share_of_the_range_and_says_where_it_is_undefined():
    clean, corrupted = make_measures(logit_difference=[3.0, 1.0]), make_measures(logit_difference=[1.0, 1.0])
    rows = make_measures(logit_difference=[[2.0, 3.0], [1.5, 1.0]])
    per_pair, values = compute_metric("normalised", rows, clean, corrupted)
    np.testing.assert_allclose(per_pair, [[0.5, 1.0], [np.nan, np.nan]])
    np.testing.assert_allclose(values, [0.75, 1.0])  # of the means: (1.75 - 1) / (2 - 1)
    assert list_warnings("normalised", ("one", "two"), clean, corrupted) == (
        "normalised is undefined (NaN) for 1 pairs whose logit differences are within 0.0001, first 'two'",
    )
    with pytest.raises(UserError, match="mean logit difference is 2 on clean prompts and 2 on corrupted ones"):
        compute_metric("normalised", rows, clean, clean)


def test_saturation_and_ties_are_said():
    full, low = make_measures(probability=[0.9995, 0.2]), make_measures(probability=[0.1, 0.2])
    (line,) = list_warnings("probability", ("one", "two"), full, low)
    assert "saturated" in line and "1 clean prompts" in line and "'one'" in line
    assert list_warnings("logit_difference", ("one", "two"), full, low) == ()
    (line,) = list_warnings("rank", ("one", "two"), make_measures(ties=[0, 2]), low)
    assert "ties with other tokens on 1 clean prompts" in line
