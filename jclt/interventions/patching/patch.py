"""`patch`: activation patching. A value of one run goes into another run, at one place at a time; what changes?

    denoising   the corrupted run with a value of the clean one: what suffices to bring the answer back?
    noising     the clean run with a value of the corrupted one: what is needed for the answer?
    ablation    the clean run with a value of neither: zero, a mean, another pair's value, noise

A call measures a whole grid of sites, layers, positions and heads.
"""

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jclt.errors import UserError
from jclt.interventions.patching.metrics import Metric, check_metric
from jclt.interventions.patching.pairs import PromptPairs
from jclt.interventions.patching.places import Grid, LayerSpan, Position, make_grid
from jclt.interventions.patching.result import PatchingResult
from jclt.interventions.patching.rows import Rule, Rules
from jclt.interventions.patching.runs import (
    Chunk,
    Job,
    check_corrupted,
    keep_passes,
    prepare_job,
    run_grid,
    split_pairs,
)
from jclt.models import Model
from jclt.models.sites import SITE_AXES
from jclt.shapes import Array, Float, Int

Patching = Literal["denoising", "noising"]
Source = Literal["other", "zero", "mean", "position mean", "resample", "noise"]

DEFAULT_SITES = ("resid_pre", "attn_out", "mlp_out")


def patch(
    model: Model,
    pairs: PromptPairs,
    sites: str | Iterable[str] = DEFAULT_SITES,
    *,
    layers: Iterable[LayerSpan] | None = None,
    positions: Iterable[Position] | None = None,
    heads: bool = False,
    mode: Patching | None = None,
    source: Source = "other",
    metric: Metric = "normalised",
    seed: int = 0,
    progress: bool = True,
) -> PatchingResult:
    """Replaces the value at each site, layer, position and head of a grid, one at a time; measures the next token.

    layers      numbers, or ranges of layers that change together; by default each layer
    positions   numbers, ranges or names (`places.py`); by default each position of prompts of one length
    heads       whether each head is a place of its own, at sites with an axis of heads (`head_out`, `pattern`, `keys`)
    mode        "denoising" (the default) or "noising"; an ablation changes the clean run, so it is noising
    source      "other": the other run's value. "zero". "mean": of the site in that layer, over all positions of the
                clean prompts; "position mean": over the clean prompts of that length, at each position. "resample": the
                value of another pair's clean prompt of that length. "noise": the value plus Gaussian noise with the
                standard deviation of the site in that layer
    metric      what `values` holds; the result gives the others with `use_metric`
    seed        of "resample" and "noise"
    """
    mode = mode or ("denoising" if source == "other" else "noising")
    check_metric(metric, pairs)
    if source == "other" or metric == "normalised":
        check_corrupted(pairs)
    grid = make_grid(model.config, pairs, sites, layers, positions, heads)
    check_source(pairs, grid.sites, source, mode)
    job = prepare_job(model, pairs)
    statistics = measure_sites(job, grid) if source in ("mean", "position mean", "noise") else {}

    def make_chunk(numbers: Int[np.ndarray, "P"]) -> Chunk:
        clean, clean_seen = keep_passes(job, "clean", numbers, grid.sites)
        corrupted, corrupted_seen = None, clean_seen
        if all(ids is not None for ids in pairs.corrupted):
            corrupted, corrupted_seen = keep_passes(job, "corrupted", numbers, grid.sites)
        if source == "other":
            values = clean_seen if mode == "denoising" else corrupted_seen
        elif source == "resample":
            values = keep_passes(job, "clean", choose_donors(pairs, seed)[numbers], grid.sites)[1]
        else:
            values = make_values(source, clean_seen, statistics, numbers, seed)
        base = corrupted if mode == "denoising" and corrupted is not None else clean
        logits = None if corrupted is None else corrupted.logits
        return Chunk(base, make_rules(grid, grid.locate(pairs, numbers), values), clean.logits, logits)

    found = run_grid(job, grid, make_chunk, progress)
    method = mode if source == "other" else f"ablation ({source})"
    changed = "corrupted" if mode == "denoising" else "clean"
    return PatchingResult(grid.axes, metric, method, changed, pairs, *found)


def check_source(pairs: PromptPairs, sites: tuple[str, ...], source: str, mode: str) -> None:
    if source not in get_args(Source):
        raise UserError(f"source '{source}': expected one of: {', '.join(get_args(Source))}")
    if mode not in get_args(Patching):
        raise UserError(f"mode '{mode}': expected {' or '.join(get_args(Patching))}")
    if source != "other" and mode == "denoising":
        raise UserError(f"mode 'denoising' with source '{source}': expected 'noising', of the clean run")
    for site in sites:
        if source in ("mean", "noise") and "S" in SITE_AXES[site]:
            raise UserError(f"source '{source}' at site '{site}': expected a site without an axis of keys")
    alone = [numbers[0] for numbers in pairs.group_by_length().values() if len(numbers) < 2]
    if source == "resample" and alone:
        raise UserError(f"source 'resample': {pairs.names[alone[0]]} is the only prompt of its length, expected two")


def make_rules(grid: Grid, positions: Int[np.ndarray, "P R 2"], values: Mapping[str, Array]) -> Rules:
    """A rule for each site, with empty ranges for the rows of the other sites."""
    shape = (*positions.shape[:2], 1, 2)
    heads = np.broadcast_to(grid.heads[None, :, None], shape)
    rules: dict[str, tuple[Rule, ...]] = {}
    for number, site in enumerate(grid.sites):
        layers = np.where((grid.site == number)[:, None], grid.layers, 0)
        layers = np.broadcast_to(layers[None, :, None], shape)
        rules[site] = (Rule(values[site], layers, positions[:, :, None], heads),)
    return rules


# ---------------------------------------------------------------- values that are neither run's


class SiteStatistics(NamedTuple):
    """Of one site, over the clean prompts: `[L, 1, ...]` over all positions, and by length at each position."""

    mean: Float[np.ndarray, "..."]
    deviation: Float[np.ndarray, "L"]  # over prompts, positions and components
    at_position: dict[int, Float[np.ndarray, "..."]]


def measure_sites(job: Job, grid: Grid) -> dict[str, SiteStatistics]:
    groups, sites = job.pairs.group_by_length(), grid.sites
    at_position: dict[str, dict[int, np.ndarray]] = {site: {} for site in sites}
    squares: dict[str, np.ndarray] = {}
    for numbers, padded, _ in split_pairs(job, len(grid.site)):
        length = len(job.pairs.clean[numbers[0]])
        _, seen = keep_passes(job, "clean", padded, sites)
        for site in sites:
            values = np.asarray(seen[site], np.float64)[: len(numbers)]  # [P, L, ...]
            share = values.sum(axis=0) / len(groups[length])
            at_position[site][length] = share + at_position[site].get(length, np.zeros_like(share))
            squared = length * np.square(values).reshape(*values.shape[:2], -1).mean(axis=2).sum(axis=0)
            squares[site] = squared + squares.get(site, np.zeros_like(squared))
    positions = sum(length * len(numbers) for length, numbers in groups.items())
    found: dict[str, SiteStatistics] = {}
    for site in sites:
        axis = SITE_AXES[site].index("T")
        sums = [mean.sum(axis, keepdims=True) * len(groups[length]) for length, mean in at_position[site].items()]
        whole = len(sums) < 2 or "S" not in SITE_AXES[site]  # the axis of keys is as long as the prompt
        mean = np.sum(sums if whole else sums[:1], axis=0) / positions
        centre = mean.reshape(len(mean), -1).mean(axis=1)
        deviation = np.sqrt(np.maximum(squares[site] / positions - centre**2, 0))
        found[site] = SiteStatistics(mean, deviation, at_position[site])
    return found


def make_values(
    source: str,
    seen: Mapping[str, Array],
    statistics: Mapping[str, SiteStatistics],
    numbers: Int[np.ndarray, "P"],
    seed: int,
) -> dict[str, Array]:
    """What goes to each site, `[P, L, ...]`."""
    values: dict[str, Array] = {}
    for index, (site, value) in enumerate(seen.items()):
        if source == "zero":
            values[site] = jnp.zeros_like(value.mean(SITE_AXES[site].index("T") + 1, keepdims=True))
        elif source == "noise":
            deviation = jnp.asarray(statistics[site].deviation, value.dtype)
            key = jax.random.fold_in(jax.random.key(seed), index)
            values[site] = add_noise(value, deviation, jnp.asarray(numbers, jnp.int32), key)
        else:
            length = value.shape[SITE_AXES[site].index("T") + 1]
            mean = statistics[site].mean if source == "mean" else statistics[site].at_position[length]
            values[site] = jnp.broadcast_to(jnp.asarray(mean, value.dtype)[None], (len(numbers), *mean.shape))
    return values


@jax.jit
def add_noise(
    value: Float[Array, "P L ..."], deviation: Float[Array, "L"], numbers: Int[Array, "P"], key: Array
) -> Float[Array, "P L ..."]:
    """Each pair has noise of its own, whichever pairs run with it."""
    draw = jax.vmap(lambda number: jax.random.normal(jax.random.fold_in(key, number), value.shape[1:], value.dtype))
    return value + deviation.reshape(1, -1, *(1,) * (value.ndim - 2)) * draw(numbers)


def choose_donors(pairs: PromptPairs, seed: int) -> Int[np.ndarray, "_"]:
    """For each pair another one of its length: a random cycle through them."""
    donors = np.arange(len(pairs))
    random = np.random.default_rng(seed)
    for numbers in pairs.group_by_length().values():
        cycle = random.permutation(numbers)
        donors[cycle] = np.roll(cycle, 1)
    return donors
