"""The local replacement model: on one prompt, the transformer with its attention patterns and norm denominators frozen.

What is left between MLPs is linear. So `propagate` is a linear function (with the biases, an affine one) of the
embeddings and of what MLPs write, and every edge of an attribution graph is a derivative of it. It runs the block code
of the true pass, with the frozen values put in at their sites.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jclt.mesh import replicate
from jclt.models import PATTERNS_AND_DENOMINATORS, Compose, Edit, Freeze, ModelConfig, Place, Sites
from jclt.models.sites import list_absent_sites
from jclt.models.transformer import apply_norm, block, make_context
from jclt.models.weights import declare_layer_weights
from jclt.numerics import Precision, einsum
from jclt.shapes import Array, Float, Params

Frozen = Mapping[str, Array]
"""Frozen values by site: patterns `[L, H, T, T]` and denominators `[L, T]`; the final norm's denominator is `[T]`."""


class LocalModel(NamedTuple):
    """The settings of a local replacement model; its programs are compiled for them."""

    model: ModelConfig
    reads: str  # the site that the coder reads in each layer
    writes: str  # the site that it writes
    precision: Precision = "float32"  # of the products that edges are summed up from; the true pass is always exact


class Weights(NamedTuple):
    """The weights of the local replacement model."""

    params: Params
    skips: Float[Array, "L D D"] | None  # the coder's affine skips, zero in layers without one


class Reads(NamedTuple):
    """What is read from the residual stream."""

    layers: Float[Array, "L T D"]  # by the coder
    final: Float[Array, "T D"]  # by the unembedding
    heads: Float[Array, "L T H K"] | None = None  # the heads' values, before their output matrices
    streams: Float[Array, "L T D"] | None = None  # what enters each layer


class Masks(NamedTuple):
    """0 where what a head writes, or the residual stream that enters a layer, is a node of its own; else 1. Nothing
    passes through such a node."""

    heads: Float[Array, "*B L T H"]
    streams: Float[Array, "*B L T"]


def list_frozen_sites(config: ModelConfig) -> tuple[str, ...]:
    """The sites that a linear pass needs. The norms of queries and keys only affect the pattern, which is frozen."""
    absent = list_absent_sites(config) | {"query_denominator", "key_denominator"}
    return tuple(name for name in PATTERNS_AND_DENOMINATORS if name not in absent)


def run_layer(
    local: LocalModel,
    weights: Params,
    frozen: Frozen,
    skip: Array | None,
    x: Float[Array, "T D"],
    write: Float[Array, "T D"],
    edit: Edit | None = None,
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """Runs one block whose MLP writes `write`. Returns the residual stream after it, and what the coder reads in it.
    `edit` may see and change further values of the block.

    The attention pattern and the norm denominators are frozen: `Freeze` puts in the values of the true pass and stops
    their gradients. So the block is linear in x and `write`, apart from biases.
    """
    read = x

    def replace_mlp(place: Place, value: Array) -> Array:
        """Keeps what the coder reads, and replaces what the MLP writes by `write` and the coder's skip."""
        nonlocal read
        if place.site == local.reads:
            read = value[0]
        if place.site == local.writes:
            skip_write = 0 if skip is None else replicate(einsum("td,ed->te", read, skip))
            return (write + skip_write)[None]
        return value

    context = make_context(local.model, jnp.arange(x.shape[0])[None], x.shape[0], x.dtype)
    edits = (replace_mlp,) if edit is None else (edit, replace_mlp)
    edit = Compose((Freeze(frozen), *edits))
    # The layer's number only matters for the attention pattern, which is frozen, so any layer may be called 0; the
    # frozen values are those of one layer, without a layer axis, so their sites have no layer.
    x, _ = block(context, weights, 0, Sites(None, edit=edit), x[None], None)
    return x[0], read


def read_final(config: ModelConfig, params: Params, frozen: Frozen, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
    """What the unembedding reads, given the residual stream after the last block. The final norm is frozen, too."""
    return apply_norm(config, params, "final_norm", Sites(None, edit=Freeze(frozen)), x)


class Layers(NamedTuple):
    """The arrays of the local model that have a layer axis, or one layer's part of each."""

    weights: Params
    frozen: Frozen
    skips: Array | None


def stack_layers(local: LocalModel, weights: Weights, frozen: Frozen) -> Layers:
    return Layers(
        weights={name: weights.params[name] for name in declare_layer_weights(local.model)},
        frozen={name: x for name, x in frozen.items() if name != "final_denominator"},
        skips=weights.skips,
    )


def propagate(
    local: LocalModel,
    weights: Weights,
    frozen: Frozen,
    embeddings: Float[Array, "T D"],
    writes: Float[Array, "L T D"],
    masks: Masks | None = None,
) -> Reads:
    """From what enters the residual stream to what is read from it; with masks also what heads and layers read.

    `writes` is what each layer's MLP writes, without the coder's skip: `run_layer` computes it from the layer's read.
    """

    def step(x: Array, inputs: tuple[Layers, Array]) -> tuple[Array, Array]:
        layer, write = inputs
        return run_layer(local, *layer, x, write)

    def step_masked(x: Array, inputs: tuple[Layers, Array, Masks]) -> tuple[Array, tuple[Array, ...]]:
        layer, write, of_layer = inputs
        heads: list[Array] = []

        def mask_heads(place: Place, value: Array) -> Array:
            if place.site != "head_out":
                return value
            heads.append(value[0])
            return value * of_layer.heads[None, :, :, None]

        after, read = run_layer(local, *layer, x * of_layer.streams[:, None], write, mask_heads)
        return after, (read, heads[0], x)

    layers = stack_layers(local, weights, frozen)
    if masks is not None:
        x, (reads, heads, streams) = jax.lax.scan(step_masked, embeddings, (layers, writes, masks))
        return Reads(reads, read_final(local.model, weights.params, frozen, x), heads, streams)
    x, reads = jax.lax.scan(step, embeddings, (layers, writes))
    return Reads(reads, read_final(local.model, weights.params, frozen, x))


def linearize_embeddings(
    local: LocalModel, weights: Weights, frozen: Frozen, writes_like: Array, masks: Masks | None = None
) -> Callable[[Float[Array, "T D"]], Reads]:
    """`propagate` as a linear function of the embeddings: what an embedding alone, without biases, adds to every read.

    `writes_like` only gives the shape and type of the MLPs' writes.
    """
    nothing = jnp.zeros_like(writes_like)

    def from_embeddings(embeddings: Array) -> Reads:
        return propagate(local, weights, frozen, embeddings, nothing, masks)

    return lambda embeddings: jax.jvp(from_embeddings, (jnp.zeros_like(embeddings),), (embeddings,))[1]
