"""Edges: the derivative of a target's value with respect to what is written at the source's position, times what the
source writes there.

    edge(source -> target) = sum over layers l: gradient(target)[l, position of source] . write(source)[l]

A target's gradient begins with its own vector, at the layer and position where it reads, and goes down the layers:
`jax.vjp` of one layer of the linear model carries it from the layer's output to its input. There its product with what
each source writes below is that layer's share of the edge.

Targets go down in blocks, from the layer of its highest target each. A block leaves out the positions after its last
target, since they cannot reach it. Edges from embeddings come from `embeddings.py`, so no gradient goes below the first
layer's output.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jclt.attribution.local import LocalModel
from jclt.attribution.sweep.columns import Columns, meet_columns
from jclt.attribution.sweep.folding import FoldedLayer, FoldedWeights, read_folded_layer_at, run_folded_layer
from jclt.attribution.sweep.nodes import PromptNodes, Sweep, TargetNodes, begin_gradients, map_over_prompts
from jclt.attribution.sweep.tiles import Layout
from jclt.attribution.sweep.vector_edges import (
    VectorEdges,
    cross_vectors,
    make_vector_edges,
    take_vector_targets,
)
from jclt.numerics import einsum
from jclt.shapes import Array, Float, Int


class Blocks(NamedTuple):
    """Blocks of R targets, each of one prompt; those from `used` on are padding."""

    used: Int[Array, "1"]
    prompts: Int[Array, "M"]
    numbers: Int[Array, "M R"]  # among the prompt's targets
    tops: Int[Array, "M"]  # the highest layer in which one of them reads
    stop_indices: Int[Array, "M"]  # in the program's `stops`: of the first one beyond all their positions


class Edges(NamedTuple):
    """The edges into the targets of M blocks, or of one."""

    features: Float[Array, "*M G K R S"]  # by group of tiles, tile and slot
    errors: Float[Array, "*M L T R"]
    columns: Float[Array, "*M N R s"] | None  # from the sources below the cut, by block of sources
    vectors: VectorEdges | None = None


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
    columns: Columns | None,
    blocks: Blocks,
) -> Edges:
    """Traces blocks one after the other, on each device those of its own prompts."""

    def trace_on_device(weights: FoldedWeights, prompts: PromptNodes, columns: Columns | None, blocks: Blocks) -> Edges:
        sweep = Sweep(local, layout, start, stops, weights, prompts)
        count, size = blocks.numbers.shape
        nothing = make_edges(sweep, columns, size)
        edges = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), nothing)

        def trace_next(number: Array, edges: Edges) -> Edges:
            of_block = trace_block(sweep, columns, *(x[number] for x in blocks[1:]))
            return jax.tree.map(lambda all_edges, x: all_edges.at[number].set(x), edges, of_block)

        return jax.lax.fori_loop(0, blocks.used[0], trace_next, edges)

    return map_over_prompts(mesh, trace_on_device, weights, prompts, columns, blocks)


def make_edges(sweep: Sweep, columns: Columns | None, targets: int) -> Edges:
    """Zeros for one block of so many targets."""
    layout, dtype = sweep.layout, sweep.dtype
    return Edges(
        features=jnp.zeros((layout.groups, layout.tiles, targets, layout.tile_size), dtype),
        errors=jnp.zeros((sweep.local.model.layers, sweep.stops[-1], targets), dtype),
        columns=columns and jnp.zeros((columns.streams.shape[1], targets, columns.streams.shape[3]), dtype),
        vectors=make_vector_edges(sweep, targets),
    )


def trace_block(
    sweep: Sweep,
    columns: Columns | None,
    prompt: Int[Array, ""],
    numbers: Int[Array, "R"],
    top: Int[Array, ""],
    stop_index: Int[Array, ""],
) -> Edges:
    """The edges into one block of targets."""
    targets = TargetNodes(*(x[prompt, numbers] for x in sweep.prompts.targets))
    targets = targets._replace(positions=targets.positions - sweep.start)
    vectors = sweep.prompts.vectors
    begins = None if vectors is None else take_vector_targets(sweep, vectors, prompt, numbers, targets)
    last, floor = sweep.local.model.layers, jnp.zeros_like(top) if columns is None else columns.cuts[prompt]

    def trace_layer(number: Array, carry: tuple[Array, Edges]) -> tuple[Array, Edges]:
        layer, (stream, edges) = top - number, carry
        folded = sweep.take_layer(prompt, jnp.minimum(layer, last - 1))
        begin = partial(begin_gradients, targets, layer, sweep.stops[-1])
        cases = [
            lambda stream: begin(),  # of what the unembedding reads
            lambda stream: pull_first(sweep, folded, layer, targets),
            lambda stream: pull_back(sweep, folded, stop_index, stream, begin()),
        ]
        above, stream = stream, jax.lax.switch(jnp.where(layer == last, 0, jnp.where(number == 0, 1, 2)), cases, stream)
        if vectors is not None and begins is not None:
            cross = partial(cross_vectors, sweep, vectors, begins, targets, prompt, layer, folded, above)
            stream, crossed = jax.lax.cond(layer < last, cross, lambda *same: same, stream, edges.vectors)
            edges = edges._replace(vectors=crossed)
        step = LayerStep(prompt, layer - 1, stop_index)
        edges = jax.lax.cond(
            step.layer >= floor, partial(add_shares, sweep, step), lambda stream, edges: edges, stream, edges
        )
        return stream, edges

    stream = jnp.zeros((sweep.stops[-1], len(numbers), sweep.width), sweep.dtype)
    # Only the heads of the first layer lead into features there.
    layers = top + 1 - (jnp.maximum(floor, 1) if vectors is None or vectors.values is None else 0)
    stream, edges = jax.lax.fori_loop(0, layers, trace_layer, (stream, make_edges(sweep, columns, len(numbers))))
    if columns is None:
        return edges
    stop = jnp.asarray(sweep.stops)[stop_index]
    return edges._replace(columns=meet_columns(sweep.local.precision, columns, prompt, stop, stream))


def pull_back(
    sweep: Sweep, folded: FoldedLayer, stop_index: Array, stream: Float[Array, "T R D"], begun: Float[Array, "T R D"]
) -> Float[Array, "T R D"]:
    """Carries gradients from a layer's output, and those that begin at what its coder reads, to its input."""

    def pull_positions(stop: int, stream: Array, begun: Array) -> Array:
        run = partial(run_folded_layer, sweep.local, folded.select(slice(stop)))
        _, pull = jax.vjp(run, jnp.zeros_like(stream[:stop]))
        return stream.at[:stop].set(pull((stream[:stop], begun[:stop]))[0])

    return jax.lax.switch(stop_index, [partial(pull_positions, stop) for stop in sweep.stops], stream, begun)


def pull_first(sweep: Sweep, folded: FoldedLayer, layer: Array, targets: TargetNodes) -> Float[Array, "T R D"]:
    """What `pull_back` does where no gradient comes from above. Then each has one position."""
    vectors = jnp.where((targets.layers == layer)[:, None], targets.vectors, 0)
    read = partial(read_folded_layer_at, sweep.local, folded, targets.positions)
    _, pull = jax.vjp(read, jnp.zeros((sweep.stops[-1], *vectors.shape), vectors.dtype))
    return pull(vectors)[0]


class LayerStep(NamedTuple):
    """Where a block is on its way down."""

    prompt: Int[Array, ""]
    layer: Int[Array, ""]  # whose output has been reached
    stop_index: Int[Array, ""]


def add_shares(sweep: Sweep, step: LayerStep, stream: Float[Array, "T R D"], edges: Edges) -> Edges:
    """Adds one layer's term of the formula at the head of this file: gradients of the layer's output times what each
    source writes there."""
    covered, layer = sweep.layout.layers, step.layer
    errors = sweep.prompts.sources.errors[step.prompt, layer, sweep.start :]
    to_errors = einsum("trd,td->tr", stream, errors, precision=sweep.local.precision)
    if len(covered) == sweep.local.model.layers:
        to_features = add_features(sweep, step, layer, stream, edges.features)
    else:
        to_features = jax.lax.cond(
            jnp.isin(layer, jnp.asarray(covered)),
            partial(add_features, sweep, step, jnp.searchsorted(jnp.asarray(covered), layer).astype(layer.dtype)),
            lambda stream, features: features,
            stream,
            edges.features,
        )
    return edges._replace(features=to_features, errors=edges.errors.at[layer].set(to_errors))


def add_features(
    sweep: Sweep,
    step: LayerStep,
    index: Int[Array, ""],
    stream: Float[Array, "T R D"],
    edges: Float[Array, "G K R S"],
) -> Float[Array, "G K R S"]:
    """Adds the products with what features write to the covered layer of this index. It skips tiles that hold only
    features of higher layers, which are not kept for this layer, and those at positions that no target of the block
    reads."""
    layout, sources = sweep.layout, sweep.prompts.sources
    at_once = layout.tiles_at_once
    group, start = index if layout.groups > 1 else jnp.zeros_like(index), sources.starts[step.prompt, index]
    positions = sources.tile_positions[step.prompt, group] - sweep.start
    needed = sources.tile_layers[step.prompt, group] <= step.layer
    needed = needed & (positions < jnp.asarray(sweep.stops)[step.stop_index])

    def add_next(number: Array, edges: Array) -> Array:
        first, zero = number * at_once, jnp.zeros_like(number)
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=at_once)

        def multiply(edges: Array) -> Array:
            place, shape = (step.prompt, start + first, zero, zero), (1, at_once, *sources.tiles.shape[2:])
            writes = jax.lax.dynamic_slice(sources.tiles, place, shape)[0]
            shares = einsum("krd,ksd->krs", stream[cut(positions)], writes, precision=sweep.local.precision)[None]
            before = jax.lax.dynamic_slice(edges, (group, first, zero, zero), shares.shape)
            return jax.lax.dynamic_update_slice(edges, before + shares, (group, first, zero, zero))

        return jax.lax.cond(jnp.any(cut(needed)), multiply, lambda edges: edges, edges)

    return jax.lax.fori_loop(0, layout.tiles // at_once, add_next, edges)
