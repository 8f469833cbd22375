"""Metrics of the next token, by name. All are computed of every row at once, from the logits at the last position.

    logit_difference = mean logit of the answers - mean logit of the wrong answers
    probability      = sum of the answers' probabilities
    difference       = sum of the answers' probabilities - sum of the wrong answers' probabilities
    kl               = sum over tokens of p log(p / q), p of the clean run, q of this one
    rank             = number of tokens whose logit is strictly larger than that of the best answer: 0 is best
    normalised       = (d - d_corrupted) / (d_clean - d_corrupted), d the logit difference

With the years above YY as answers and those up to YY as wrong answers, `difference` is the metric of greater-than.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jclt.errors import UserError
from jclt.interventions.patching.pairs import PromptPairs
from jclt.numerics import kl_divergence
from jclt.shapes import Array, Bool, Float, Int

Metric = Literal["normalised", "logit_difference", "probability", "difference", "kl", "rank"]

SATURATED = 0.999
"""Above this probability a metric of probabilities hardly moves, whatever a patch does."""
LEAST_RANGE = 1e-4
"""A normalised metric is undefined if the clean and the corrupted logit difference are closer than this."""


class AnswerSets(NamedTuple):
    """The answers of some pairs, padded to one length."""

    right: Int[Array | np.ndarray, "P k"]
    is_right: Bool[Array | np.ndarray, "P k"]
    wrong: Int[Array | np.ndarray, "P w"]
    is_wrong: Bool[Array | np.ndarray, "P w"]


class Measures(NamedTuple):
    """What is measured of each row."""

    logit_difference: Float[Array | np.ndarray, "..."]
    probability: Float[Array | np.ndarray, "..."]
    difference: Float[Array | np.ndarray, "..."]
    kl: Float[Array | np.ndarray, "..."]
    rank: Int[Array | np.ndarray, "..."]
    ties: Int[Array | np.ndarray, "..."]  # other tokens whose logit is that of the best answer


def pad_answers(pairs: PromptPairs) -> AnswerSets:
    """Pairs without wrong answers have none that counts."""
    columns: list[np.ndarray] = []
    for sets in (pairs.answers, pairs.wrong_answers):
        ids = np.zeros((len(sets), max(1, *map(len, sets))), np.int32)
        present = np.zeros(ids.shape, bool)
        for row, tokens in enumerate(sets):
            ids[row, : len(tokens)], present[row, : len(tokens)] = tokens, True
        columns += [ids, present]
    return AnswerSets(*columns)


def measure_rows(logits: Float[Array, "R V"], clean: Float[Array, "V"], answers: AnswerSets) -> Measures:
    """The measures of rows of one pair; `answers` without their first axis."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    means, sums = [], []
    right, is_right, wrong, is_wrong = map(jnp.asarray, answers)
    for tokens, present in ((right, is_right), (wrong, is_wrong)):
        counted = present[None].astype(logits.dtype)
        means.append(jnp.sum(logits[:, tokens] * counted, axis=-1) / jnp.maximum(counted.sum(), 1))
        sums.append(jnp.sum(jnp.exp(log_p[:, tokens]) * counted, axis=-1))
    best = jnp.max(jnp.where(is_right[None], logits[:, right], -jnp.inf), axis=-1)
    is_answer = jnp.zeros(logits.shape[-1], bool).at[right].max(is_right)
    ties = jnp.sum((logits == best[:, None]) & ~is_answer[None], axis=-1)
    return Measures(
        logit_difference=means[0] - means[1],
        probability=sums[0],
        difference=sums[0] - sums[1],
        kl=kl_divergence(jnp.broadcast_to(clean, logits.shape), logits),
        rank=jnp.sum(logits > best[:, None], axis=-1),
        ties=ties,
    )


def check_metric(metric: str, pairs: PromptPairs) -> None:
    """An error before any work for a metric that does not exist, or that needs wrong answers which some pair lacks."""
    if metric not in get_args(Metric):
        raise UserError(f"metric '{metric}': does not exist, expected one of: {', '.join(get_args(Metric))}")
    if metric in ("normalised", "logit_difference", "difference"):
        for name, wrong in zip(pairs.names, pairs.wrong_answers, strict=True):
            if not wrong:
                raise UserError(f"metric '{metric}': {name} has no wrong answer, expected metric 'probability'")


def compute_metric(
    metric: Metric, measures: Measures, clean: Measures, corrupted: Measures
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """The metric of every pair (the first axis), and averaged over pairs.

    The normalised average is that of the mean logit differences. A pair is NaN where its own range is too small to
    divide by; the average is an error then, as no cell of the grid would mean anything.
    """
    if metric != "normalised":
        per_pair = np.asarray(getattr(measures, metric), float)
        return per_pair, np.asarray(per_pair.mean(axis=0))
    low, high = (np.asarray(x.logit_difference, float) for x in (corrupted, clean))
    values = np.asarray(measures.logit_difference, float)
    ranges = (high - low).reshape(len(high), *(1,) * (values.ndim - 1))
    whole = float((high - low).mean())
    if abs(whole) < LEAST_RANGE:
        raise UserError(
            f"metric 'normalised': the mean logit difference is {high.mean():.4g} on clean prompts and "
            f"{low.mean():.4g} on corrupted ones, expected two that differ; 'logit_difference' needs no range"
        )
    defined = np.abs(ranges) >= LEAST_RANGE
    shifted = values - low.reshape(ranges.shape)
    per_pair = np.where(defined, shifted / np.where(defined, ranges, 1), np.nan)
    return per_pair, np.asarray(shifted.mean(axis=0) / whole)


def list_warnings(metric: str, names: tuple[str, ...], clean: Measures, corrupted: Measures | None) -> tuple[str, ...]:
    """What a reader of the figures should know: saturated probabilities, ties, undefined pairs."""
    lines: list[str] = []
    if metric in ("probability", "difference"):
        for which, measures in (("clean", clean), ("corrupted", corrupted)):
            if measures is None:
                continue
            full = np.flatnonzero(np.asarray(measures.probability) > SATURATED)
            if len(full):
                lines.append(
                    f"{metric} is saturated: above {SATURATED} on {len(full)} {which} prompts, first '{names[full[0]]}'"
                )
    if metric == "rank":
        tied = np.flatnonzero(np.asarray(clean.ties) > 0)
        if len(tied):
            lines.append(f"rank: the answer ties with other tokens on {len(tied)} clean prompts, `ties` counts them")
    if metric == "normalised" and corrupted is not None:
        ranges = np.abs(np.asarray(clean.logit_difference) - np.asarray(corrupted.logit_difference))
        same = np.flatnonzero(ranges < LEAST_RANGE)
        if len(same):
            lines.append(
                f"normalised is undefined (NaN) for {len(same)} pairs whose logit differences are within "
                f"{LEAST_RANGE:g}, first '{names[same[0]]}'"
            )
    return tuple(lines)
