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
from jclt.models import PATTERNS_AND_DENOMINATORS, Compose, Freeze, ModelConfig, Place, Sites
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
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """Runs one block whose MLP writes `write`. Returns the residual stream after it, and what the coder reads in it.

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
    edit = Compose((Freeze(frozen), replace_mlp))
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
) -> Reads:
    """From what enters the residual stream to what is read from it.

    `writes` is what each layer's MLP writes, without the coder's skip: `run_layer` computes it from the layer's read.
    """

    def step(x: Array, inputs: tuple[Layers, Array]) -> tuple[Array, Array]:
        layer, write = inputs
        return run_layer(local, *layer, x, write)

    x, reads = jax.lax.scan(step, embeddings, (stack_layers(local, weights, frozen), writes))
    return Reads(reads, read_final(local.model, weights.params, frozen, x))


def linearize_embeddings(
    local: LocalModel, weights: Weights, frozen: Frozen, writes_like: Array
) -> Callable[[Float[Array, "T D"]], Reads]:
    """`propagate` as a linear function of the embeddings: what an embedding alone, without biases, adds to every read.

    `writes_like` only gives the shape and type of the MLPs' writes.
    """
    nothing = jnp.zeros_like(writes_like)

    def from_embeddings(embeddings: Array) -> Reads:
        return propagate(local, weights, frozen, embeddings, nothing)

    return lambda embeddings: jax.jvp(from_embeddings, (jnp.zeros_like(embeddings),), (embeddings,))[1]
