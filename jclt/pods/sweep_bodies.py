"""The bodies of the loops that trace a prompt, each lowered as a program of its own, and how often each runs.

These loops run for as long as a prompt has targets and sources, which the compiler does not know. The whole programs
would take it minutes, as they have a branch for each number of positions.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jclt.attribution.calls import Batch
from jclt.attribution.local import LocalModel
from jclt.attribution.sizes import CALLS_IN_FLIGHT
from jclt.attribution.sweep.columns import (
    LowTargets,
    SourceBlocks,
    meet_columns,
    push_first,
    push_forward,
    read_targets,
    take_writes,
)
from jclt.attribution.sweep.edges import Edges, LayerStep, add_shares, make_edges, pull_back, pull_first
from jclt.attribution.sweep.folding import FoldedWeights
from jclt.attribution.sweep.nodes import PromptNodes, Sweep, TargetNodes, begin_gradients
from jclt.attribution.sweep.tiles import Layout
from jclt.pods.graph_steps import Shapes, Step, count_bytes
from jclt.pods.typical_prompt import Trips, count_push_trips
from jclt.shapes import Array, Bool, Float, Int

Settings = tuple[LocalModel, Layout, int, tuple[int, ...]]
"""The first fields of a `Sweep`. With one number of positions there is one branch."""


@partial(jax.jit, static_argnames=("settings", "is_first"), donate_argnames=("stream",))
def pull_block(
    settings: Settings,
    is_first: bool,
    weights: FoldedWeights,
    prompts: PromptNodes,
    targets: TargetNodes,
    layer: Int[Array, ""],
    stream: Float[Array, "T R D"],
) -> Float[Array, "T R D"]:
    """Carries a block of targets through one layer."""
    sweep, zero = Sweep(*settings, weights, prompts), jnp.zeros_like(layer)
    folded = sweep.take_layer(zero, layer)
    if is_first:
        return pull_first(sweep, folded, layer, targets)
    return pull_back(sweep, folded, zero, stream, begin_gradients(targets, layer, len(stream)))


@partial(jax.jit, static_argnames=("settings", "layer"), donate_argnames=("edges",))
def add_layer(
    settings: Settings,
    layer: int,
    weights: FoldedWeights,
    prompts: PromptNodes,
    stop_index: Int[Array, ""],
    stream: Float[Array, "T R D"],
    edges: Edges,
) -> Edges:
    """Adds the products with what is written in one layer. As it is known, there is one thing left to choose: whether a
    group of tiles is needed."""
    step = LayerStep(jnp.zeros_like(stop_index), jnp.full_like(stop_index, layer), stop_index)
    return add_shares(Sweep(*settings, weights, prompts), step, stream, edges)


@partial(jax.jit, static_argnames=("settings", "is_first"), donate_argnames=("streams", "edges"))
def push_block_once(
    settings: Settings,
    is_first: bool,
    weights: FoldedWeights,
    prompts: PromptNodes,
    targets: LowTargets,
    positions: Int[Array, "R"],
    layer: Int[Array, ""],
    streams: Float[Array, "T R D"],
    edges: Float[Array, "m K R S"],
) -> tuple[Float[Array, "T R D"], Float[Array, "m K R S"]]:
    """Carries a block of sources through one layer, and multiplies it with the targets there."""
    sweep, zero = Sweep(*settings, weights, prompts), jnp.zeros_like(layer)
    folded = sweep.take_layer(zero, layer)
    if is_first:
        after, read = push_first(sweep, folded, positions, streams)
    else:
        after, read = push_forward(sweep, folded, zero, streams)
    return after, edges.at[layer].set(read_targets(sweep, targets, zero, layer, read))


@partial(jax.jit, static_argnames=("settings",), donate_argnames=("streams",))
def add_writes(
    settings: Settings,
    weights: FoldedWeights,
    prompts: PromptNodes,
    layer: Int[Array, ""],
    streams: Float[Array, "T R D"],
    layers: Int[Array, "R"],
    positions: Int[Array, "R"],
    rows: Int[Array, "R"],
    are_errors: Bool[Array, "R"],
) -> Float[Array, "T R D"]:
    """Adds what a block's sources write in one layer."""
    sweep = Sweep(*settings, weights, prompts)
    writes = take_writes(sweep, jnp.zeros_like(layer), layer, layers, positions, rows, are_errors)
    return streams.at[positions, jnp.arange(len(positions))].add(writes)


meet = jax.jit(meet_columns, static_argnames=("precision",))


def list_push_bodies(
    shapes: Shapes, batch: Batch, sources: SourceBlocks, targets: LowTargets, kept: int
) -> Iterator[Step]:
    """Of the program that carries sources up to the cut."""
    settings, program = (batch.setup.local, batch.layout, batch.start), (batch.setup.folded, batch.nodes)
    trips, number, of_block = (
        count_push_trips(batch, sources),
        shapes.numbers(),
        shapes.numbers(sources.layers.shape[2]),
    )
    _, layers, tiles, tile_size = targets.numbers.shape
    streams = shapes.array(batch.stops[-1], *of_block.shape, batch.setup.local.model.width)
    edges = shapes.array(layers, tiles, *of_block.shape, tile_size)
    kept += count_bytes(streams, edges)
    rest = *program, shapes.place(targets), of_block, number, streams, edges
    for stop, times in (+trips.later).items():
        yield Step("carry sources", push_block_once.lower((*settings, (stop,)), False, *rest), kept, {-1: times})
    first = push_block_once.lower((*settings, batch.stops), True, *rest)
    yield Step("carry sources", first, kept, {-1: trips.firsts})
    are_errors = shapes.array(*of_block.shape, dtype=jnp.bool_)
    arrays = *program, number, streams, of_block, of_block, of_block, are_errors
    yield Step("carry sources", add_writes.lower((*settings, batch.stops), *arrays), kept, {-1: trips.layers})


def list_bodies(shapes: Shapes, batch: Batch, trips: Trips, kept: int) -> Iterator[Step]:
    """Of the program that carries targets down, in blocks of one size."""
    settings, program = (batch.setup.local, batch.layout, batch.start), (batch.setup.folded, batch.nodes)
    layout, number, of_block = batch.layout, shapes.numbers(), shapes.numbers(trips.size)
    stream = shapes.array(batch.stops[-1], trips.size, batch.setup.local.model.width)
    # The results of the calls that wait for the host, of this call, and of the block that is computed.
    results = (1 + CALLS_IN_FLIGHT) * trips.blocks_per_call + 1
    kept += results * trips.size * batch.target_bytes + count_bytes(stream)
    targets = TargetNodes(of_block, of_block, shapes.array(*stream.shape[1:]))
    rest = *program, targets, number, stream
    for stop, times in (+trips.later).items():
        yield Step("carry targets", pull_block.lower((*settings, (stop,)), False, *rest), kept, {-1: times})
    first = pull_block.lower((*settings, batch.stops), True, *rest)
    yield Step("carry targets", first, kept, {-1: trips.firsts})

    sweep = Sweep(*settings, batch.stops, *program)
    edges: Any = shapes.evaluate(make_edges, sweep, None, trips.size, static=3)
    groups, middle = layout.tiles // layout.tiles_at_once, layout.layers[len(layout.layers) // 2]
    lowered = add_layer.lower(sweep[:4], middle, *program, number, stream, edges)
    yield Step("products", lowered, kept, {-1: trips.needed / groups, 0: trips.skipped / groups})
    if batch.columns is not None:
        one = batch.columns._replace(
            starts=shapes.numbers(1, 1), streams=shapes.array(1, 1, *batch.columns.streams.shape[2:])
        )
        lowered = meet.lower(batch.setup.local.precision, one, number, number, stream)
        yield Step("products", lowered, kept, {-1: trips.meetings})
