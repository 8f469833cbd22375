"""Gradients of the outputs, carried down the local replacement model from layer to layer. `scores.py` adds to them what
goes through features."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jclt.attribution.local import Frozen, Layers, LocalModel, Weights, read_final, run_layer, stack_layers
from jclt.attribution.sweep.nodes import TargetNodes, begin_gradients
from jclt.models import Place
from jclt.numerics import einsum
from jclt.shapes import Array, Float, Int


class Gradients(NamedTuple):
    """Those of the outputs' weighted sum, in all layers (`vectors.py`)."""

    heads: Float[Array, "B L T H K"]  # by the heads' values, before their output matrices
    streams: Float[Array, "B L T D"]  # by what enters each layer


@partial(jax.jit, static_argnames=("local",))
@jax.named_scope("score_features")
def begin_at_outputs(
    local: LocalModel, weights: Weights, frozen: Frozen, outputs: TargetNodes
) -> Float[Array, "B k T D"]:
    """The gradients of the outputs with respect to the residual stream after the last layer."""

    def begin(frozen: Frozen, outputs: TargetNodes) -> Float[Array, "k T D"]:
        gradients = begin_outputs(outputs, local.model.layers, frozen)
        _, pull = jax.vjp(partial(read_final, local.model, weights.params, frozen), jnp.zeros_like(gradients[0]))
        return jax.vmap(pull)(gradients)[0]

    return jax.vmap(begin)(frozen, outputs)


def begin_outputs(outputs: TargetNodes, layer: int | Array, frozen: Frozen) -> Float[Array, "k T D"]:
    return jnp.moveaxis(begin_gradients(outputs, layer, frozen["final_denominator"].shape[-1]), 1, 0)


@partial(jax.jit, static_argnames=("local",))
@jax.named_scope("score_features")
def pull_to_write(
    local: LocalModel, weights: Weights, frozen: Frozen, layer: Int[Array, ""], stream: Float[Array, "B k T D"]
) -> Float[Array, "B k T D"]:
    """Carries gradients from a layer's output to what its MLP writes."""

    def pull_prompt(frozen: Frozen, stream: Array) -> Array:
        pull = transpose_layer(local, weights, frozen, layer, stream[0])
        return jax.vmap(lambda gradient: pull((gradient, jnp.zeros_like(gradient)))[1])(stream)

    return jax.vmap(pull_prompt)(frozen, stream)


@partial(jax.jit, static_argnames=("local",))
@jax.named_scope("score_features")
def pull_to_input(
    local: LocalModel,
    weights: Weights,
    frozen: Frozen,
    layer: Int[Array, ""],
    outputs: TargetNodes,
    stream: Float[Array, "B k T D"],
    to_read: Float[Array, "B k T D"],
) -> Float[Array, "B k T D"]:
    """Carries gradients from a layer's output, and from what its features and outputs read, to its input."""

    def pull_prompt(frozen: Frozen, outputs: TargetNodes, stream: Array, to_read: Array) -> Array:
        pull = transpose_layer(local, weights, frozen, layer, stream[0])
        to_read = to_read + begin_outputs(outputs, layer, frozen)
        return jax.vmap(lambda *gradients: pull(gradients)[0])(stream, to_read)

    return jax.vmap(pull_prompt)(frozen, outputs, stream, to_read)


@partial(jax.jit, static_argnames=("local",))
@jax.named_scope("score_features")
def pull_to_vectors(
    local: LocalModel,
    weights: Weights,
    frozen: Frozen,
    layer: Int[Array, ""],
    outputs: TargetNodes,
    output_weights: Float[Array, "B k"],
    stream: Float[Array, "B k T D"],
    to_read: Float[Array, "B k T D"],
) -> Gradients:
    """One layer's gradients of the outputs' weighted sum."""

    def pull_prompt(
        frozen: Frozen, outputs: TargetNodes, output_weights: Array, stream: Array, to_read: Array
    ) -> Gradients:
        to_read = to_read + begin_outputs(outputs, layer, frozen)
        sums = tuple(einsum("k,ktd->td", output_weights, x) for x in (stream, to_read))
        nothing = jnp.zeros_like(stream[0])

        def run(added: Float[Array, "T H K"], x: Array) -> tuple[Array, Array]:
            def add(place: Place, value: Array) -> Array:
                return value + added[None] if place.site == "head_out" else value

            return run_layer(local, *take_layer_of(local, weights, frozen, layer), x, nothing, add)

        added = jnp.zeros((len(nothing), local.model.heads, local.model.head_size), nothing.dtype)
        return Gradients(*jax.vjp(run, added, nothing)[1](sums))

    return jax.vmap(pull_prompt)(frozen, outputs, output_weights, stream, to_read)


def transpose_layer(
    local: LocalModel, weights: Weights, frozen: Frozen, layer: Array, like: Float[Array, "T D"]
) -> Any:
    """The transpose of `run_layer`: from gradients of its results to those of the residual stream before it and of
    what its MLP writes."""
    run = partial(run_layer, local, *take_layer_of(local, weights, frozen, layer))
    return jax.vjp(run, jnp.zeros_like(like), jnp.zeros_like(like))[1]


def take_layer_of(local: LocalModel, weights: Weights, frozen: Frozen, layer: Array) -> Layers:
    def take(x: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)

    return jax.tree.map(take, stack_layers(local, weights, frozen))
