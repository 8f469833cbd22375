"""Rows of a grid: passes that each differ from a kept pass at one place, many at a time.

A row needs neither the layers below its place nor the positions before it (`resume.py`). What all rows may change is a
set of rules: values for a site, and for every row the ranges of layers, positions, heads and keys where they go. The
ranges are data: a row that leaves a site alone has empty ones there. So one program serves all sites, layers and heads.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jclt.interventions.batches import choose_starts, limit_rows, split_rows
from jclt.interventions.patching.metrics import AnswerSets, Measures, measure_rows
from jclt.interventions.resume import KeptPass, resume_pass
from jclt.models import Edit, ModelConfig, Place
from jclt.models.sites import SITE_AXES
from jclt.shapes import Array, Bool, Float, Int, Params


class Rule(NamedTuple):
    """Values for one site, and where each row takes them: in any of its m boxes of ranges `[start, stop]`.

    A leading axis of pairs is added to all, over which programs map."""

    values: Float[Array | np.ndarray, "..."]  # L and the site's axes without B; axes of size 1 are repeated
    layers: Int[Array | np.ndarray, "... R m 2"]
    positions: Int[Array | np.ndarray, "... R m 2"]
    heads: Int[Array | np.ndarray, "... R m 2"] | None = None
    keys: Int[Array | np.ndarray, "... R m 2"] | None = None


Rules = Mapping[str, tuple[Rule, ...]]
"""By site; where several meet, the last one counts."""


def find_boxes(rule: Rule, place: Place, value: Array) -> Bool[Array, "..."]:
    """A mask `[R, ...]` that broadcasts to the site's value: where each row takes the rule's values."""
    assert place.positions is not None
    axes, layer = SITE_AXES[place.site], jnp.asarray(place.layer, jnp.int32)
    inside = (layer >= rule.layers[..., 0]) & (layer < rule.layers[..., 1])
    mask = inside.reshape(*inside.shape, *(1,) * (value.ndim - 1))
    for letters, ranges in (("T", rule.positions), ("HG", rule.heads), ("S", rule.keys)):
        axis = next((axis for axis, letter in enumerate(axes) if letter in letters), None)
        if axis is None or ranges is None:
            continue
        at = place.positions[0] if letters == "T" else jnp.arange(value.shape[axis])
        at = at.astype(jnp.int32)[None, None]
        inside = (at >= ranges[..., :1]) & (at < ranges[..., 1:])
        shape = [1] * (value.ndim + 1)
        shape[:2], shape[axis + 1] = inside.shape[:2], inside.shape[2]
        mask = mask & inside.reshape(shape)
    return jnp.any(mask, axis=1)


def make_rows_edit(rules: Rules, start: int) -> Edit:
    """The edit of rows whose positions begin at `start`."""

    def edit(place: Place, value: Array) -> Array:
        for rule in rules.get(place.site, ()):
            new = jnp.asarray(rule.values)
            new = new[place.layer if new.shape[0] > 1 else 0]
            time = SITE_AXES[place.site].index("T") - 1
            if new.shape[time] > 1:
                new = jax.lax.slice_in_dim(new, start, new.shape[time], axis=time)
            value = jnp.where(find_boxes(rule, place, value), new[None].astype(value.dtype), value)
        return value

    return edit


@partial(jax.jit, static_argnames=("config", "start"))
@jax.named_scope("rows_of_pairs")
def run_rows_of_pairs(
    config: ModelConfig,
    start: int,
    params: Params,
    kept: KeptPass,
    rules: Rules,
    first_layer: Int[Array, ""],
    clean: Float[Array, "P V"],
    answers: AnswerSets,
) -> Measures:
    """The measures `[P, R]`. The rows change nothing below `first_layer` and before position `start`."""

    def run_pair(kept: KeptPass, rules: Rules, clean: Float[Array, "V"], answers: AnswerSets) -> Measures:
        count = next(rule.layers.shape[0] for group in rules.values() for rule in group)
        edit = make_rows_edit(rules, start)
        logits = resume_pass(config, params, kept, first_layer, start, count, edit)
        return measure_rows(logits[:, 0], clean, answers)

    return jax.vmap(run_pair)(kept, rules, clean, answers)


@jax.jit
def measure_baseline(logits: Float[Array, "P V"], clean: Float[Array, "P V"], answers: AnswerSets) -> Measures:
    """The measures `[P]` of one pass for each pair."""
    rows = jax.vmap(lambda one, clean, answers: measure_rows(one[None], clean, answers))(logits, clean, answers)
    return Measures(*(column[:, 0] for column in rows))


class Batches(NamedTuple):
    """How the rows of all pairs of one length are split."""

    pairs: int  # at once
    devices: int
    starts: tuple[int, ...]  # the positions at which batches may start

    def limit_rows(self, config: ModelConfig, length: int) -> int:
        """The largest number of rows of each pair that run at once."""
        return max(limit_rows(config, length) // self.pairs, 1) * self.devices


def choose_batches(config: ModelConfig, pairs: int, rows: int, length: int) -> Batches:
    """If a pair has few rows, several pairs run at once: as many as suit a device."""
    devices = jax.local_device_count()
    at_once = limit_rows(config, length) * devices // max(rows, 1)
    return Batches(min(max(at_once, 1), pairs), devices, choose_starts(config, pairs * rows, length))


def take_rows(rules: Rules, rows: Int[np.ndarray, "n"], mesh: Mesh) -> Rules:
    """The rules of some rows, split between devices; the values are on all of them already."""
    split = NamedSharding(mesh, P(None, "rows"))

    def take(ranges: np.ndarray | Array) -> Array:
        return jax.device_put(np.asarray(ranges)[:, rows], split)

    def take_rule(rule: Rule) -> Rule:
        heads, keys = (None if ranges is None else take(ranges) for ranges in (rule.heads, rule.keys))
        return Rule(rule.values, take(rule.layers), take(rule.positions), heads, keys)

    return {site: tuple(take_rule(rule) for rule in group) for site, group in rules.items()}


def find_firsts(rules: Rules) -> tuple[Int[np.ndarray, "R"], Int[np.ndarray, "R"]]:
    """The first position and the first layer that each row changes, in any pair."""
    positions: list[np.ndarray] = []
    layers: list[np.ndarray] = []
    for rule in (rule for group in rules.values() for rule in group):
        spans, span_layers = np.asarray(rule.positions), np.asarray(rule.layers)
        acts = (spans[..., 0] < spans[..., 1]) & (span_layers[..., 0] < span_layers[..., 1])
        for firsts, ranges in ((positions, spans), (layers, span_layers)):
            firsts.append(np.where(acts, ranges[..., 0], np.iinfo(np.int32).max).min(axis=(0, 2)))
    return np.min(positions, axis=0), np.min(layers, axis=0)


def run_grid_rows(
    config: ModelConfig,
    params: Params,
    mesh: Mesh,
    kept: KeptPass,
    rules: Rules,
    clean: Float[Array, "P V"],
    answers: AnswerSets,
    batches: Batches,
) -> Measures:
    """The measures `[P, R]` of all rows of these pairs. The rules have an axis of pairs."""
    positions, layers = find_firsts(rules)
    order: list[np.ndarray] = []
    parts: list[Measures] = []
    length = kept.streams.shape[2]

    def limit(start: int) -> int:
        return batches.limit_rows(config, length - start)

    for start, rows in split_rows(positions, layers, batches.starts, limit, batches.devices):
        first_layer = np.int32(layers[rows].min())
        parts.append(
            run_rows_of_pairs(config, start, params, kept, take_rows(rules, rows, mesh), first_layer, clean, answers)
        )
        order.append(rows)
    numbers = np.concatenate(order)
    columns = [np.concatenate([np.asarray(x) for x in column], axis=1) for column in zip(*parts, strict=True)]
    whole = [np.zeros((column.shape[0], len(positions)), column.dtype) for column in columns]
    for out, column in zip(whole, columns, strict=True):
        out[:, numbers] = column
    return Measures(*whole)
