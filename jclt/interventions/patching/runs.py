"""Passes over pairs of prompts, some pairs at a time, and the rows of a grid that change them."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from jclt.errors import UserError
from jclt.interventions.patching.metrics import AnswerSets, Measures, pad_answers
from jclt.interventions.patching.pairs import PromptPairs
from jclt.interventions.patching.places import Grid
from jclt.interventions.patching.rows import (
    Batches,
    Rules,
    choose_batches,
    measure_baseline,
    run_grid_rows,
)
from jclt.interventions.resume import KeptPass, keep_pass, make_rows_mesh
from jclt.models import Model, ModelConfig, Place
from jclt.shapes import Array, Float, Int, Params, Tokens

Side = Literal["clean", "corrupted"]


class Job(NamedTuple):
    """What all passes of one call share."""

    model: Model
    pairs: PromptPairs
    params: Params  # on every device of `mesh`
    mesh: Mesh
    answers: AnswerSets


class Chunk(NamedTuple):
    """Some pairs of one length, as the rows of a grid change them."""

    base: KeptPass  # the run that rows change
    rules: Rules
    clean: Float[Array, "P V"]  # logits
    corrupted: Float[Array, "P V"] | None


def prepare_job(model: Model, pairs: PromptPairs) -> Job:
    mesh = make_rows_mesh()
    params = jax.device_put(dict(model.params), NamedSharding(mesh, P()))
    return Job(model, pairs, params, mesh, pad_answers(pairs))


def check_corrupted(pairs: PromptPairs) -> None:
    missing = [name for name, ids in zip(pairs.names, pairs.corrupted, strict=True) if ids is None]
    if missing:
        raise UserError(f"pairs: {missing[0]} has no corrupted prompt ({len(missing)} of {len(pairs)}), expected one")


def take_tokens(job: Job, side: Side, numbers: Int[np.ndarray, "P"]) -> Int[Array, "P T"]:
    prompts = job.pairs.clean if side == "clean" else job.pairs.corrupted
    tokens = np.array([prompts[int(number)] for number in numbers], np.int32)
    return jax.device_put(tokens, NamedSharding(job.mesh, P()))


def take_answers(job: Job, numbers: Int[np.ndarray, "P"]) -> AnswerSets:
    return AnswerSets(*(np.asarray(x)[numbers] for x in job.answers))


def keep_passes(
    job: Job,
    side: Side,
    numbers: Int[np.ndarray, "P"],
    sites: tuple[str, ...] = (),
    noise: Float[np.ndarray, "P T D"] | None = None,
) -> tuple[KeptPass, dict[str, Array]]:
    """One pass for each pair, and what it computes at the sites: `[P, L, ...]`. Noise is added to the embeddings."""
    return _keep_passes(job.model.config, job.params, take_tokens(job, side, numbers), sites, noise)


@partial(jax.jit, static_argnames=("config", "sites"))
@jax.named_scope("keep_passes")
def _keep_passes(
    config: ModelConfig,
    params: Params,
    tokens: Tokens,
    sites: tuple[str, ...],
    noise: Float[Array, "P T D"] | None,
) -> tuple[KeptPass, dict[str, Array]]:
    def keep(tokens: Int[Array, "T"], noise: Float[Array, "T D"] | None) -> tuple[KeptPass, dict[str, Array]]:
        def add_noise(place: Place, value: Array) -> Array:
            if noise is None or place.site != "token_embedding":
                return value
            return value + noise[None].astype(value.dtype)

        kept, seen = keep_pass(config, params, tokens[None], sites, None if noise is None else add_noise)
        return kept, {site: seen[site] for site in sites}

    return jax.vmap(keep)(tokens, noise)


class Part(NamedTuple):
    """Some pairs of one length, which run at once."""

    numbers: Int[np.ndarray, "n"]
    padded: Int[np.ndarray, "P"]  # with some of them again, so that all parts are of one size
    batches: Batches


def split_pairs(job: Job, rows: int) -> Iterator[Part]:
    """The pairs in parts that run at once, where each pair has this number of rows."""
    for length, numbers in job.pairs.group_by_length().items():
        batches = choose_batches(job.model.config, len(numbers), rows, length)
        for first in range(0, len(numbers), batches.pairs):
            real = numbers[first : first + batches.pairs]
            yield Part(real, np.resize(real, batches.pairs), batches)


Measured = tuple[Measures, Measures, Measures | None]
"""Of all rows `[pairs, *axes]`, of the clean runs `[pairs]`, and of the corrupted ones if the method has any."""
Found = tuple[Measures, Float[Array, "P V"], Float[Array, "P V"] | None]
"""Of some pairs: the measures `[P, R]` of their rows, and the logits of the clean and the corrupted runs."""


def run_pairs(
    job: Job, shape: tuple[int, ...], run_part: Callable[[Part, AnswerSets], Found], progress: bool
) -> Measured:
    """Runs all pairs, part by part; `shape` is that of one pair's rows."""
    parts: list[tuple[Measures, ...]] = []
    order: list[np.ndarray] = []
    rows = int(np.prod(shape))
    with tqdm(total=len(job.pairs) * rows, unit="row", disable=None if progress else True) as bar:
        for part in split_pairs(job, rows):
            answers = take_answers(job, part.padded)
            of_rows, clean, corrupted = run_part(part, answers)
            found = [of_rows, measure_baseline(clean, clean, answers)]
            if corrupted is not None:
                found.append(measure_baseline(corrupted, clean, answers))
            parts.append(tuple(Measures(*(np.asarray(x)[: len(part.numbers)] for x in one)) for one in found))
            order.append(part.numbers)
            bar.update(len(part.numbers) * rows)
    back = np.argsort(np.concatenate(order), kind="stable")
    joined = [
        Measures(*(np.concatenate(columns)[back] for columns in zip(*same, strict=True)))
        for same in zip(*parts, strict=True)
    ]
    of_rows = Measures(*(x.reshape(len(x), *shape) for x in joined[0]))
    return of_rows, joined[1], joined[2] if len(joined) > 2 else None


def run_grid(job: Job, grid: Grid, make_chunk: Callable[[Int[np.ndarray, "P"]], Chunk], progress: bool) -> Measured:
    """Runs the rows of a grid. `make_chunk` gets the numbers of some pairs of one length."""

    def run_part(part: Part, answers: AnswerSets) -> Found:
        base, rules, clean, corrupted = make_chunk(part.padded)
        rows = run_grid_rows(job.model.config, job.params, job.mesh, base, rules, clean, answers, part.batches)
        return rows, clean, corrupted

    return run_pairs(job, tuple(len(labels) for labels in grid.axes.values()), run_part, progress)
