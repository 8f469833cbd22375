"""Columns: sources carried up to the layer where targets, carried down, meet them.

All that is written below a layer m, the cut, reaches the layers above it through the residual stream x_m that enters
layer m. So the edges into a target that reads in layer m or above are

    edge(source -> target) = gradient(target)[x_m] . column(source) + the shares of layers from m on (`edges.py`)
    column(source) = sum over layers l < m: the derivative of x_m by what is written in l, times write(source)[l]

A column is carried up layer by layer, as a gradient is carried down: the linear model is its own `jax.jvp`. On its way
it passes the targets that read below the cut, and its products with their vectors are the edges into them. To carry
each half of the way takes half the operations of carrying all targets all the way; `cuts.py` counts, and chooses m.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jclt.attribution.local import LocalModel
from jclt.attribution.sweep.folding import FoldedLayer, FoldedWeights, run_folded_layer, run_folded_layer_from
from jclt.attribution.sweep.nodes import PromptNodes, Sweep, map_over_prompts
from jclt.attribution.sweep.tiles import Layout
from jclt.numerics import Precision, einsum
from jclt.shapes import Array, Bool, Float, Int


class SourceBlocks(NamedTuple):
    """The sources below the cut of B prompts: N blocks of R sources. Positions are counted from the first with sources.
    A source that only fills a block up has a layer above all others."""

    used: Int[Array, "B"]  # blocks
    cuts: Int[Array, "B"]
    layers: Int[Array, "B N R"]
    positions: Int[Array, "B N R"]
    rows: Int[Array, "B N R"]  # of a feature: its slot, numbered through the tiles of its group
    are_errors: Bool[Array, "B N R"]
    stop_indices: Int[Array, "B N"]  # how many positions they reach, an index in the program's `stops`


class LowTargets(NamedTuple):
    """The targets of B prompts that read below the cut, layer by layer in tiles of one position each."""

    numbers: Int[Array, "B m K S"]  # among the prompt's targets
    positions: Int[Array, "B m K"]  # counted from the first with sources; that of an unused tile is below 0


class Columns(NamedTuple):
    """What the sources below the cut add to the residual stream there."""

    used: Int[Array, "B"]  # blocks
    cuts: Int[Array, "B"]
    starts: Int[Array, "B N"]  # the first position that one of them reaches
    streams: Float[Array, "B N T R D"]


@partial(jax.jit, static_argnames=("local", "layout", "start", "stops", "mesh"))
@jax.named_scope("push_sources")
def push_sources(
    local: LocalModel,
    layout: Layout,
    start: int,
    stops: tuple[int, ...],
    mesh: Mesh,
    weights: FoldedWeights,
    prompts: PromptNodes,
    blocks: SourceBlocks,
    targets: LowTargets,
) -> tuple[Columns, Float[Array, "B N m K R S"]]:
    """Carries sources up to the cut, block by block, on each device those of its own prompts. Returns what they add
    there, and the edges from them into the targets below the cut."""

    def push_on_device(
        weights: FoldedWeights, prompts: PromptNodes, blocks: SourceBlocks, targets: LowTargets
    ) -> tuple[Columns, Float[Array, "B N m K R S"]]:
        sweep = Sweep(local, layout, start, stops, weights, prompts)
        count, most, size = blocks.layers.shape
        _, layers, tiles, tile_size = targets.numbers.shape
        streams = jnp.zeros((count, most, stops[-1], size, sweep.width), sweep.dtype)
        edges = jnp.zeros((count, most, layers, tiles, size, tile_size), sweep.dtype)

        def push_prompt(prompt: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            def push_next(number: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                of_block = push_block(sweep, blocks, targets, prompt, number)
                return jax.tree.map(lambda x, of_block: x.at[prompt, number].set(of_block), carry, of_block)

            return jax.lax.fori_loop(0, blocks.used[prompt], push_next, carry)

        streams, edges = jax.lax.fori_loop(0, count, push_prompt, (streams, edges))
        starts = stops[-1] - jnp.asarray(stops)[blocks.stop_indices]
        return Columns(blocks.used, blocks.cuts, starts, streams), edges

    return map_over_prompts(mesh, push_on_device, weights, prompts, blocks, targets)


def push_block(
    sweep: Sweep, blocks: SourceBlocks, targets: LowTargets, prompt: Int[Array, ""], number: Int[Array, ""]
) -> tuple[Float[Array, "T R D"], Float[Array, "m K R S"]]:
    """The residual streams at the cut that one block of sources makes, and the edges into the targets below it."""
    layers, positions, rows, are_errors = (x[prompt, number] for x in blocks[2:6])
    (size,), bottom, stop_index = layers.shape, jnp.min(layers), blocks.stop_indices[prompt, number]

    def push_layer(step: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        layer, (streams, edges) = bottom + step, carry
        folded = sweep.take_layer(prompt, layer)

        def push(push_streams: Callable[..., tuple[Array, Array]], streams: Array, edges: Array) -> tuple[Array, Array]:
            after, read = push_streams(streams)
            return after, edges.at[layer].set(read_targets(sweep, targets, prompt, layer, read))

        cases = [
            lambda streams, edges: (streams, edges),
            partial(push, partial(push_first, sweep, folded, positions)),
            partial(push, partial(push_forward, sweep, folded, stop_index)),
        ]
        streams, edges = jax.lax.switch(jnp.minimum(step, 2), cases, streams, edges)
        writes = take_writes(sweep, prompt, layer, layers, positions, rows, are_errors)
        return streams.at[positions, jnp.arange(size)].add(writes), edges

    _, most, tiles, tile_size = targets.numbers.shape
    streams = jnp.zeros((sweep.stops[-1], size, sweep.width), sweep.dtype)
    edges = jnp.zeros((most, tiles, size, tile_size), sweep.dtype)
    return jax.lax.fori_loop(0, blocks.cuts[prompt] - bottom, push_layer, (streams, edges))


def push_forward(
    sweep: Sweep, folded: FoldedLayer, stop_index: Int[Array, ""], streams: Float[Array, "T R D"]
) -> tuple[Float[Array, "T R D"], Float[Array, "T R D"]]:
    """Carries residual streams through one layer, which they enter at the last positions only: the streams after it,
    and those that its targets read."""

    def push_positions(stop: int, streams: Array) -> tuple[Array, Array]:
        first = len(streams) - stop
        after, read = run_folded_layer(sweep.local, folded.select(slice(first, None)), streams[first:])
        return streams.at[first:].set(after), streams.at[first:].set(read)

    return jax.lax.switch(stop_index, [partial(push_positions, stop) for stop in sweep.stops], streams)


def push_first(
    sweep: Sweep, folded: FoldedLayer, positions: Int[Array, "R"], streams: Float[Array, "T R D"]
) -> tuple[Float[Array, "T R D"], Float[Array, "T R D"]]:
    """What `push_forward` does where each stream is not 0 at its source's position only."""
    return run_folded_layer_from(sweep.local, folded, positions, streams[positions, jnp.arange(len(positions))])


def read_targets(
    sweep: Sweep, targets: LowTargets, prompt: Int[Array, ""], layer: Int[Array, ""], read: Float[Array, "T R D"]
) -> Float[Array, "K R S"]:
    """The products of one layer's targets with what they read."""
    numbers, positions = targets.numbers[prompt, layer], targets.positions[prompt, layer]

    def read_tile(tile: Array, edges: Array) -> Array:
        def multiply() -> Float[Array, "R S"]:
            vectors = sweep.prompts.targets.vectors[prompt, numbers[tile]]
            return einsum("rd,sd->rs", read[positions[tile]], vectors, precision=sweep.local.precision)

        nothing = jnp.zeros(edges.shape[1:], edges.dtype)
        return edges.at[tile].set(jax.lax.cond(positions[tile] >= 0, multiply, lambda: nothing))

    edges = jnp.zeros((len(numbers), read.shape[1], numbers.shape[1]), read.dtype)
    return jax.lax.fori_loop(0, len(numbers), read_tile, edges)


def take_writes(
    sweep: Sweep,
    prompt: Int[Array, ""],
    layer: Int[Array, ""],
    layers: Int[Array, "R"],
    positions: Int[Array, "R"],
    rows: Int[Array, "R"],
    are_errors: Bool[Array, "R"],
) -> Float[Array, "R D"]:
    """What each source of a block writes in one layer. For a source that does not write there, the tile read may be one
    of another layer; it is then replaced by 0."""
    sources, layout = sweep.prompts.sources, sweep.layout
    covered = jnp.asarray(layout.layers)
    index = jnp.minimum(jnp.searchsorted(covered, layer), len(covered) - 1)
    tiles = sources.starts[prompt, index] + rows // layout.tile_size
    of_features = sources.tiles[prompt, tiles, rows % layout.tile_size]
    of_errors = sources.errors[prompt, layer, sweep.start + positions]
    writes_on = (layers == layer) if layout.groups > 1 else (layers <= layer)
    writes_here = jnp.where(are_errors, layers == layer, writes_on & (covered[index] == layer))
    return jnp.where(writes_here[..., None], jnp.where(are_errors[..., None], of_errors, of_features), 0)


def meet_columns(
    precision: Precision,
    columns: Columns,
    prompt: Int[Array, ""],
    stop: Int[Array, ""],
    gradients: Float[Array, "T R D"],
) -> Float[Array, "N R s"]:
    """Gradients at the cut times all columns of the prompt, over the positions that both reach."""
    _, blocks, _, size, _ = columns.streams.shape
    nothing = jnp.zeros((blocks, gradients.shape[1], size), gradients.dtype)

    def meet_block(number: Array, edges: Array) -> Array:
        def add_position(position: Array, total: Array) -> Array:
            sources = columns.streams[prompt, number, position]
            return total + einsum("rd,sd->rs", gradients[position], sources, precision=precision)

        return edges.at[number].set(jax.lax.fori_loop(columns.starts[prompt, number], stop, add_position, nothing[0]))

    return jax.lax.fori_loop(0, columns.used[prompt], meet_block, nothing)
