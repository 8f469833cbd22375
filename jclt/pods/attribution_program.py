"""What attribution graphs take on a slice: the memory of a chip, and the seconds of a typical prompt.

Each chip traces prompts of its own, with the whole model in its memory. The coder lies on one chip, or is split over
the slice; then all chips together encode the prompts of all chips, and each chip gets the rows of its own prompt's
features. Which features these are is drawn at random here. Programs are compiled for one chip, those of a split coder
for the slice. Of the loops whose rounds depend on the prompt the bodies are compiled (`sweep_bodies.py`), and counted
for a prompt with evenly spread features (`typical_prompt.py`). What the host does meanwhile, and what travels to it, is
not counted.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jclt.attribution.active import encode_layer, list_nonzero, take_encoder_rows
from jclt.attribution.calls import Batch, Setup, arrange_columns
from jclt.attribution.embeddings import trace_embeddings
from jclt.attribution.local import LocalModel, Weights
from jclt.attribution.options import Options
from jclt.attribution.prompts import stack_outputs
from jclt.attribution.sizes import choose_embeddings_at_once, list_stops, round_up
from jclt.attribution.sweep.bases import find_errors, find_slots, put_rows
from jclt.attribution.sweep.columns import push_sources
from jclt.attribution.sweep.folding import fold_weights, writes_through_norm
from jclt.attribution.sweep.nodes import PromptNodes, fold_models, fold_sources
from jclt.attribution.targets import Unembedding
from jclt.attribution.true_pass import run_true_pass, stack_biases, stack_skips, widen_outside_layers
from jclt.coders import CoderConfig, SparseCoder, abstract_coder
from jclt.errors import UserError
from jclt.kernels.take_rows import count_most_rows, take_from_shards
from jclt.mesh import FEATURES_AXIS, make_mesh
from jclt.models import ModelConfig, abstract_params
from jclt.numerics import Precision
from jclt.pods.chips import find_chip, make_network
from jclt.pods.graph_steps import Shapes, Step, count_bytes, measure_steps
from jclt.pods.report import GRAPH_PRECISIONS, Report
from jclt.pods.sweep_bodies import list_bodies, list_push_bodies
from jclt.pods.typical_prompt import Prompt, count_trips, draw_features, list_rows, make_prompt
from jclt.training.config import TrainConfig

ACTIVE_PER_TOKEN = 100.0
"""Active features per token over all layers, as published coders have, where the user names no number."""
STORED_TYPE = jnp.bfloat16
"""In which published models and coders are stored. Their layers are widened to float32 as they are computed."""


def plan_graphs(
    config: TrainConfig, model: ModelConfig, topology: str, devices: list[Any], length: int, active: float
) -> Report:
    """The plan for prompts of this length; `config` is complete for the model."""
    if not 1 <= length <= model.context:
        raise UserError(f"prompt length {length}: expected from 1 to {model.context}, the model's context")
    coder, active, limit = use_inference_form(config.coder), active or ACTIVE_PER_TOKEN, find_chip(topology).memory
    if active * length < 1:
        raise UserError(f"active features a token {active:g}: expected at least one in {length} tokens")
    setup = describe_setup(coder, model, devices[0])
    prompt = make_prompt(setup, length, active, "tpu")
    steps, batch = list_gathering(setup, prompt)
    network, model_bytes = make_network(topology, devices[:1]), count_bytes(setup.weights, setup.biases, setup.folded)
    gathering = measure_steps(steps, network)
    sweeps = {precision: measure_steps(list_sweep(batch, prompt, precision), network) for precision in GRAPH_PRECISIONS}
    prompt_bytes = max(cost.peak for cost in (gathering, *sweeps.values()))
    report: Report = {
        "prompt_length": length,
        "active": active,
        "features": len(batch.rows[0].features),
        "rows": batch.rows[0].limit,
        "cut": batch.rows[0].cut,
        "chips": len(devices),
        "limit": limit,
        "model": model_bytes,
        "prompt": prompt_bytes,
        "fits": model_bytes + prompt_bytes <= limit,
        "places": [],
    }
    if not report["fits"]:
        return report
    for count in dict.fromkeys((1, len(devices))):
        mesh = make_mesh(1, count, devices[:count]) if count > 1 else None
        weights = abstract_coder(coder, mesh, STORED_TYPE)
        placed = weights if mesh else Shapes(setup.mesh).place(weights)
        parts, coder_bytes = dict[str, float](), count_bytes(placed)
        total = model_bytes + coder_bytes + prompt_bytes
        if total <= limit:
            reading_steps = list_coder_steps(setup, prompt, placed, mesh, max(step.kept for step in steps))
            reading = measure_steps(reading_steps, make_network(topology, devices[:count]))
            parts, total = reading.parts, max(total, model_bytes + coder_bytes + reading.peak)
        report["places"].append(
            {"chips": count, "coder": coder_bytes, "total": total, "fits": total <= limit, "parts": parts}
        )
    return report | {name: gathering.parts | cost.parts for name, cost in sweeps.items()}


def use_inference_form(config: CoderConfig) -> CoderConfig:
    """The coder as it is saved: with thresholds where training uses a budget per batch."""
    return replace(config, activation=config.rule, k=config.k if config.rule == "topk" else None)


def describe_setup(coder_config: CoderConfig, config: ModelConfig, device: Any) -> Setup:
    """What all prompts of a chip share, with shapes in place of arrays."""
    mesh = jax.make_mesh((1,), ("prompts",), axis_types=(AxisType.Auto,), devices=[device])
    shapes = Shapes(mesh)
    local = LocalModel(model=config, reads=coder_config.reads, writes=coder_config.writes)
    coder = shapes.place(abstract_coder(coder_config, dtype=STORED_TYPE))
    params = shapes.evaluate(widen_outside_layers, config, abstract_params(config, dtype=STORED_TYPE), static=1)
    skips = shapes.evaluate(partial(stack_skips, layers=config.layers), coder, static=0)
    weights = Weights(params, skips)
    model: Any = SimpleNamespace(config=config)  # programs get its parameters with the weights
    return Setup(
        model=model,
        local=local,
        weights=weights,
        folded=shapes.evaluate(fold_weights, local, weights, static=1),
        biases=shapes.evaluate(partial(stack_biases, layers=config.layers), coder, static=0),
        coder=coder,
        unembedding=Unembedding(params["token_embedding"], np.zeros(config.width)),
        mesh=mesh,
        options=Options(),
    )


def list_gathering(setup: Setup, prompt: Prompt) -> tuple[list[Step], Batch]:
    """The programs that run the model on a chip's own prompt and gather its nodes, and these nodes."""
    local, layout, shapes = setup.local, prompt.layout, Shapes(setup.mesh)
    (_, covered, length), width = prompt.counts.shape, local.model.width
    numbers = shapes.numbers
    run = (local, setup.weights, setup.biases, numbers(1, length), numbers(1))
    true_pass = shapes.evaluate(partial(run_true_pass, silent=prompt.start), *run, static=1)
    features, plan = shapes.place(prompt.features), shapes.place(prompt.tiles)
    outputs = shapes.place(stack_outputs([prompt.outputs], 1, np.float32))
    tiles = shapes.array(1, layout.kept_tiles * layout.tile_size, width)
    rows = shapes.array(1, layout.list_length, max(map(setup.coder.config.reach, range(covered))), width)
    slots, counts = numbers(1, covered, layout.list_length), shapes.place(prompt.counts)
    find = (layout, plan, tiles, true_pass.unexplained)
    sources = shapes.evaluate(find_errors, *find, static=1)
    rest = true_pass.drop_unexplained()
    at_once = choose_embeddings_at_once("tpu", local.model, length, layout, 1, setup.itemsize)
    embed = (local, layout.layers, setup.uses_our_conventions, at_once, setup.weights, rest, features, outputs)
    edges = shapes.evaluate(trace_embeddings, *embed, static=4)
    fold = (local, layout, setup.weights, rest.frozen)
    folded, targets, _ = shapes.evaluate(fold_models, *fold, features, outputs, static=2)
    nodes, folding = PromptNodes(folded, sources, targets), count_bytes(rest, features, sources, edges)
    gathered = count_bytes(true_pass, features, tiles, rows)
    put = put_rows.lower(layout, tiles, plan.starts, rows, features.activations, slots, numbers())
    steps = [
        Step("true pass", run_true_pass.lower(*run, silent=prompt.start), 0),
        Step("gather", find_slots.lower(layout, plan, features, counts), gathered),
        Step("gather", put, gathered, {-1: covered}),
        Step("gather", find_errors.lower(*find), gathered),
        Step("embeddings", trace_embeddings.lower(*embed), count_bytes(rest, features, sources)),
        Step("gather", fold_models.lower(*fold, features, outputs), folding),
    ]
    if writes_through_norm(local):
        steps.append(Step("gather", fold_sources.lower(*fold, sources), folding))
    prompt_rows = list_rows(setup, prompt, edges)
    return steps, Batch(setup, layout, nodes, [prompt_rows], 1, prompt.start, list_stops(length - prompt.start))


def list_sweep(batch: Batch, prompt: Prompt, precision: Precision) -> Iterator[Step]:
    """The loops that trace a chip's own prompt."""
    setup = batch.setup._replace(local=batch.setup.local._replace(precision=precision))
    batch, shapes, kept = batch._replace(setup=setup), Shapes(setup.mesh), count_bytes(batch.nodes)
    kept += batch.setup.itemsize * sum(x.size for x in batch.rows[0].embeddings)
    arranged = arrange_columns(batch, "tpu")
    if arranged is not None:
        program = (setup.local, batch.layout, batch.start, batch.stops, setup.mesh)
        arrays = setup.folded, batch.nodes, *shapes.place(arranged)
        columns, low_edges = shapes.evaluate(push_sources, *program, *arrays, static=5)
        batch, kept = batch._replace(columns=columns), kept + count_bytes(columns, low_edges)
        yield from list_push_bodies(shapes, batch, *arranged, kept)
    for trips in count_trips(batch, prompt.tiles, None if arranged is None else arranged[0], "tpu"):
        yield from list_bodies(shapes, batch, trips, kept)


def list_coder_steps(setup: Setup, prompt: Prompt, coder: SparseCoder, mesh: Mesh | None, kept: int) -> Iterator[Step]:
    """What is computed where the coder lies; over a mesh for the prompts of all chips at once."""
    (_, covered, length), width, prompts = prompt.counts.shape, setup.local.model.width, mesh.size if mesh else 1
    shapes = Shapes(mesh or setup.mesh)
    with jax.set_mesh(mesh) if mesh else nullcontext():
        encoder: Any = coder.load_encoder(0)
        encode = (encoder, shapes.array(prompts, length, width), shapes.array(prompts, length, dtype=jnp.bool_))
        yield Step("encode", encode_layer.lower(*encode), kept, {-1: covered})
        activations = Shapes(shapes.mesh, P(None, None, FEATURES_AXIS) if mesh else P())
        most = -(-int(prompt.counts.sum(axis=2).max()) // prompts)  # on each chip
        listed = list_nonzero.lower(activations.array(prompts, length, coder.config.features), round_up(most, 16))
        yield Step("encode", listed, kept, {-1: covered})
        drawn = draw_features(prompt, coder.config.features, prompts)
        numbers, sent = shapes.numbers(*drawn.shape), count_most_rows(drawn, coder.config.features, prompts)
        yield Step("read rows", take_encoder_rows.lower(encoder, numbers, sent), kept, {-1: covered})
        middle = coder.layers[covered // 2]  # its features write to as many layers as those of a layer do on average
        table = middle.encoder if middle.decoder is None else middle.decoder
        yield Step("read rows", take_from_shards.lower(table, numbers, sent), kept, {-1: covered})
