"""Edges: the derivative of what each target reads with respect to everything that sources wrote before it.

    edge(source -> target) = sum over layers l: gradient(target)[l, position of source] . write(source)[l]

Gradients go down the layers, and begin with the target's own vector at the layer where it reads. `jax.vjp` of one layer
of the linear model carries them from the layer's output to its input, and to what its MLP writes; there the product
with each source's write is that layer's share of the edge. Targets go down together in blocks, and a block begins at
the layer of its highest target. Layers above a target and positions after it cannot reach it, and are left out.

Edges from embeddings come from `embeddings.py`, so no gradient goes below the first layer's MLP.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jclt.attribution.bases import FeatureNodes, Layout, SourceWrites
from jclt.attribution.local import (
    Frozen,
    Layers,
    LocalModel,
    Weights,
    cut_positions,
    read_final,
    run_layer,
    stack_layers,
)
from jclt.numerics import einsum
from jclt.shapes import Array, Float, Int


class TargetNodes(NamedTuple):
    """The targets of edges. A target's value is its vector times what is read at its layer and position, and a bias."""

    layers: Int[Array, "R"]  # the number of layers for what the unembedding reads
    positions: Int[Array, "R"]
    vectors: Float[Array, "R D"]


class PromptNodes(NamedTuple):
    """What one prompt's edges are computed from: its linear model, its sources and its targets."""

    frozen: Frozen
    sources: SourceWrites
    features: FeatureNodes
    outputs: TargetNodes


class Edges(NamedTuple):
    """The edges into M blocks of R targets, from sources up to the last position of their window."""

    features: Float[Array, "M G K R S"]  # by group of tiles, tile and slot
    errors: Float[Array, "M L R T"]


class LayerWrites(NamedTuple):
    """What the sources of a window write to one layer."""

    tiles: Float[Array, "K D S"]
    tile_positions: Int[Array, "K"]
    errors: Float[Array, "T D"]
    group: Int[Array, ""]  # of the tiles
    is_covered: Array  # whether any feature writes to this layer


class Window(NamedTuple):
    """A prompt's arrays, cut to a window of positions. Positions of sources and targets are counted from its start."""

    frozen: Frozen
    sources: SourceWrites
    targets: TargetNodes  # in blocks

    @property
    def nothing(self) -> Float[Array, "T D"]:
        """Zeros in the shape of one target's gradient."""
        return jnp.zeros_like(self.sources.errors[0])

    def begin(self, block: Array, layer: Array | int) -> Float[Array, "R T D"]:
        """The gradients that begin in this layer: the vectors of the block's targets that read here, else zero."""
        targets = jax.tree.map(lambda x: x[block], self.targets)
        length, dtype = self.nothing.shape[0], self.nothing.dtype
        at_position = jax.nn.one_hot(targets.positions, length, dtype=dtype)
        reads_here = (targets.layers == layer).astype(dtype)
        return (at_position * reads_here[:, None])[:, :, None] * targets.vectors[:, None]


def trace_targets(
    local: LocalModel,
    layout: Layout,
    start: int,
    stop: int,
    weights: Weights,
    prompt: PromptNodes,
    block_counts: Int[Array, "levels"],
    targets: TargetNodes,
) -> Edges:
    """Edges into targets that are all in the window of positions from `start` to before `stop`: from the features of
    the first `layout.tiles` tiles of each group, and from the errors in the window.

    Targets come in blocks `[M, R]`, those of high layers first: `block_counts[l]` blocks hold targets that read at
    layer l or above.
    """
    depth, sources = local.model.layers, prompt.sources
    window = Window(
        frozen=cut_positions(prompt.frozen, start, stop),
        sources=SourceWrites(
            tiles=sources.tiles[:, : layout.tiles],
            tile_positions=sources.tile_positions[:, : layout.tiles] - start,
            errors=sources.errors[:, start:stop],
        ),
        targets=targets._replace(positions=targets.positions - start),
    )
    layers = stack_layers(local, weights, window.frozen)
    blocks, size = targets.positions.shape
    dtype = sources.errors.dtype
    streams = jnp.zeros((blocks, size, *window.nothing.shape), dtype)
    edges = Edges(
        features=jnp.zeros((blocks, layout.groups, layout.tiles, size, layout.tile_size), dtype),
        errors=jnp.zeros((blocks, depth, size, stop - start), dtype),
    )

    def trace_next_layer(step: Array, carry: tuple[Array, Edges]) -> tuple[Array, Edges]:
        number = depth - 1 - step
        layer = jax.tree.map(lambda x: x[number], layers)
        return trace_layer(local, layout, layer, window, number, block_counts[number], carry)

    streams = trace_final_norm(local, weights, window, block_counts[depth], streams)
    highest = jnp.sum((block_counts[:depth] > 0).astype(jnp.int32))  # above the highest target there is nothing to do
    streams, edges = jax.lax.fori_loop(depth - highest, depth - 1, trace_next_layer, (streams, edges))
    first_layer = jax.tree.map(lambda x: x[0], layers)
    edges = trace_first_layer(local, layout, first_layer, window, block_counts[1], streams, edges)
    return edges._replace(errors=jnp.pad(edges.errors, ((0, 0), (0, 0), (0, 0), (start, 0))))


def trace_final_norm(local: LocalModel, weights: Weights, window: Window, count: Array, streams: Array) -> Array:
    """From what the unembedding reads to the residual stream after the last layer."""
    _, pull_back = jax.vjp(lambda x: read_final(local.model, weights.params, window.frozen, x), window.nothing)

    def trace_block(block: Array, streams: Array) -> Array:
        return streams.at[block].set(jax.vmap(pull_back)(window.begin(block, local.model.layers))[0])

    return jax.lax.fori_loop(0, count, trace_block, streams)


def trace_layer(
    local: LocalModel,
    layout: Layout,
    layer: Layers,
    window: Window,
    number: Array,
    count: Array,
    carry: tuple[Array, Edges],
) -> tuple[Array, Edges]:
    """Carries the gradients of `count` blocks through one layer, and adds the layer's shares of their edges."""
    depth, nothing = local.model.layers, window.nothing
    layer_writes = select_layer(layout, depth, window.sources, number)
    _, pull_back = jax.vjp(lambda x, write: run_layer(local, *layer, x, write), nothing, nothing)

    def trace_block(block: Array, carry: tuple[Array, Edges]) -> tuple[Array, Edges]:
        streams, edges = carry
        stream, write = jax.vmap(pull_back)((streams[block], window.begin(block, number)))
        return streams.at[block].set(stream), add_shares(edges, layout, block, number, write, layer_writes)

    return jax.lax.fori_loop(0, count, trace_block, carry)


def trace_first_layer(
    local: LocalModel, layout: Layout, layer: Layers, window: Window, count: Array, streams: Array, edges: Edges
) -> Edges:
    """As `trace_layer`; but below the first layer's MLP only embeddings are left (`embeddings.py`)."""
    layer_writes = select_layer(layout, local.model.layers, window.sources, 0)
    _, pull_back = jax.vjp(lambda write: run_layer(local, *layer, window.nothing, write)[0], window.nothing)

    def trace_block(block: Array, edges: Edges) -> Edges:
        (write,) = jax.vmap(pull_back)(streams[block])
        return add_shares(edges, layout, block, 0, write, layer_writes)

    return jax.lax.fori_loop(0, count, trace_block, edges)


def select_layer(layout: Layout, depth: int, sources: SourceWrites, layer: Array | int) -> LayerWrites:
    """What sources write to one of the model's `depth` layers; the features' part is only valid in a covered one."""
    covered = layout.layers
    index_of = jnp.asarray([covered.index(layer) if layer in covered else 0 for layer in range(depth)])
    is_covered = jnp.asarray([layer in covered for layer in range(depth)])
    index = index_of[layer]
    return LayerWrites(
        tiles=sources.tiles[index],
        tile_positions=sources.tile_positions[index],
        errors=sources.errors[layer],
        group=index if layout.groups > 1 else jnp.zeros_like(index),
        is_covered=is_covered[layer],
    )


def add_shares(
    edges: Edges,
    layout: Layout,
    block: Array,
    layer: Array | int,
    gradients: Float[Array, "R T D"],
    sources: LayerWrites,
) -> Edges:
    """Adds one layer's term of the formula at the head of this file to a block's edges: gradients with respect to what
    the layer's MLP writes, times what each source writes there."""

    def multiply_tiles() -> Float[Array, "K R S"]:
        gradients_of_tiles = jnp.moveaxis(gradients, 1, 0)[sources.tile_positions]
        return einsum("krd,kds->krs", gradients_of_tiles, sources.tiles)

    if len(layout.layers) == edges.errors.shape[1]:
        of_features = multiply_tiles()
    else:
        nothing = jnp.zeros((layout.tiles, gradients.shape[0], layout.tile_size), gradients.dtype)
        of_features = jax.lax.cond(sources.is_covered, multiply_tiles, lambda: nothing)
    # No einsum: it would be a matrix product with a matrix of one row.
    of_errors = jnp.sum(gradients * sources.errors[None], axis=-1)
    return Edges(edges.features.at[block, sources.group].add(of_features), edges.errors.at[block, layer].set(of_errors))


@partial(jax.jit, static_argnames=("local", "layout", "start", "stop"))
@jax.named_scope("trace_targets")
def trace_blocks(
    local: LocalModel,
    layout: Layout,
    start: int,
    stop: int,
    weights: Weights,
    prompts: PromptNodes,
    block_counts: Int[Array, "levels"],
    numbers: Int[Array, "B M R"],
) -> Edges:
    """`trace_targets` for a batch of prompts; targets are given by their `numbers` among `list_targets`."""

    def trace_prompt(prompt: PromptNodes, numbers: Int[Array, "M R"]) -> Edges:
        every_target = list_targets(layout.layers, prompt.features, prompt.outputs)
        targets = jax.tree.map(lambda x: x[numbers], every_target)
        return trace_targets(local, layout, start, stop, weights, prompt, block_counts, targets)

    return jax.vmap(trace_prompt)(prompts, numbers)


def list_targets(covered: tuple[int, ...], features: FeatureNodes, outputs: TargetNodes) -> TargetNodes:
    """One prompt's targets in one list: its features layer by layer, padding included, then the outputs."""
    layers = jnp.repeat(jnp.asarray(covered), features.valid.shape[1])
    encoders = features.encoders.reshape(-1, features.encoders.shape[-1])
    return TargetNodes(
        layers=jnp.concatenate([layers, outputs.layers]),
        positions=jnp.concatenate([features.positions.ravel(), outputs.positions]),
        vectors=jnp.concatenate([encoders, outputs.vectors]),
    )
