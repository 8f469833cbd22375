"""`trace_causes`: causal tracing. Noise on the subject's embeddings destroys the answer; which state brings it back?

Three runs of each prompt: clean; noised, with Gaussian noise on the embeddings of the subject's tokens; restored, which
is the noised run with one state of the clean run. Averaged over draws of the noise,

    total effect    = metric(clean) - metric(noised)
    indirect effect = metric(restored) - metric(noised), one for each place

A severed restoration holds later MLP or attention outputs, at the restored positions, at their noised values: what is
then missing of the indirect effect went through them.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np

from jclt.errors import UserError
from jclt.interventions.patching.metrics import Measures, Metric, check_metric
from jclt.interventions.patching.pairs import PromptPairs
from jclt.interventions.patching.patch import make_rules
from jclt.interventions.patching.places import Grid, Position, list_windows, make_grid
from jclt.interventions.patching.result import PatchingResult
from jclt.interventions.patching.rows import Rule
from jclt.interventions.patching.runs import Chunk, Job, keep_passes, prepare_job, run_grid
from jclt.models import LAYER_SITES, Model
from jclt.shapes import Float, Int

Severed = Literal["mlp_out", "attn_out"]


def trace_causes(
    model: Model,
    pairs: PromptPairs,
    sites: str | Iterable[str] = "resid_pre",
    *,
    layers: Iterable[int] | None = None,
    window: int = 1,
    positions: Iterable[Position] | None = None,
    noise: float = 3.0,
    draws: int = 10,
    severed: Severed | None = None,
    metric: Metric = "probability",
    seed: int = 0,
    progress: bool = True,
) -> PatchingResult:
    """Restores each site, window of layers and position of clean prompts whose subject is noised.

    window      the number of layers around each that are restored together. Published figures of MLPs and attention
                have 10
    positions   numbers, ranges or names (`places.py`); by default each position of prompts of one length
    noise       the standard deviation of the noise, in standard deviations of the embeddings of all subjects' tokens
    draws       of the noise for each prompt, over which measures are averaged
    severed     outputs that are held at their noised values after what is restored, at the restored positions

    Only the clean prompts, the answers and the subjects of `pairs` are used. In the result "corrupted" is the noised
    run, and `effects` are the indirect effects.
    """
    if draws < 1 or not noise > 0:
        raise UserError(f"noise={noise}, draws={draws}: expected noise above 0 and at least one draw")
    if severed is not None and severed not in get_args(Severed):
        raise UserError(f"severed '{severed}': expected one of: {', '.join(get_args(Severed))}")
    check_metric(metric, pairs)
    for name, subject in zip(pairs.names, pairs.subjects, strict=True):
        if subject is None:
            raise UserError(f"causal tracing: {name} has no subject, expected one whose embeddings are noised")
    centres = tuple(range(model.config.layers) if layers is None else layers)
    grid = make_grid(model.config, pairs, sites, list_windows(model.config, window, centres), positions, heads=False)
    grid = grid._replace(axes=grid.axes | {"layer": centres})
    if severed in grid.sites:
        raise UserError(f"severed '{severed}': is restored too, expected another site")
    job = prepare_job(model, pairs)
    scale = noise * measure_subjects(job)
    found = [trace_draw(job, grid, scale, severed, (seed, draw), progress) for draw in range(draws)]
    rows, clean, noised = (average_measures(same) for same in zip(*found, strict=True))
    method = f"causal tracing, {draws} draws of noise {noise:g}"
    method += f", {window} layers restored" * (window > 1) + f", {severed} severed" * (severed is not None)
    return PatchingResult(grid.axes, metric, method, "corrupted", pairs, rows, clean, noised)


def average_measures(draws: Sequence[Measures]) -> Measures:
    return Measures(*(np.mean(x, axis=0) for x in zip(*draws, strict=True)))


def trace_draw(
    job: Job, grid: Grid, scale: float, severed: str | None, key: tuple[int, int], progress: bool
) -> tuple[Measures, Measures, Measures]:
    """One draw of the noise for every prompt: of the restored, the clean and the noised runs."""
    pairs = job.pairs

    def make_chunk(numbers: Int[np.ndarray, "P"]) -> Chunk:
        clean, seen = keep_passes(job, "clean", numbers, grid.sites)
        noise = draw_noise(pairs, numbers, job.model.config.width, scale, key)
        held = grid.sites if severed is None else (*grid.sites, severed)
        noised, noised_seen = keep_passes(job, "clean", numbers, held, noise)
        located = grid.locate(pairs, numbers)
        rules = dict(make_rules(grid, located, seen))
        if severed is not None:
            shape = (*located.shape[:2], 1, 2)
            last = np.full_like(grid.layers[:, 0], job.model.config.layers)
            after = np.stack([first_severed_layers(grid, severed), last], axis=-1)
            layers = np.broadcast_to(after[None, :, None], shape)
            rules[severed] = (Rule(noised_seen[severed], layers, located[:, :, None]),)
        return Chunk(noised, rules, clean.logits, noised.logits)

    rows, clean, noised = run_grid(job, grid, make_chunk, progress)
    assert noised is not None
    return rows, clean, noised


def first_severed_layers(grid: Grid, severed: str) -> Int[np.ndarray, "R"]:
    """The first layer at which the severed output comes after all that a row restores."""
    order = list(LAYER_SITES)  # sites in the order in which a block computes them
    same = np.array([order.index(severed) > order.index(grid.sites[site]) for site in grid.site])
    return np.where(same, grid.layers[:, 1] - 1, grid.layers[:, 1]).astype(np.int32)


def measure_subjects(job: Job) -> float:
    """The standard deviation of the embeddings of all subjects' tokens."""
    parts = [ids[slice(*span)] for ids, span in zip(job.pairs.clean, job.pairs.subjects, strict=True) if span]
    config, tokens = job.model.config, np.concatenate(parts)
    rows = np.asarray(job.model.params["token_embedding"][jnp.asarray(tokens)], np.float64)
    return float(rows.std()) * (config.width**0.5 if config.scaled_embedding else 1.0)


def draw_noise(
    pairs: PromptPairs, numbers: Int[np.ndarray, "P"], width: int, scale: float, key: tuple[int, int]
) -> Float[np.ndarray, "P T D"]:
    """Noise for the embeddings of the subjects, of each pair by its number, whichever pairs run with it."""
    noise = np.zeros((len(numbers), len(pairs.clean[numbers[0]]), width), np.float32)
    for row, number in zip(noise, numbers, strict=True):
        span = pairs.subjects[number]
        assert span is not None
        random = np.random.default_rng((*key, int(number)))
        row[slice(*span)] = scale * random.normal(size=(span[1] - span[0], width))
    return noise
