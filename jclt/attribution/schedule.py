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
from jclt.attribution.options import count_silent_positions
from jclt.attribution.prompts import pad_prompts, stack_outputs
from jclt.attribution.ranking import Limits, PromptRows
from jclt.attribution.scores import Chosen, choose_features, score_features
from jclt.attribution.sizes import (
    BATCH_BYTES,
    DeviceBytes,
    check_rows,
    choose_embeddings_at_once,
    choose_layout,
    estimate_pass_bytes,
    estimate_score_bytes,
    estimate_source_bytes,
    estimate_target_bytes,
    list_stops,
)
from jclt.attribution.sweep.bases import FeatureNodes, gather_sources
from jclt.attribution.sweep.nodes import PromptNodes, TargetNodes, fold_nodes
from jclt.attribution.sweep.tiles import Layout, plan_tiles
from jclt.attribution.targets import Outputs, Target, build_outputs
from jclt.attribution.true_pass import TruePass, find_positions_with_nodes, run_true_pass
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
    pass_bytes = estimate_pass_bytes(model.config, config, length, itemsize)
    if setup.options.count_nodes(config) is not None:
        pass_bytes += setup.shards * estimate_score_bytes(model.config, config, length, itemsize)
    what = f"prompt: the pass over its {max(map(len, prompts))} tokens"
    check_memory(pass_bytes * per_device, what, "a shorter prompt would fit")
    arrays = jax.device_put((tokens, lengths), setup.by_prompt)
    silent = max(count_silent_positions(model, setup.options), config.first_position)
    true_pass = run_true_pass(setup.local, setup.weights, setup.biases, *arrays, silent)
    outputs = find_outputs(setup, true_pass, prompts, targets)
    output_nodes = jax.device_put(stack_outputs(outputs, count, true_pass.logits.dtype), setup.by_prompt)
    log.debug("2 gather sources: encode %d layers", len(config.covered))
    has_nodes = np.asarray(find_positions_with_nodes(jnp.asarray(lengths), length, silent))
    chosen = choose_nodes(setup, true_pass, has_nodes, outputs, output_nodes)
    of_chosen = None if chosen is None else chosen.features
    active = find_active(setup.coder, true_pass.reads, has_nodes, setup.by_prompt, of_chosen)
    about = [{} if chosen is None else chosen.describe(prompt) for prompt in range(len(prompts))]
    del chosen, of_chosen
    counts = active.count_by_position(length)
    if not counts[: len(prompts)].any(axis=(1, 2)).all():
        raise UserError("prompt: no feature of the coder is active on it, expected at least one")

    layout = choose_layout(config, counts, active.length, backend)
    at_once = choose_embeddings_at_once(backend, layout, model.config.width, per_device, itemsize)
    source_bytes = estimate_source_bytes(model.config, config, length, layout, at_once, itemsize)
    if per_device > 1 and per_device * (pass_bytes + source_bytes) > BATCH_BYTES[backend]:
        del true_pass, active
        halves = slice(0, len(prompts) // 2), slice(len(prompts) // 2, None)
        return [rows for half in halves for rows in trace_prompts(setup, prompts[half], targets[half])]
    target_bytes = estimate_target_bytes(model.config, length, layout, itemsize)
    on_device = DeviceBytes(sources=per_device * source_bytes, target=per_device * target_bytes)
    check_rows(model, config, counts[: len(prompts)], outputs, setup.options, itemsize, on_device)

    features, slots, nodes, embedding_edges = gather_nodes(
        setup, layout, true_pass, active, counts, output_nodes, at_once
    )
    del true_pass, active
    rows = make_rows(setup, layout, prompts, about, outputs, features, slots, embedding_edges)
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
) -> Chosen | None:
    """Which active features are nodes; None if all are, by the options or as there are no more."""
    config, nodes = setup.coder.config, setup.options.count_nodes(setup.coder.config)
    most = config.features * len(config.covered) * int(has_nodes.sum(axis=1).max())
    if nodes is None or (isinstance(nodes, int) and most <= nodes):
        return None
    log.debug("2 gather sources: score the features of %d layers", len(config.covered))
    of_outputs = outputs, output_nodes, setup.by_prompt
    scores = score_features(setup.coder, setup.local, setup.weights, true_pass, has_nodes, *of_outputs)
    return choose_features(scores, nodes, len(outputs))


def gather_nodes(
    setup: Setup,
    layout: Layout,
    true_pass: TruePass,
    active: ActiveFeatures,
    counts: Int[np.ndarray, "B C T"],
    output_nodes: TargetNodes,
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
    embedding_edges = trace_embeddings(*program, setup.weights, true_pass, features, output_nodes)
    nodes = fold_nodes(setup.local, layout, setup.weights, true_pass.frozen, features, output_nodes, sources)
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
        prompt_rows = PromptRows(
            tokens=tokens,
            features=np.stack(places, axis=1).astype(np.int64),
            activations=lists["activations"][row][valid],
            slots=np.stack(np.divmod(row_slots, layout.tile_size)),
            outputs=prompt_outputs,
            embedding_edges=jax.tree.map(lambda x, row=row: x[row], embedding_edges),
            padded_numbers=np.append(np.flatnonzero(valid), valid.size + np.arange(len(prompt_outputs.tokens))),
            layers=setup.model.config.layers,
            about=about[row],
            limits=Limits(setup.options.max_features, setup.options.tolerance, round_size),
        )
        all_rows.append(prompt_rows)
    return all_rows
