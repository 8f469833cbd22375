"""Edges: the derivative of a target's value with respect to what is written at the source's position, times what the
source writes there.

    edge(source -> target) = sum over layers l: gradient(target)[l, position of source] . write(source)[l]

A target's gradient begins with its own vector, at the layer and position where it reads, and goes down the layers:
`jax.vjp` of one layer of the linear model carries it from the layer's output to its input. There its product with what
each source writes below is that layer's share of the edge.

Targets go down in blocks. A block leaves out the positions after its last target, since they cannot reach it. It has
several parts: each of them begins at the layer of its highest target, and writes are multiplied with all at once. Edges
from embeddings come from `embeddings.py`, so no gradient goes below the first layer's output.
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
from jclt.attribution.tiles import Layout
from jclt.numerics import einsum
from jclt.shapes import Array, Float, Int


class TargetNodes(NamedTuple):
    """The targets of edges. A target's value is its vector times what is read at its layer and position, and a bias;
    once folded, its vector times the residual stream there."""

    layers: Int[Array, "*B N"]  # the number of layers for what the unembedding reads
    positions: Int[Array, "*B N"]
    vectors: Float[Array, "*B N D"]


class PromptNodes(NamedTuple):
    """What the edges of B prompts are computed from: linear models, sources and targets, folded (`folding.py`)."""

    folded: FoldedPrompt
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
    """Blocks of P parts of R targets, from high layers to low, each of one prompt; those from `used` on are padding."""

    used: Int[Array, "1"]
    prompts: Int[Array, "M"]
    numbers: Int[Array, "M P R"]  # among the prompt's targets
    tops: Int[Array, "M"]  # the highest layer in which one of them reads
    stop_indices: Int[Array, "M"]  # in the program's `stops`: of the first one beyond all their positions


class Edges(NamedTuple):
    """The edges into the targets of M blocks, or of one."""

    features: Float[Array, "*M G K r S"]  # by group of tiles, tile and slot; r: P times R
    errors: Float[Array, "*M L T r"]


class Sweep(NamedTuple):
    """The arrays and settings that all blocks of one call share."""

    local: LocalModel
    layout: Layout
    start: int  # the first position with sources
    stops: tuple[int, ...]  # numbers of positions, counted from `start`
    weights: FoldedWeights
    prompts: PromptNodes

    def take_layer(self, prompt: Array, layer: Array) -> FoldedLayer:
        folded, weights, start = self.prompts.folded, self.weights, self.start
        return FoldedLayer(
            values=weights.values[layer],
            outputs=weights.outputs[layer],
            skip=None if weights.skips is None else weights.skips[layer],
            pattern=folded.patterns[prompt, layer, :, start:, start:],
            skip_scale=None if folded.skip_scales is None else folded.skip_scales[prompt, layer, start:],
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
        count, parts, size = blocks.numbers.shape
        nothing = make_edges(sweep, parts * size)
        edges = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), nothing)

        def trace_next(number: Array, edges: Edges) -> Edges:
            block = (blocks.prompts[number], blocks.numbers[number], blocks.tops[number], blocks.stop_indices[number])
            of_block = trace_block(sweep, *block)
            return jax.tree.map(lambda all_edges, x: all_edges.at[number].set(x), edges, of_block)

        return jax.lax.fori_loop(0, blocks.used[0], trace_next, edges)

    if mesh.size == 1:
        return trace_on_device(weights, prompts, blocks)
    split = P("prompts")
    return jax.shard_map(trace_on_device, mesh=mesh, in_specs=(P(), split, split), out_specs=split, check_vma=False)(
        weights, prompts, blocks
    )


def make_edges(sweep: Sweep, targets: int) -> Edges:
    """Zeros for one block of so many targets."""
    layout, dtype = sweep.layout, sweep.prompts.targets.vectors.dtype
    return Edges(
        features=jnp.zeros((layout.groups, layout.tiles, targets, layout.tile_size), dtype),
        errors=jnp.zeros((sweep.local.model.layers, sweep.stops[-1], targets), dtype),
    )


def trace_block(
    sweep: Sweep, prompt: Int[Array, ""], numbers: Int[Array, "P R"], top: Int[Array, ""], stop_index: Int[Array, ""]
) -> Edges:
    """The edges into one block of targets."""
    targets = TargetNodes(*(x[prompt, numbers] for x in sweep.prompts.targets))
    (parts, size), width, dtype = numbers.shape, targets.vectors.shape[-1], targets.vectors.dtype
    part_tops = jnp.max(targets.layers, axis=1)

    def begin(layer: Array, part: Array) -> Float[Array, "T R D"]:
        """The gradients of a part that begin in this layer: the vectors of the targets that read here, else zero."""
        positions = targets.positions[part] - sweep.start
        at_position = jax.nn.one_hot(positions, sweep.stops[-1], axis=0, dtype=dtype)
        reads_here = (targets.layers[part] == layer).astype(dtype)
        return (at_position * reads_here[None])[:, :, None] * targets.vectors[part][None]

    def trace_layer(number: Array, carry: tuple[Array, Edges]) -> tuple[Array, Edges]:
        layer = top - number
        folded = sweep.take_layer(prompt, jnp.minimum(layer, sweep.local.model.layers - 1))

        def trace_part(part: Array, streams: Float[Array, "T P R D"]) -> Float[Array, "T P R D"]:
            stream = jax.lax.cond(
                layer == sweep.local.model.layers,
                lambda stream: begin(layer, part),  # of what the unembedding reads
                lambda stream: pull_back(sweep, folded, stop_index, stream, begin(layer, part)),
                streams[:, part],
            )
            return streams.at[:, part].set(stream)

        streams, edges = carry
        active = jnp.sum((part_tops >= layer).astype(top.dtype))
        streams = jax.lax.fori_loop(0, active, trace_part, streams)
        return streams, add_shares(sweep, LayerStep(prompt, layer - 1, stop_index, active), streams, edges)

    streams = jnp.zeros((sweep.stops[-1], parts, size, width), dtype)
    return jax.lax.fori_loop(0, top, trace_layer, (streams, make_edges(sweep, parts * size)))[1]


def pull_back(
    sweep: Sweep, folded: FoldedLayer, stop_index: Array, stream: Float[Array, "T R D"], begun: Float[Array, "T R D"]
) -> Float[Array, "T R D"]:
    """Carries gradients from a layer's output, and those that begin at what its coder reads, to its input."""

    def pull_positions(stop: int, stream: Array, begun: Array) -> Array:
        cut = folded._replace(
            pattern=folded.pattern[:, :stop, :stop],
            skip_scale=None if folded.skip_scale is None else folded.skip_scale[:stop],
        )
        run = partial(run_folded_layer, sweep.local.model.parallel, cut)
        _, pull = jax.vjp(run, jnp.zeros_like(stream[:stop]))
        return stream.at[:stop].set(pull((stream[:stop], begun[:stop]))[0])

    return jax.lax.switch(stop_index, [partial(pull_positions, stop) for stop in sweep.stops], stream, begun)


class LayerStep(NamedTuple):
    """Where a block is on its way down."""

    prompt: Int[Array, ""]
    layer: Int[Array, ""]  # whose output has been reached
    stop_index: Int[Array, ""]
    active: Int[Array, ""]  # the parts that have begun; the others have gradients of zero


def add_shares(sweep: Sweep, step: LayerStep, streams: Float[Array, "T P R D"], edges: Edges) -> Edges:
    """Adds one layer's term of the formula at the head of this file: gradients of the layer's output times what each
    source writes there."""
    covered, layer, (length, parts, size, width) = sweep.layout.layers, step.layer, streams.shape
    errors = sweep.prompts.sources.errors[step.prompt, layer, sweep.start :]
    to_errors = einsum("trd,td->tr", streams.reshape(length, parts * size, width), errors)
    if len(covered) == sweep.local.model.layers:
        to_features = add_features(sweep, step, layer, streams, edges.features)
    else:
        to_features = jax.lax.cond(
            jnp.isin(layer, jnp.asarray(covered)),
            partial(add_features, sweep, step, jnp.searchsorted(jnp.asarray(covered), layer).astype(layer.dtype)),
            lambda streams, features: features,
            streams,
            edges.features,
        )
    return Edges(to_features, edges.errors.at[layer].set(to_errors))


def add_features(
    sweep: Sweep,
    step: LayerStep,
    index: Int[Array, ""],
    streams: Float[Array, "T P R D"],
    edges: Float[Array, "G K r S"],
) -> Float[Array, "G K r S"]:
    """Adds the products with what features write to the covered layer of this index. Tiles are skipped that hold only
    features of higher layers, or lie at positions that no target of the block reads."""
    layout, sources = sweep.layout, sweep.prompts.sources
    (length, parts, size, width), at_once = streams.shape, layout.tiles_at_once
    gradients = streams.reshape(length, parts * size, width)
    group = index if layout.groups > 1 else jnp.zeros_like(index)
    positions = sources.tile_positions[step.prompt, group] - sweep.start
    needed = sources.tile_layers[step.prompt, group] <= step.layer
    needed = needed & (positions < jnp.asarray(sweep.stops)[step.stop_index])

    def add_next(number: Array, edges: Array) -> Array:
        first, zero = number * at_once, jnp.zeros_like(number)
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=at_once)

        def multiply(active: int) -> Float[Array, "k r S"]:
            place, shape = (step.prompt, index, first, zero, zero), (1, 1, at_once, *sources.tiles.shape[3:])
            writes = jax.lax.dynamic_slice(sources.tiles, place, shape)[0, 0]
            shares = einsum("krd,ksd->krs", gradients[cut(positions), : active * size], writes)
            return jnp.pad(shares, ((0, 0), (0, (parts - active) * size), (0, 0)))

        nothing = jnp.zeros((at_once, parts * size, layout.tile_size), edges.dtype)
        branches = [lambda: nothing, *(partial(multiply, active) for active in range(1, parts + 1))]
        shares = jax.lax.switch(jnp.where(jnp.any(cut(needed)), step.active, zero), branches)[None]
        before = jax.lax.dynamic_slice(edges, (group, first, zero, zero), shares.shape)
        return jax.lax.dynamic_update_slice(edges, before + shares, (group, first, zero, zero))

    return jax.lax.fori_loop(0, layout.tiles // at_once, add_next, edges)
