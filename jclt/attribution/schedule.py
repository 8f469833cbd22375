"""From prompts of like length to their rows of edges: the device computes blocks of them, the host says of what."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jclt.attribution.edges import Edges, Fixed, Targets, trace_blocks, trace_embeddings
from jclt.attribution.local import Through
from jclt.attribution.nodes import Active, Layout, gather_sources, groups_of, run_pass, skips_of, tile_of, tiles_before
from jclt.attribution.options import Options, silent_positions
from jclt.attribution.ranking import PromptRows
from jclt.attribution.sizes import (
    BATCH_BYTES,
    BLOCK,
    GRADIENT,
    IN_FLIGHT,
    blocks_of_call,
    check_rows,
    embeddings_at_once,
    length_bucket,
    pass_bytes,
    size_for,
    source_bytes,
)
from jclt.attribution.targets import Outputs, Target, Unembedding, outputs
from jclt.coders import Coder
from jclt.errors import UserError
from jclt.memory import check_memory
from jclt.models import Model
from jclt.shapes import Int, Params

PEER_QUEUE = 4 * 256
"""Features that circuit-tracer traces between two rankings: its command line's batches of 256, four at a time."""


WINDOWS, WORTH_WINDOWS = 4, 1 << 14
"""A target needs no positions after its own: where targets times positions are many, blocks come in so many lengths."""


WINDOW_TILES = 16
"""Sizes that a window's part of all tiles can have."""


def trace_prompts(
    model: Model,
    through: Through,
    params: Params,
    coder: Coder,
    prompts: list[np.ndarray],
    targets: list[Sequence[Target] | None],
    unembedding: Unembedding,
    mesh: Mesh,
    options: Options,
) -> list[PromptRows]:
    """Prompts of one length bucket, split over the mesh; in parts where they take too much memory together."""
    ours, config = options.conventions == "jclt", coder.config
    by_prompt, covered = NamedSharding(mesh, P("prompts")), config.covered
    length = min(length_bucket(max(map(len, prompts))), model.config.context)
    count = -(-size_for(len(prompts)) // mesh.size) * mesh.size
    tokens, lengths = np.zeros((count, length), np.int32), np.ones(count, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)

    on_one, itemsize, backend = count // mesh.size, unembedding.table.dtype.itemsize, jax.default_backend()
    passing = pass_bytes(model.config, config, length, itemsize)
    what = f"prompt: the pass over its {max(map(len, prompts))} tokens"
    check_memory(passing * on_one, what, "a shorter prompt would fit")
    silent = silent_positions(model, options)
    found = run_pass(through, params, coder, *jax.device_put((tokens, lengths), by_prompt), silent)
    ends, counts = np.asarray(found.logits)[: len(prompts)], np.asarray(found.counts)
    check_found(model, ends, counts[: len(prompts)])

    groups = groups_of(config)
    tile = tile_of(counts, groups)
    before = tiles_before(counts, groups, tile)
    longest, tiles = size_for(int(counts.sum(axis=2).max()), 16), size_for(int(before[-1]), 4)
    layout = Layout(longest, groups, tiles, tile)
    at_once = embeddings_at_once(backend, longest, len(covered), model.config.width, on_one)
    sources_need = source_bytes(model.config, config, length, layout, at_once, itemsize)
    if len(prompts) > 1 and on_one * (passing + sources_need) > BATCH_BYTES[backend]:
        del found
        parts = [slice(0, len(prompts) // 2), slice(len(prompts) // 2, None)]
        given = (model, through, params, coder)
        return [
            own
            for part in parts
            for own in trace_prompts(*given, prompts[part], targets[part], unembedding, mesh, options)
        ]
    explained = [
        outputs(model, unembedding, len(p), end, own, ours) for p, end, own in zip(prompts, ends, targets, strict=True)
    ]
    of_target = 2 * length * model.config.width + groups * tiles * tile + model.config.layers * length
    on_device = on_one * sources_need, on_one * of_target * itemsize
    check_rows(model, config, counts[: len(prompts)], explained, options, itemsize, *on_device)

    active, sources = gather_sources(coder, found, layout)
    found = found.without_features()
    others = jax.device_put(target_arrays(explained, count, ends.dtype), by_prompt)
    skips = skips_of(coder, model.config.layers)
    fixed = trace_embeddings(through, covered, ours, at_once, params, skips, found, active, others)
    held = found.held
    del found
    entries, made = on_host(model, coder, layout, prompts, explained, active, fixed, options)
    if not bool(jnp.isfinite(sources.errors).all()):
        raise UserError("coder: what its active features write is not finite, expected weights without NaN or infinity")
    nothing = active.valid[0].size + others.layers.shape[1] - 1

    def trace(wanted: list[Int[np.ndarray, "_"]]) -> None:
        """Computes the edges into each prompt's targets, given by number."""
        flying: list[tuple[list[np.ndarray], Edges]] = []

        def land() -> None:
            numbers, edges = flying.pop(0)
            for own, some, *parts in zip(made, numbers, *map(np.asarray, edges), strict=False):
                own.record(some, *parts)

        rows = GRADIENT[backend] // (count * model.config.width)
        for stop, size, joined, numbers in windows(made, wanted, length, rows):
            step = -(-tiles // WINDOW_TILES)
            of_window = min(-(-int(before[stop - 1]) // step) * step, tiles)
            within = layout._replace(tiles=of_window)
            most = blocks_of_call(
                backend, stop, model.config.width, model.config.layers, within, size, on_one, itemsize
            )
            blocks = -(-max(map(len, numbers)) // size)
            for first in range(0, blocks, most):
                some = [own[first * size : (first + most) * size] for own in numbers]
                held_blocks = min(1 << (min(blocks - first, most) - 1).bit_length(), most)
                chosen = np.full((count, held_blocks * size), nothing)
                for row, own in enumerate(some):
                    chosen[row, : len(own)] = entries[row][own]
                placed = jax.device_put(chosen.reshape(count, -1, size), by_prompt)
                which = (jnp.asarray(np.clip(joined - first, 0, held_blocks)), active, others, placed)
                start = min(silent, stop - 1)
                edges = trace_blocks(through, config, start, stop, of_window, params, held, skips, sources, *which)
                flying.append((some, edges))
                if len(flying) > IN_FLIGHT:
                    land()
        while flying:
            land()

    trace([own.first() for own in made])
    while sum(map(len, wanted := [own.next() for own in made])):
        trace(wanted)
    return made


def check_found(model: Model, logits: np.ndarray, counts: np.ndarray) -> None:
    if not np.isfinite(logits).all():
        raise UserError(f"model {model.name}: its logits are not finite, expected weights without NaN or infinity")
    if not counts.any(axis=(1, 2)).all():
        raise UserError("prompt: no feature of the coder is active on it, expected at least one")


def target_arrays(explained: list[Outputs], count: int, dtype: Any) -> Targets:
    """All prompts' outputs in arrays of one shape, longer than any of them: the last entry is a target of nothing."""
    most = size_for(max(len(own.tokens) for own in explained) + 1, 16)
    width = explained[0].vectors.shape[1]
    layers, positions = np.zeros((count, most), np.int64), np.zeros((count, most), np.int64)
    vectors = np.zeros((count, most, width), dtype)
    for row, own in enumerate(explained):
        size = len(own.tokens)
        layers[row, :size], positions[row, :size], vectors[row, :size] = own.layers, own.positions, own.vectors
    return Targets(layers, positions, vectors)  # type: ignore[arg-type]


def on_host(
    model: Model,
    coder: Coder,
    layout: Layout,
    prompts: list[np.ndarray],
    explained: list[Outputs],
    active: Active,
    fixed: Fixed,
    options: Options,
) -> tuple[list[Int[np.ndarray, "_"]], list[PromptRows]]:
    """For each prompt the place of its targets among `all_targets`, and what the host keeps of it."""
    valids, places, numbers, values, slots = (np.asarray(x) for x in active[:5])
    fixed = jax.tree.map(np.asarray, fixed)
    queue = None if options.conventions == "jclt" else PEER_QUEUE
    entries, made = [], []
    for row, (tokens, own) in enumerate(zip(prompts, explained, strict=True)):
        valid = valids[row]
        layers = np.broadcast_to(np.array(coder.config.covered)[:, None], valid.shape)[valid]
        features = np.stack([layers, places[row][valid], numbers[row][valid]], axis=1).astype(np.int64)
        at = np.append(np.flatnonzero(valid), valid.size + np.arange(len(own.tokens)))
        mine: Fixed = jax.tree.map(lambda x, row=row: x[row], fixed)
        slot = np.stack(np.unravel_index(slots[row][valid], (layout.groups, layout.tiles, layout.tile)))
        lists = (tokens, features, values[row][valid], slot)
        limits = (options.max_features, options.tolerance, queue)
        made.append(PromptRows(*lists, own, mine, at, model.config.layers, *limits))
        entries.append(at)
    return entries, made


def windows(
    made: list[PromptRows], wanted: list[Int[np.ndarray, "_"]], length: int, rows: int
) -> Iterator[tuple[int, int, Int[np.ndarray, "levels"], list[Int[np.ndarray, "_"]]]]:
    """Parts each prompt's targets by position, and orders each part from high layers to low.

    Gives the end of the positions, the size of a block, how many blocks hold targets of each layer or a higher one, and
    the targets of each prompt.
    """
    parts = WINDOWS if max(map(len, wanted)) * length >= WORTH_WINDOWS else 1
    starts = sorted({-(-length * part // parts) for part in range(parts)})
    for start, stop in zip(starts, [*starts[1:], length], strict=True):
        lists = []
        for own, some in zip(made, wanted, strict=True):
            position, layer = own.target_positions[some], own.target_layers[some]
            within = (position >= start) & (position < stop)
            lists.append(some[within][np.argsort(-layer[within], kind="stable")])
        most = max(map(len, lists))
        size = min(max(16, rows // stop), BLOCK[jax.default_backend()]) if most > 16 else 16
        levels = np.arange(made[0].layers + 1)
        at_least = [
            (own.target_layers[some][:, None] >= levels).sum(axis=0) for own, some in zip(made, lists, strict=True)
        ]
        if most:
            yield stop, size, -(-np.max(at_least, axis=0) // size), lists
