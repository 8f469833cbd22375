"""The sources and targets of edges (the end of step 2), folded, and what one call of the sweep is computed from."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jclt.attribution.local import Frozen, LocalModel, Reads, Weights
from jclt.attribution.sweep.bases import FeatureNodes, SourceWrites, locate_tiles
from jclt.attribution.sweep.folding import (
    FoldedLayer,
    FoldedPrompt,
    FoldedWeights,
    fold_prompt,
    fold_targets,
    fold_writes,
    invert_write_norms,
    writes_through_norm,
)
from jclt.attribution.sweep.tiles import NO_LAYER, Layout
from jclt.attribution.sweep.vectors import FoldedVectors, VectorNodes, fold_vectors
from jclt.mesh import AnyMesh, gather_shards
from jclt.shapes import Array, DTypeLike, Float, Int


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
    vectors: FoldedVectors | None = None  # the heads and residual streams that are nodes


def fold_nodes(
    local: LocalModel,
    layout: Layout,
    weights: Weights,
    frozen: Frozen,
    features: FeatureNodes,
    outputs: TargetNodes,
    sources: SourceWrites,
    vectors: tuple[FoldedWeights, VectorNodes, Reads] | None = None,
) -> PromptNodes:
    """The nodes of a batch of prompts. `vectors` has the folded weights, the heads and residual streams that are nodes,
    and what the true pass reads."""
    folded, targets, folded_vectors = fold_models(local, layout, weights, frozen, features, outputs, vectors)
    if writes_through_norm(local):
        sources = fold_sources(local, layout, weights, frozen, sources)
    return PromptNodes(folded, sources, targets, folded_vectors)


@partial(jax.jit, static_argnames=("local", "layout"), donate_argnames=("sources",))
@jax.named_scope("fold_nodes")
def fold_sources(
    local: LocalModel, layout: Layout, weights: Weights, frozen: Frozen, sources: SourceWrites
) -> SourceWrites:
    def fold(frozen: Frozen, sources: SourceWrites) -> SourceWrites:
        scales = invert_write_norms(local, frozen)
        layers, positions = locate_tiles(layout, sources.starts, sources.tile_positions)
        tiles = fold_writes(local, weights.params, layers, sources.tiles) * scales[layers, positions][:, None, None]
        errors = fold_writes(local, weights.params, jnp.arange(len(scales)), sources.errors) * scales[:, :, None]
        return sources._replace(tiles=tiles, errors=errors)

    return jax.vmap(fold)(frozen, sources)


@partial(jax.jit, static_argnames=("local", "layout"))
@jax.named_scope("fold_nodes")
def fold_models(
    local: LocalModel,
    layout: Layout,
    weights: Weights,
    frozen: Frozen,
    features: FeatureNodes,
    outputs: TargetNodes,
    vectors: tuple[FoldedWeights, VectorNodes, Reads] | None = None,
) -> tuple[FoldedPrompt, TargetNodes, FoldedVectors | None]:
    """The linear models of a batch of prompts, and the targets: the prompt's features layer by layer, padding included,
    then its outputs, then heads and residual streams."""

    def fold(
        frozen: Frozen,
        features: FeatureNodes,
        outputs: TargetNodes,
        vector_nodes: tuple[VectorNodes, Reads] | None,
    ) -> tuple[FoldedPrompt, TargetNodes, FoldedVectors | None]:
        encoders = features.encoders.reshape(-1, features.encoders.shape[-1])
        layers = jnp.repeat(jnp.asarray(layout.layers), features.valid.shape[1]).astype(outputs.layers.dtype)
        layers = jnp.concatenate([layers, outputs.layers])
        positions = jnp.concatenate([features.positions.ravel(), outputs.positions])
        vectors = jnp.concatenate([encoders, outputs.vectors])
        vectors = fold_targets(local, weights.params, frozen, layers, positions, vectors)
        folded, targets = fold_prompt(local, weights, frozen), TargetNodes(layers, positions, vectors)
        return (folded, targets, None) if vector_nodes is None else add_vectors(folded, targets, frozen, *vector_nodes)

    def add_vectors(
        folded: FoldedPrompt, targets: TargetNodes, frozen: Frozen, vector_nodes: VectorNodes, true_reads: Reads
    ) -> tuple[FoldedPrompt, TargetNodes, FoldedVectors]:
        assert folded_weights is not None
        folded_vectors, gradients = fold_vectors(local, folded_weights, frozen, vector_nodes, true_reads)
        layers, positions, vectors = targets
        nothing = jnp.full(len(gradients), NO_LAYER, layers.dtype)  # they do not read where features do
        targets = TargetNodes(
            layers=jnp.concatenate([layers, nothing]),
            positions=jnp.concatenate([positions, jnp.zeros_like(nothing, positions.dtype)]),
            vectors=jnp.concatenate([vectors, gradients.astype(vectors.dtype)]),
        )
        patterns = folded.patterns * jnp.moveaxis(vector_nodes.masks.heads, 1, 2)[..., None]
        return folded._replace(patterns=patterns), targets, folded_vectors

    folded_weights, vector_nodes = (None, None) if vectors is None else (vectors[0], vectors[1:])
    return jax.vmap(fold)(frozen, features, outputs, vector_nodes)


def begin_gradients(targets: TargetNodes, layer: int | Array, length: int) -> Float[Array, "T N D"]:
    """The gradients that begin in this layer: the vectors of the targets that read here at their positions, else 0."""
    dtype = targets.vectors.dtype
    at_position = jax.nn.one_hot(targets.positions, length, axis=0, dtype=dtype)
    reads_here = (targets.layers == layer).astype(dtype)
    return (at_position * reads_here[None])[:, :, None] * targets.vectors[None]


Result = TypeVar("Result")


def count_prompt_shards(mesh: AnyMesh) -> int:
    """On how many devices prompts are shared out. On the mesh of a split model each device has all prompts."""
    return mesh.shape.get("prompts", 1)


def map_over_prompts(mesh: Mesh, function: Callable[..., Result], weights: FoldedWeights, *of_prompts: Any) -> Result:
    """Calls a function on each device, with all weights and the arrays of its own prompts. On the mesh of a split model
    it gets its shards of the weights, and what their types say of other arrays."""
    if mesh.size == 1:
        return function(weights, *of_prompts)
    split = P(mesh.axis_names)
    specs: Any = (P(), *[split] * len(of_prompts))
    if count_prompt_shards(mesh) == 1:
        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (weights, *of_prompts))
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)(weights, *of_prompts)


class Sweep(NamedTuple):
    """The arrays and settings that all blocks of one call share."""

    local: LocalModel
    layout: Layout
    start: int  # the first position with sources
    stops: tuple[int, ...]  # numbers of positions, counted from `start`
    weights: FoldedWeights
    prompts: PromptNodes

    @property
    def width(self) -> int:
        return self.local.model.width

    @property
    def dtype(self) -> DTypeLike:
        return self.prompts.targets.vectors.dtype

    def take_layer(self, prompt: Array, layer: Array) -> FoldedLayer:
        folded, weights, start, c = self.prompts.folded, self.weights, self.start, self.local.model
        return FoldedLayer(
            values=gather_shards(weights.values[layer], (c.width, c.key_heads, c.head_size)),
            outputs=gather_shards(weights.outputs[layer], (c.heads, c.head_size, c.width)),
            skip=None if weights.skips is None else gather_shards(weights.skips[layer], (c.width, c.width)),
            pattern=folded.patterns[prompt, layer, :, start:, start:],
            skip_scale=None if folded.skip_scales is None else folded.skip_scales[prompt, layer, start:],
        )
