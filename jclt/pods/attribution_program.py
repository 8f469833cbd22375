"""Whether attribution graphs can be made on a slice: their programs are compiled, for one prompt per chip.

Each chip holds the whole model in float32, since graphs have to be exact, and the first chip the whole coder. No time
is given: it depends on the prompt, as the programs' loops run for as long as there are targets.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jclt.attribution.active import encode_layer, list_nonzero
from jclt.attribution.embeddings import trace_embeddings
from jclt.attribution.local import LocalModel, Weights
from jclt.attribution.sizes import (
    CALLS_IN_FLIGHT,
    choose_block_size,
    choose_blocks_per_call,
    choose_embeddings_at_once,
    count_edges,
    list_stops,
    round_up,
    round_up_length,
)
from jclt.attribution.sweep.bases import FeatureNodes, find_errors, put_rows
from jclt.attribution.sweep.edges import Blocks, trace_blocks
from jclt.attribution.sweep.folding import fold_weights
from jclt.attribution.sweep.nodes import TargetNodes, fold_nodes
from jclt.attribution.sweep.tiles import LARGEST_TILE, SMALLEST_TILE, TILES_AT_ONCE, Layout, TilePlan, count_groups
from jclt.attribution.true_pass import run_true_pass, stack_biases, stack_skips
from jclt.coders import CoderConfig, abstract_coder
from jclt.models import ModelConfig, abstract_params
from jclt.pods.chips import find_chip
from jclt.training.config import TrainConfig

ACTIVE_PER_TOKEN = 100
"""Active features per token over all layers, as published coders have."""
OUTPUTS = 16
"""Outputs that a graph explains."""


class Inputs(NamedTuple):
    """What the programs run on, as shapes with shardings."""

    local: LocalModel
    coder: Any
    params: Any
    mesh: Mesh
    length: int  # of the prompts, one per chip

    def on_all(self, tree: Any) -> Any:
        """Shapes of arrays that every chip holds whole."""
        return place(tree, self.mesh, P())

    def by_prompt(self, tree: Any) -> Any:
        """Shapes of arrays with a leading axis of prompts, one per chip."""
        return place(tree, self.mesh, P("prompts"))


class LoweredProgram(NamedTuple):
    """A program, before it is compiled, and what else is in a chip's memory while it runs."""

    lowered: jax.stages.Lowered
    kept_bytes: int = 0  # results of earlier programs, with the arguments of this one
    waiting_results: int = 0  # results of its earlier calls that wait for the host


def plan_graphs(
    config: TrainConfig, model: ModelConfig, topology: str, devices: list[Any], length: int
) -> dict[str, Any]:
    """The memory per chip of the programs for prompts of this length; `config` is complete for the model."""
    limit, length = find_chip(topology).memory, round_up_length(length)
    mesh = jax.make_mesh((len(devices),), ("prompts",), axis_types=(AxisType.Auto,), devices=devices)
    coder_config = use_inference_form(config.coder)
    weights = place((abstract_coder(coder_config), abstract_params(model)), mesh, P())
    weight_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weights))
    report = {"prompt_length": length, "given": weight_bytes, "limit": limit}
    if weight_bytes > limit:
        return report | {"fits": False, "total": weight_bytes}
    local = LocalModel(model=model, reads=coder_config.reads, writes=coder_config.writes)
    coder, params = weights
    inputs = Inputs(local, coder, params, mesh, length)
    total = weight_bytes + max(map(measure_peak, lower_programs(inputs, coder_config)))
    return report | {"fits": total <= limit, "total": total}


def place(tree: Any, mesh: Mesh, spec: P) -> Any:
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def use_inference_form(config: CoderConfig) -> CoderConfig:
    """The coder as it is saved: with thresholds where training uses a budget per batch."""
    return replace(config, activation=config.rule, k=config.k if config.rule == "topk" else None)


def expect_layout(config: CoderConfig, length: int) -> Layout:
    """The layout for prompts with `ACTIVE_PER_TOKEN` active features at each token."""
    layers, groups = len(config.covered), count_groups(config)
    in_layer = round_up(-(-ACTIVE_PER_TOKEN // layers))
    tile_size = LARGEST_TILE if groups == 1 else min(max(in_layer, SMALLEST_TILE), LARGEST_TILE)
    at_position = -(-ACTIVE_PER_TOKEN // groups // tile_size)
    return Layout(
        layers=config.covered,
        list_length=round_up(2 * ACTIVE_PER_TOKEN * length // layers, 64),
        groups=groups,
        tiles=TILES_AT_ONCE["tpu"] * round_up(-(-length * at_position // TILES_AT_ONCE["tpu"])),
        tile_size=tile_size,
        at_position=round_up(at_position),
        tiles_at_once=TILES_AT_ONCE["tpu"],
    )


def lower_programs(inputs: Inputs, config: CoderConfig) -> Iterator[LoweredProgram]:
    """The programs of one graph, in the order in which they run."""
    local, count, length, model = inputs.local, inputs.mesh.size, inputs.length, inputs.local.model
    layout = expect_layout(config, length)
    tokens = inputs.by_prompt(jax.ShapeDtypeStruct((count, length), jnp.int32))
    lengths = inputs.by_prompt(jax.ShapeDtypeStruct((count,), jnp.int32))
    skips = inputs.on_all(jax.eval_shape(partial(stack_skips, layers=model.layers), inputs.coder))
    biases = inputs.on_all(jax.eval_shape(partial(stack_biases, layers=model.layers), inputs.coder))
    weights = Weights(inputs.params, skips)
    run = (local, weights, biases, tokens, lengths, 0)
    yield LoweredProgram(run_true_pass.lower(*run))
    true_pass = inputs.by_prompt(evaluate_shape(run_true_pass, *run, static=(0, 5)))

    encode = lower_encoder(inputs, layout.list_length)
    yield from (LoweredProgram(program, count_chip_bytes(true_pass)) for program in encode)

    def numbers(*shape: int) -> Any:
        return inputs.by_prompt(jax.ShapeDtypeStruct((count, *shape), jnp.int32))

    nodes = inputs.by_prompt(expect_nodes(config, layout, count))
    in_tiles = numbers(layout.groups, layout.tiles)
    plan = TilePlan(numbers(layout.groups, length, layout.at_position), in_tiles, in_tiles)
    in_tiles_of_layer = len(layout.layers), layout.tiles * layout.tile_size, model.width
    tiles = inputs.by_prompt(jax.ShapeDtypeStruct((count, *in_tiles_of_layer), jnp.float32))
    reach = max(map(config.reach, range(len(layout.layers))))
    rows = inputs.by_prompt(jax.ShapeDtypeStruct((count, layout.list_length, reach, model.width), jnp.float32))
    index = jax.ShapeDtypeStruct((), jnp.int32)
    put = (layout, tiles, rows, nodes.activations, numbers(len(layout.layers), layout.list_length), index)
    yield LoweredProgram(put_rows.lower(*put), count_chip_bytes(true_pass, nodes))
    find = (layout, plan, tiles, true_pass.unexplained)
    yield LoweredProgram(find_errors.lower(*find), count_chip_bytes(true_pass, nodes))
    sources = inputs.by_prompt(evaluate_shape(find_errors, *find, static=(0,)))
    true_pass, features = true_pass.drop_unexplained(), nodes

    vectors = inputs.by_prompt(jax.ShapeDtypeStruct((count, OUTPUTS, model.width), jnp.float32))
    outputs = TargetNodes(numbers(OUTPUTS), numbers(OUTPUTS), vectors)  # type: ignore[arg-type]
    at_once = choose_embeddings_at_once("tpu", layout, model.width, 1, 4)
    embed = (local, layout.layers, True, at_once, weights, true_pass, features, outputs)
    yield LoweredProgram(trace_embeddings.lower(*embed), count_chip_bytes(true_pass, features, sources))
    embedding_edges = inputs.by_prompt(evaluate_shape(trace_embeddings, *embed, static=(0, 1, 2, 3)))

    fold = (local, layout, weights, true_pass.frozen, features, outputs, sources)
    yield LoweredProgram(fold_nodes.lower(*fold), count_chip_bytes(features, sources, embedding_edges))
    prompts = inputs.by_prompt(evaluate_shape(fold_nodes, *fold, static=(0, 1)))
    folded = inputs.on_all(evaluate_shape(fold_weights, local, weights, static=(0,)))

    targets, stops = ACTIVE_PER_TOKEN * length, list_stops(length)
    size = choose_block_size("tpu", targets, length, model.width)
    target_bytes = 4 * count_edges(model, length, layout)
    most = choose_blocks_per_call("tpu", -(-targets // size), target_bytes, size)
    of_blocks = inputs.by_prompt(jax.ShapeDtypeStruct((count * most,), jnp.int32))
    chosen = inputs.by_prompt(jax.ShapeDtypeStruct((count * most, size), jnp.int32))
    blocks = Blocks(numbers(), of_blocks, chosen, of_blocks, of_blocks)  # type: ignore[arg-type]
    traced = trace_blocks.lower(local, layout, 0, stops, inputs.mesh, folded, prompts, None, blocks)
    yield LoweredProgram(traced, count_chip_bytes(folded, prompts, features, embedding_edges), CALLS_IN_FLIGHT)


def lower_encoder(inputs: Inputs, listed: int) -> Iterator[jax.stages.Lowered]:
    """The programs that encode one layer and list its features, for the prompt of one chip at a time."""
    width = inputs.local.model.width
    encoder = inputs.on_all(jax.eval_shape(lambda coder: coder.load_encoder(0), inputs.coder))
    x = inputs.on_all(jax.ShapeDtypeStruct((1, inputs.length, width), jnp.float32))
    has_nodes = inputs.on_all(jax.ShapeDtypeStruct((1, inputs.length), jnp.bool_))
    yield encode_layer.lower(encoder, x, has_nodes)
    activations, _ = inputs.on_all(jax.eval_shape(encode_layer, encoder, x, has_nodes))
    yield list_nonzero.lower(activations, listed)


def expect_nodes(config: CoderConfig, layout: Layout, count: int) -> FeatureNodes:
    """The shapes of so many prompts' nodes."""

    def declare(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct((count, *shape), dtype)

    listed, layers = layout.list_length, len(layout.layers)
    places = declare(layers, listed, dtype=jnp.int32)
    return FeatureNodes(
        valid=declare(layers, listed, dtype=jnp.bool_),
        positions=places,
        features=places,
        activations=declare(layers, listed),
        encoders=declare(layers, listed, config.size),
        biases=declare(layers, listed),
    )


def evaluate_shape(function: Callable[..., Any], *arguments: Any, static: tuple[int, ...]) -> Any:
    """The shapes of a function's results; the arguments with these numbers are no arrays."""
    arrays = [x for number, x in enumerate(arguments) if number not in static]

    def call(*arrays: Any) -> Any:
        remaining = iter(arrays)
        return function(*(x if number in static else next(remaining) for number, x in enumerate(arguments)))

    return jax.eval_shape(call, *arrays)


def count_chip_bytes(*trees: Any) -> int:
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(trees))


def measure_peak(program: LoweredProgram) -> float:
    """Bytes per chip while the program runs, without the weights."""
    used: Any = program.lowered.compile().memory_analysis()
    # The program's arguments are among what is kept, or are weights.
    temporary = used.peak_memory_in_bytes - used.argument_size_in_bytes + used.generated_code_size_in_bytes
    return program.kept_bytes + temporary + program.waiting_results * used.output_size_in_bytes
