"""Edges: the derivative of what each target reads with respect to everything that sources wrote before it.

    edge(source -> target) = sum over layers l: gradient(target)[l, position of source] . write(source)[l]

A target's gradient begins with its own vector, at the layer and position where it reads, and goes down the layers:
`jax.vjp` of one layer of the linear model carries it from the layer's output to its input. There its product with what
each source writes below is that layer's share of the edge.

Targets go down in blocks. A block begins at the layer of its highest target, and leaves out the positions after its
last one, since they cannot reach it. Edges from embeddings come from `embeddings.py`, so no gradient goes below the
first layer's output.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jclt.attribution.bases import FeatureNodes, SourceWrites
from jclt.attribution.folding import (
    FoldedLayer,
    FoldedPrompt,
    FoldedWeights,
    fold_prompt,
    fold_targets,
    fold_writes,
    invert_write_norms,
    run_folded_layer,
    writes_through_norm,
)
from jclt.attribution.local import Frozen, LocalModel, Weights
from jclt.attribution.tiles import TILES_AT_ONCE, Layout
from jclt.numerics import einsum
from jclt.shapes import Array, Float, Int


class TargetNodes(NamedTuple):
    """The targets of edges. A target's value is its vector times what is read at its layer and position, and a bias."""

    layers: Int[Array, "*B N"]  # the number of layers for what the unembedding reads
    positions: Int[Array, "*B N"]
    vectors: Float[Array, "*B N D"]


class PromptNodes(NamedTuple):
    """What the edges of B prompts are computed from: linear models, sources and targets, folded (`folding.py`)."""

    frozen: FoldedPrompt
    sources: SourceWrites
    targets: TargetNodes


@partial(jax.jit, static_argnames=("local", "layout"))
@jax.named_scope("fold_nodes")
def fold_nodes(
    local: LocalModel,
    layout: Layout,
    weights: Weights,
    frozen: Frozen,
    features: FeatureNodes,
    outputs: TargetNodes,
    sources: SourceWrites,
) -> PromptNodes:
    """The nodes of a batch of prompts. Targets are its features layer by layer, padding included, then its outputs."""

    def fold(frozen: Frozen, features: FeatureNodes, outputs: TargetNodes, sources: SourceWrites) -> PromptNodes:
        encoders = features.encoders.reshape(-1, features.encoders.shape[-1])
        layers = jnp.repeat(jnp.asarray(layout.layers), features.valid.shape[1]).astype(outputs.layers.dtype)
        layers = jnp.concatenate([layers, outputs.layers])
        positions = jnp.concatenate([features.positions.ravel(), outputs.positions])
        vectors = jnp.concatenate([encoders, outputs.vectors])
        vectors = fold_targets(local, weights.params, frozen, layers, positions, vectors)
        if writes_through_norm(local):
            scales, covered = invert_write_norms(local, frozen), jnp.asarray(layout.layers)
            tile_scales = scales[covered[:, None], jnp.broadcast_to(sources.tile_positions, sources.tiles.shape[:2])]
            tiles = fold_writes(local, weights.params, covered, sources.tiles) * tile_scales[:, :, None, None]
            errors = fold_writes(local, weights.params, jnp.arange(len(scales)), sources.errors) * scales[:, :, None]
            sources = sources._replace(tiles=tiles, errors=errors)
        return PromptNodes(fold_prompt(local, weights, frozen), sources, TargetNodes(layers, positions, vectors))

    return jax.vmap(fold)(frozen, features, outputs, sources)


class Blocks(NamedTuple):
    """Blocks of R targets, each of one prompt; those from `used` on are padding."""

    used: Int[Array, "1"]
    prompts: Int[Array, "M"]
    numbers: Int[Array, "M R"]  # among the prompt's targets
    tops: Int[Array, "M"]  # the highest layer in which one of them reads
    stops: Int[Array, "M"]  # which of the program's numbers of positions reaches all of them


class Edges(NamedTuple):
    """The edges into M blocks of R targets."""

    features: Float[Array, "M G K R S"]  # by group of tiles, tile and slot
    errors: Float[Array, "M L T R"]


class Sweep(NamedTuple):
    """The arrays and settings that all blocks of one call share."""

    local: LocalModel
    layout: Layout
    start: int  # the first position with sources
    stops: tuple[int, ...]  # numbers of positions, counted from `start`
    weights: FoldedWeights
    prompts: PromptNodes

    def take_layer(self, prompt: Array, layer: Array) -> FoldedLayer:
        frozen, weights, start = self.prompts.frozen, self.weights, self.start
        return FoldedLayer(
            values=weights.values[layer],
            outputs=weights.outputs[layer],
            skip=None if weights.skips is None else weights.skips[layer],
            pattern=frozen.patterns[prompt, layer, :, start:, start:],
            skip_scale=None if frozen.skip_scales is None else frozen.skip_scales[prompt, layer, start:],
        )


@partial(jax.jit, static_argnames=("local", "layout", "start", "stops", "mesh"))
@jax.named_scope("trace_targets")
def trace_blocks(
    local: LocalModel,
    layout: Layout,
    start: int,
    stops: tuple[int, ...],
    mesh: Mesh,
    weights: FoldedWeights,
    prompts: PromptNodes,
    blocks: Blocks,
) -> Edges:
    """Traces blocks one after the other, on each device those of its own prompts."""

    def trace_on_device(weights: FoldedWeights, prompts: PromptNodes, blocks: Blocks) -> Edges:
        sweep = Sweep(local, layout, start, stops, weights, prompts)
        count, size = blocks.numbers.shape
        dtype = prompts.targets.vectors.dtype
        edges = Edges(
            features=jnp.zeros((count, layout.groups, layout.tiles, size, layout.tile_size), dtype),
            errors=jnp.zeros((count, local.model.layers, stops[-1], size), dtype),
        )

        def trace_next(number: Array, edges: Edges) -> Edges:
            block = (blocks.prompts[number], blocks.numbers[number], blocks.tops[number], blocks.stops[number])
            of_block = trace_block(sweep, *block)
            return jax.tree.map(lambda all_edges, x: all_edges.at[number].set(x), edges, of_block)

        return jax.lax.fori_loop(0, blocks.used[0], trace_next, edges)

    if mesh.size == 1:
        return trace_on_device(weights, prompts, blocks)
    split = P("prompts")
    return jax.shard_map(trace_on_device, mesh=mesh, in_specs=(P(), split, split), out_specs=split, check_vma=False)(
        weights, prompts, blocks
    )


def trace_block(
    sweep: Sweep, prompt: Int[Array, ""], numbers: Int[Array, "R"], top: Int[Array, ""], stop: Int[Array, ""]
) -> Edges:
    """The edges into one block of targets, without the axis of blocks."""
    layout, config = sweep.layout, sweep.local.model
    targets = TargetNodes(*(x[prompt, numbers] for x in sweep.prompts.targets))
    dtype, length = targets.vectors.dtype, sweep.stops[-1]
    at_position = jax.nn.one_hot(targets.positions - sweep.start, length, axis=0, dtype=dtype)

    def begin(layer: Array) -> Float[Array, "T R D"]:
        """The gradients that begin in this layer: the vectors of the targets that read here, else zero."""
        reads_here = (targets.layers == layer).astype(dtype)
        return (at_position * reads_here[None])[:, :, None] * targets.vectors[None]

    def step(number: Array, carry: tuple[Array, Edges]) -> tuple[Array, Edges]:
        stream, edges = carry
        layer = top - number
        stream = jax.lax.cond(
            layer == config.layers,
            lambda stream: begin(layer),  # of what the unembedding reads
            lambda stream: pull_back(sweep, prompt, layer, stop, stream, begin(layer)),
            stream,
        )
        return stream, add_shares(sweep, prompt, layer - 1, stop, stream, edges)

    edges = Edges(
        features=jnp.zeros((layout.groups, layout.tiles, len(numbers), layout.tile_size), dtype),
        errors=jnp.zeros((config.layers, length, len(numbers)), dtype),
    )
    stream = jnp.zeros((length, len(numbers), targets.vectors.shape[1]), dtype)
    return jax.lax.fori_loop(0, top, step, (stream, edges))[1]


def pull_back(
    sweep: Sweep, prompt: Array, layer: Array, stop: Array, stream: Float[Array, "T R D"], begin: Float[Array, "T R D"]
) -> Float[Array, "T R D"]:
    """Carries gradients from a layer's output, and those that begin at what its coder reads, to its input."""
    folded = sweep.take_layer(prompt, layer)

    def pull_positions(stop: int, stream: Array, begin: Array) -> Array:
        cut = folded._replace(
            pattern=folded.pattern[:, :stop, :stop],
            skip_scale=None if folded.skip_scale is None else folded.skip_scale[:stop],
        )
        run = partial(run_folded_layer, sweep.local.model.parallel, cut)
        _, pull = jax.vjp(run, jnp.zeros_like(stream[:stop]))
        return stream.at[:stop].set(pull((stream[:stop], begin[:stop]))[0])

    return jax.lax.switch(stop, [partial(pull_positions, stop) for stop in sweep.stops], stream, begin)


def add_shares(
    sweep: Sweep, prompt: Array, layer: Array, stop: Array, stream: Float[Array, "T R D"], edges: Edges
) -> Edges:
    """Adds one layer's term of the formula at the head of this file: gradients of the layer's output times what each
    source writes there."""
    layout, sources = sweep.layout, sweep.prompts.sources
    errors = einsum("trd,td->tr", stream, sources.errors[prompt, layer, sweep.start :])
    edges = edges._replace(errors=edges.errors.at[layer].set(errors))
    if len(layout.layers) == sweep.local.model.layers:
        return edges._replace(features=add_tiles(sweep, prompt, layer, layer, stop, stream, edges.features))
    covered = jnp.asarray(layout.layers)
    index = jnp.searchsorted(covered, layer).astype(layer.dtype)
    features = jax.lax.cond(
        jnp.isin(layer, covered),
        lambda features: add_tiles(sweep, prompt, layer, index, stop, stream, features),
        lambda features: features,
        edges.features,
    )
    return edges._replace(features=features)


def add_tiles(
    sweep: Sweep,
    prompt: Array,
    layer: Array,
    index: Array,
    stop: Array,
    stream: Float[Array, "T R D"],
    edges: Float[Array, "G K R S"],
) -> Float[Array, "G K R S"]:
    """Multiplies with the features of the tiles that write to this layer, at positions before the block's stop."""
    layout, sources = sweep.layout, sweep.prompts.sources
    at_once = min(TILES_AT_ONCE.get(jax.default_backend(), 4), layout.tiles)
    group = index if layout.groups > 1 else jnp.zeros_like(index)
    positions, first_layers = sources.tile_positions[prompt, group], sources.tile_layers[prompt, group]
    last = jnp.asarray(sweep.stops)[stop]

    def add_next(number: Array, edges: Array) -> Array:
        first = number * at_once
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=at_once)
        places = cut(positions) - sweep.start

        def multiply() -> Float[Array, "k R S"]:
            sizes = (1, 1, at_once, *sources.tiles.shape[3:])
            tiles = jax.lax.dynamic_slice(sources.tiles, (prompt, index, first, 0, 0), sizes)[0, 0]
            return einsum("krd,ksd->krs", stream[places], tiles)

        nothing = jnp.zeros((at_once, *edges.shape[2:]), edges.dtype)
        shares = jax.lax.cond(jnp.any((cut(first_layers) <= layer) & (places < last)), multiply, lambda: nothing)
        place = (group, first, jnp.zeros_like(first), jnp.zeros_like(first))
        before = jax.lax.dynamic_slice(edges, place, (1, *shares.shape))
        return jax.lax.dynamic_update_slice(edges, before + shares[None], place)

    return jax.lax.fori_loop(0, layout.tiles // at_once, add_next, edges)
