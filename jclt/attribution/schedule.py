"""Schedules steps 1 to 4 for prompts of similar length: gathers their nodes, and traces targets in rounds."""

import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jclt.attribution.active import ActiveFeatures, find_active, gather_features
from jclt.attribution.calls import Batch, Setup, push_columns, trace_rows
from jclt.attribution.embeddings import EmbeddingEdges, trace_embeddings
from jclt.attribution.local import Reads
from jclt.attribution.options import count_silent_positions
from jclt.attribution.prompts import pad_prompts, stack_outputs
from jclt.attribution.ranking import Limits, PromptRows
from jclt.attribution.scores import Chosen, choose_features, score_features
from jclt.attribution.sizes import (
    BATCH_BYTES,
    SHORTER,
    DeviceBytes,
    check_rows,
    choose_embeddings_at_once,
    choose_layout,
    estimate_prompt_bytes,
    estimate_source_bytes,
    estimate_target_bytes,
    list_stops,
)
from jclt.attribution.sweep.bases import FeatureNodes, gather_sources
from jclt.attribution.sweep.nodes import PromptNodes, TargetNodes, fold_nodes
from jclt.attribution.sweep.tiles import Layout, plan_tiles
from jclt.attribution.targets import Outputs, Target, build_outputs
from jclt.attribution.true_pass import TruePass, find_positions_with_nodes, run_true_pass
from jclt.attribution.vectors import NO_VECTORS, ChosenVectors, choose_vectors
from jclt.errors import UserError
from jclt.memory import check_memory
from jclt.shapes import Array, Bool, Int

log = logging.getLogger(__name__)

PEER_ROUND_SIZE = 4 * 256
"""Features that circuit-tracer traces between two rankings: its command line's batches of 256, four at a time."""


def trace_prompts(setup: Setup, prompts: list[np.ndarray], targets: list[Sequence[Target] | None]) -> list[PromptRows]:
    """Traces prompts of one length bucket, split over the mesh; as two halves where they take too much memory."""
    model, config, backend = setup.model, setup.coder.config, jax.default_backend()
    log.debug("1 true pass: %d prompts of up to %d tokens", len(prompts), max(map(len, prompts)))
    tokens, lengths = pad_prompts(prompts, model.config.context, setup.shards)
    (count, length), itemsize = tokens.shape, setup.itemsize
    per_device = count // setup.shards
    pass_bytes = estimate_prompt_bytes(model.config, config, setup.options, setup.shards, length, itemsize)
    check_memory(pass_bytes * per_device, f"prompt: the pass over its {max(map(len, prompts))} tokens", SHORTER)
    arrays = jax.device_put((tokens, lengths), setup.by_prompt)
    silent = max(count_silent_positions(model, setup.options), config.first_position)
    has_vectors = setup.options.has_vectors
    true_pass = run_true_pass(setup.local, setup.weights, setup.biases, *arrays, silent, has_vectors)
    outputs = find_outputs(setup, true_pass, prompts, targets)
    output_nodes = jax.device_put(stack_outputs(outputs, count, true_pass.logits.dtype), setup.by_prompt)
    log.debug("2 gather sources: encode %d layers", len(config.covered))
    has_nodes = np.asarray(find_positions_with_nodes(jnp.asarray(lengths), length, silent))
    chosen, vectors = choose_nodes(setup, true_pass, has_nodes, outputs, output_nodes)
    of_chosen = None if chosen is None else chosen.features
    active = find_active(setup.coder, true_pass.reads, has_nodes, setup.by_prompt, of_chosen)
    about = [{} if chosen is None else chosen.describe(prompt) for prompt in range(len(prompts))]
    if vectors is not None:
        about = [of_features | of_vectors for of_features, of_vectors in zip(about, vectors.about, strict=True)]
    del chosen, of_chosen
    counts = active.count_by_position(length)
    if not counts[: len(prompts)].any(axis=(1, 2)).all():
        raise UserError("prompt: no feature of the coder is active on it, expected at least one")

    layout = choose_layout(config, counts, active.length, backend)
    at_once = choose_embeddings_at_once(backend, model.config, length, layout, per_device, itemsize)
    vector_nodes = None if vectors is None else vectors.nodes
    source_bytes = estimate_source_bytes(model.config, config, length, layout, at_once, itemsize, vector_nodes)
    if per_device > 1 and per_device * (pass_bytes + source_bytes) > BATCH_BYTES[backend]:
        del true_pass, active
        halves = slice(0, len(prompts) // 2), slice(len(prompts) // 2, None)
        return [rows for half in halves for rows in trace_prompts(setup, prompts[half], targets[half])]
    target_bytes = estimate_target_bytes(model.config, length, layout, itemsize, vector_nodes)
    on_device = DeviceBytes(sources=per_device * source_bytes, target=per_device * target_bytes)
    most_vectors = 0 if vectors is None else max(len(of_prompt.layers) for of_prompt in vectors.lists)
    check_rows(model, config, counts[: len(prompts)], outputs, setup.options, itemsize, on_device, most_vectors)

    features, slots, nodes, embedding_edges = gather_nodes(
        setup, layout, true_pass, active, counts, output_nodes, vectors, at_once
    )
    del true_pass, active
    rows = make_rows(setup, layout, prompts, about, outputs, features, slots, embedding_edges, vectors)
    del features
    if not bool(jnp.isfinite(nodes.sources.errors).all()):
        raise UserError("coder: what its active features write is not finite, expected weights without NaN or infinity")
    start = min(silent, min(map(len, prompts)) - 1)
    batch = push_columns(Batch(setup, layout, nodes, rows, per_device, start, list_stops(length - start)))
    log.debug("3 trace outputs")
    trace_rows(batch, [prompt_rows.choose_first() for prompt_rows in rows])
    while any(map(len, wanted := [prompt_rows.choose_next() for prompt_rows in rows])):
        log.debug("4 rank and trace features: the next %d", sum(map(len, wanted)))
        trace_rows(batch, wanted)
    return rows


def find_outputs(
    setup: Setup, true_pass: TruePass, prompts: list[np.ndarray], targets: list[Sequence[Target] | None]
) -> list[Outputs]:
    """The outputs of each prompt's graph."""
    model, logits = setup.model, np.asarray(true_pass.logits)[: len(prompts)]
    if not np.isfinite(logits).all():
        raise UserError(f"model {model.name}: its logits are not finite, expected weights without NaN or infinity")
    return [
        build_outputs(model, setup.unembedding, len(prompt), prompt_logits, wanted, setup.uses_our_conventions)
        for prompt, prompt_logits, wanted in zip(prompts, logits, targets, strict=True)
    ]


def choose_nodes(
    setup: Setup,
    true_pass: TruePass,
    has_nodes: Bool[np.ndarray, "B T"],
    outputs: list[Outputs],
    output_nodes: TargetNodes,
) -> tuple[Chosen | None, ChosenVectors | None]:
    """Which active features are nodes; None if all are, by the options or as there are no more. And which heads and
    residual streams; None if none is."""
    config, nodes = setup.coder.config, setup.options.count_nodes(setup.coder.config)
    most = config.features * len(config.covered) * int(has_nodes.sum(axis=1).max())
    takes_all = nodes is None or (isinstance(nodes, int) and most <= nodes)
    if takes_all and not setup.options.has_vectors:
        return None, None
    log.debug("2 gather sources: score the features of %d layers", len(config.covered))
    of_outputs = outputs, output_nodes, setup.by_prompt
    scored = setup.coder, setup.local, setup.weights, true_pass, has_nodes, *of_outputs
    scores, gradients = score_features(*scored, setup.options.has_vectors)
    vectors = None
    if gradients is not None:
        wanted = setup.options.heads, tuple(setup.options.cuts), len(outputs)
        vectors = choose_vectors(gradients, true_pass, has_nodes, *wanted, setup.by_prompt)
    return None if takes_all or nodes is None else choose_features(scores, nodes, len(outputs)), vectors


def gather_nodes(
    setup: Setup,
    layout: Layout,
    true_pass: TruePass,
    active: ActiveFeatures,
    counts: Int[np.ndarray, "B C T"],
    output_nodes: TargetNodes,
    vectors: ChosenVectors | None,
    at_once: int,
) -> tuple[FeatureNodes, Int[Array, "B C n"], PromptNodes, EmbeddingEdges]:
    """Gathers a batch's features, their slots and sources, traces its embeddings, and folds its nodes."""
    log.debug("2 gather sources: %d tiles of %d slots", layout.groups * layout.tiles, layout.tile_size)
    features = gather_features(active, true_pass.reads.dtype, setup.by_prompt)
    plan, on_device = jax.device_put((plan_tiles(counts, layout), counts.astype(int)), setup.by_prompt)
    assert true_pass.unexplained is not None
    unexplained, true_pass = true_pass.unexplained, true_pass.drop_unexplained()
    slots, sources = gather_sources(setup.coder, layout, plan, features, on_device, unexplained, setup.by_prompt)
    log.debug("3 trace embeddings")
    program = (setup.local, layout.layers, setup.uses_our_conventions, at_once)
    vector_nodes = None if vectors is None else vectors.nodes
    embedding_edges = trace_embeddings(*program, setup.weights, true_pass, features, output_nodes, vector_nodes)
    true_reads = Reads(true_pass.reads, true_pass.final, true_pass.heads, true_pass.streams)
    of_vectors = None if vectors is None else (setup.folded, vectors.nodes, true_reads)
    of_prompts = true_pass.frozen, features, output_nodes, sources, of_vectors
    nodes = fold_nodes(setup.local, layout, setup.weights, *of_prompts)
    return features, slots, nodes, embedding_edges


def make_rows(
    setup: Setup,
    layout: Layout,
    prompts: list[np.ndarray],
    about: list[dict[str, Any]],
    outputs: list[Outputs],
    features: FeatureNodes,
    slots: Int[Array, "B C n"],
    embedding_edges: EmbeddingEdges,
    vectors: ChosenVectors | None = None,
) -> list[PromptRows]:
    """For each prompt what the host keeps of it: its nodes, the edges from embeddings, and an empty list of rows."""
    names = ("valid", "positions", "features", "activations")  # vectors stay on the device
    lists = {name: np.asarray(getattr(features, name)) for name in names} | {"slots": np.asarray(slots)}
    embedding_edges = jax.tree.map(np.asarray, embedding_edges)
    round_size = None if setup.uses_our_conventions else PEER_ROUND_SIZE
    all_rows = []
    for row, (tokens, prompt_outputs) in enumerate(zip(prompts, outputs, strict=True)):
        valid = lists["valid"][row]
        layers = np.broadcast_to(np.array(layout.layers)[:, None], valid.shape)
        places = [layers[valid], lists["positions"][row][valid], lists["features"][row][valid]]
        row_slots = lists["slots"][row][valid]
        numbers = [np.flatnonzero(valid), valid.size + np.arange(len(prompt_outputs.tokens))]
        if vectors is not None:
            first = len(embedding_edges.values[row]) - vectors.nodes.total
            numbers.append(first + vectors.number_targets(row))
        prompt_rows = PromptRows(
            tokens=tokens,
            features=np.stack(places, axis=1).astype(np.int64),
            activations=lists["activations"][row][valid],
            slots=np.stack(np.divmod(row_slots, layout.tile_size)),
            outputs=prompt_outputs,
            embedding_edges=jax.tree.map(lambda x, row=row: x[row], embedding_edges),
            padded_numbers=np.concatenate(numbers),
            layers=setup.model.config.layers,
            about=about[row],
            limits=Limits(setup.options.max_features, setup.options.tolerance, round_size),
            vectors=NO_VECTORS if vectors is None else vectors.lists[row],
        )
        all_rows.append(prompt_rows)
    return all_rows
