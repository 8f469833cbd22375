"""Passes over pairs of prompts that gradients go through, and the metric of each pair.

Prompts are padded on the right to one length, and the answer is read at each prompt's own last token.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jclt.errors import UserError
from jclt.interventions.batches import limit_rows
from jclt.interventions.patching.metrics import AnswerSets, Metric, check_metric, measure_rows, pad_answers
from jclt.interventions.patching.pairs import PromptPairs
from jclt.interventions.patching.runs import check_corrupted
from jclt.models import MODEL_SITES, Compose, Edit, ModelConfig, Sites, ops
from jclt.models.transformer import Activate, block, embed, make_context, unembed
from jclt.models.weights import declare_layer_weights
from jclt.shapes import Array, Bool, Captured, Float, Int, Params, Stream, Tokens

GRADIENT_METRICS = ("logit_difference", "probability", "difference")


class Prompts(NamedTuple):
    """Pairs, padded to one length. Without corrupted prompts the clean ones stand there."""

    clean: Int[Array, "P T"]
    corrupted: Int[Array, "P T"]
    last: Int[Array, "P"]  # position of the last token
    answers: AnswerSets


def pad_prompts(pairs: PromptPairs) -> Prompts:
    length = max(len(ids) for ids in pairs.clean)
    sides = [np.zeros((len(pairs), length), np.int32) for _ in range(2)]
    for row, (clean, corrupted) in enumerate(zip(pairs.clean, pairs.corrupted, strict=True)):
        for side, ids in zip(sides, (clean, clean if corrupted is None else corrupted), strict=True):
            side[row, : len(ids)] = ids
    last = np.array([len(ids) - 1 for ids in pairs.clean], np.int32)
    return Prompts(jnp.asarray(sides[0]), jnp.asarray(sides[1]), jnp.asarray(last), pad_answers(pairs))


def take_prompts(prompts: Prompts, numbers: Int[np.ndarray, "n"]) -> Prompts:
    return jax.tree.map(lambda column: jnp.asarray(np.asarray(column)[numbers]), prompts)


def split_prompts(config: ModelConfig, pairs: PromptPairs, devices: int) -> list[Int[np.ndarray, "n"]]:
    """The numbers of the pairs that run at once."""
    return split_evenly(len(pairs), limit_rows(config, max(len(ids) for ids in pairs.clean)), devices)


def split_evenly(count: int, most: int, devices: int) -> list[Int[np.ndarray, "n"]]:
    """The numbers below `count` in parts of at most `most` for each device. Parts have one size, so that one program
    serves all; the last repeats numbers to be full."""
    parts = -(-count // (most * devices))
    size = -(-count // (parts * devices)) * devices
    return [np.resize(np.arange(first, min(first + size, count)), size) for first in range(0, count, size)]


def average_positions(
    read: Callable[[Prompts], Any], pairs: PromptPairs, parts: Iterable[Int[np.ndarray, "n"]], length: int
) -> Any:
    """The mean at each position over the prompts that reach it, 0 where none does: of arrays `[n, P, T, ...]`, which
    `read` gives for some of the pairs. `parts` are those of `split_evenly`."""
    prompts = pad_prompts(pairs)
    found = prompts.clean.shape[1]
    if found > length:
        raise UserError(f"pairs for the means: {found} tokens, expected at most {length}")
    sums: list[Any] = []
    for numbers in parts:
        part = take_prompts(prompts, numbers)
        is_first = np.arange(len(numbers)) < len(np.unique(numbers))
        has_token = is_first[:, None] & (np.arange(found)[None] <= np.asarray(part.last)[:, None])
        sums.append(sum_positions(read(part), jnp.asarray(has_token)))
    totals, counts = jax.tree.map(lambda *rows: sum(rows[1:], rows[0]), *sums)

    def divide(total: Array) -> Array:
        at = (None, None, slice(None), *(None,) * (total.ndim - 3))
        mean = total / jnp.maximum(counts, 1)[at].astype(total.dtype)
        return jnp.pad(mean, [(0, 0), (0, 0), (0, length - found), *[(0, 0)] * (mean.ndim - 3)])

    return jax.tree.map(divide, totals)


@jax.jit
def sum_positions(values: Any, has_token: Bool[Array, "P T"]) -> tuple[Any, Int[Array, "T"]]:
    """The sums over prompts, and how many prompts have each position."""

    def add(value: Array) -> Array:
        there = has_token.reshape(1, *has_token.shape, *(1,) * (value.ndim - 3))
        return jnp.where(there, value, 0).sum(axis=1, keepdims=True)

    return jax.tree.map(add, values), has_token.sum(axis=0)


def check_gradient_metric(metric: str, pairs: PromptPairs) -> None:
    """An error for a metric without a useful gradient: ranks have none, and the divergence's is 0 at the clean run."""
    check_metric(metric, pairs)
    if metric not in GRADIENT_METRICS:
        raise UserError(f"metric '{metric}': expected one with a gradient: {', '.join(GRADIENT_METRICS)}")


def check_reference(reference: str, pairs: PromptPairs) -> None:
    if reference not in ("corrupted", "zero"):
        raise UserError(f"reference '{reference}': expected 'corrupted' or 'zero'")
    if reference == "corrupted":
        check_corrupted(pairs)


def measure_metric(
    metric: Metric, logits: Float[Array, "P V"], answers: AnswerSets, clean: Float[Array, "P V"] | None = None
) -> Float[Array, "P"]:
    """The metric of each pair. `clean` are the clean logits, which `kl` compares with."""
    clean = logits if clean is None else clean
    measures = jax.vmap(lambda row, clean, own: measure_rows(row[None], clean, own))(logits, clean, answers)
    return getattr(measures, metric)[:, 0]


def run_pass(
    config: ModelConfig,
    params: Params,
    tokens: Tokens,
    last: Int[Array, "P"],
    *,
    edit: Edit | None = None,
    layer_edit: Edit | None = None,
    capture: tuple[str, ...] = (),
    activate: Activate = ops.compute_neurons,
    begin: tuple[Stream, Int[Array, ""]] | None = None,
) -> tuple[Float[Array, "P V"], Captured]:
    """The logits at each prompt's last token, and the captured sites, inside the layers with a leading layer axis.

    `layer_edit` is an edit as a pytree whose arrays have a leading layer axis: each layer has its own part, which acts
    before `edit`. With `begin`, a residual stream and the layer that reads it, the pass starts there.
    """
    positions = jnp.zeros_like(tokens) + jnp.arange(tokens.shape[1], dtype=tokens.dtype)[None]
    context = make_context(config, positions, tokens.shape[1], params["token_embedding"].dtype)
    context = context._replace(activate=activate)
    in_layers = tuple(name for name in capture if name not in MODEL_SITES)
    outside = Sites(None, capture, edit)
    weights = {name: params[name] for name in declare_layer_weights(config)}

    def step(x: Stream, scanned: tuple[Array, Params, Edit | None]) -> tuple[Stream, Captured]:
        layer, weights, own = scanned
        edits = tuple(part for part in (own, edit) if part is not None)
        site = Sites(layer, in_layers, Compose(edits) if edits else None)

        def run_block(x: Stream) -> Stream:
            return block(context, weights, layer, site, x, None)[0]

        if begin is None:
            return run_block(x), site.seen
        return jax.lax.cond(layer >= begin[1], run_block, lambda x: x, x), {}

    if begin is not None:  # else the gradient of a condition keeps a copy of all weights
        step = jax.checkpoint(step, prevent_cse=False)
    x = embed(config, params, tokens, positions, outside) if begin is None else begin[0]
    x, seen = jax.lax.scan(step, x, (jnp.arange(config.layers), weights, layer_edit))
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)
    logits = unembed(config, params, x, outside)[:, 0]
    return logits, {name: (seen if name in in_layers else outside.seen)[name] for name in capture}
