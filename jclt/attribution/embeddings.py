"""Edges from embeddings, the other half of step 3: each embedding goes up through the linear model to all targets at
once, since a prompt has fewer tokens than targets. The same pass gives what biases add to each target.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jclt.attribution.local import LocalModel, Reads, Weights, linearize_embeddings, propagate
from jclt.attribution.sweep.bases import FeatureNodes
from jclt.attribution.sweep.nodes import TargetNodes, VectorNodes
from jclt.attribution.true_pass import TruePass
from jclt.numerics import einsum
from jclt.shapes import Array, Float, Int


class EmbeddingEdges(NamedTuple):
    """The edges into one prompt's targets, in the order of `fold_nodes`, that come from embeddings and biases."""

    values: Float[Array, "N"]  # the targets' values, which all their edges and biases add up to
    bias: Float[Array, "N"]
    tokens: Float[Array, "N T"]
    positions: Float[Array, "N T"] | None


MOST_EMBEDDINGS_AT_ONCE = 16


@partial(jax.jit, static_argnames=("local", "covered", "positions_are_nodes", "at_once"))
@jax.named_scope("trace_embeddings")
def trace_embeddings(
    local: LocalModel,
    covered: tuple[int, ...],
    positions_are_nodes: bool,
    at_once: int,
    weights: Weights,
    true_passes: TruePass,
    features: FeatureNodes,
    outputs: TargetNodes,
    vectors: VectorNodes | None = None,
) -> EmbeddingEdges:
    """For a batch of prompts; `at_once` embeddings of each are carried up together. Position embeddings that are no
    nodes count as a bias."""

    def trace_prompt(
        true_pass: TruePass, features: FeatureNodes, outputs: TargetNodes, vectors: VectorNodes | None
    ) -> EmbeddingEdges:
        masks, layers = None if vectors is None else vectors.masks, local.model.layers

        def read_targets(reads: Reads) -> Float[Array, "N"]:
            of_covered = reads.layers if len(covered) == layers else reads.layers[jnp.asarray(covered)]
            of_layers = of_covered, features.positions, features.encoders
            of_features = jax.lax.map(lambda of_layer: read_features(*of_layer), of_layers)
            of_outputs = reads.layers[jnp.minimum(outputs.layers, layers - 1), outputs.positions]
            is_last = (outputs.layers == layers)[:, None]
            output_reads = jnp.where(is_last, reads.final[outputs.positions], of_outputs)
            parts = [of_features.ravel(), einsum("kd,kd->k", output_reads, outputs.vectors)]
            return jnp.concatenate(parts if vectors is None else [*parts, *vectors.read(reads)])

        carry_up = linearize_embeddings(local, weights, true_pass.frozen, true_pass.reads, masks)

        def trace_each(embeddings: Float[Array, "T D"]) -> Float[Array, "N T"]:
            def trace_one(position: Array) -> Float[Array, "N"]:
                at_position = jax.nn.one_hot(position, embeddings.shape[0], dtype=embeddings.dtype)
                return read_targets(carry_up(at_position[:, None] * embeddings))

            return jax.lax.map(trace_one, jnp.arange(embeddings.shape[0]), batch_size=at_once).T

        others = len(outputs.layers) + (0 if vectors is None else vectors.total)
        encoder_bias = jnp.concatenate([features.biases.ravel(), jnp.zeros(others, features.biases.dtype)])
        constant_embeddings = jnp.zeros_like(true_pass.tokens)
        if true_pass.positions is not None and not positions_are_nodes:
            constant_embeddings = true_pass.positions
        bias_reads = propagate(local, weights, true_pass.frozen, constant_embeddings, true_pass.constant, masks)
        position_nodes = true_pass.positions if positions_are_nodes else None
        return EmbeddingEdges(
            values=read_targets(Reads(true_pass.reads, true_pass.final, true_pass.heads, true_pass.streams))
            + encoder_bias,
            bias=read_targets(bias_reads) + encoder_bias,
            tokens=trace_each(true_pass.tokens),
            positions=None if position_nodes is None else trace_each(position_nodes),
        )

    def read_features(
        reads: Float[Array, "T D"], positions: Int[Array, "n"], encoders: Float[Array, "n D"]
    ) -> Float[Array, "n"]:
        return einsum("nd,nd->n", reads[positions], encoders)

    return jax.vmap(trace_prompt)(true_passes, features, outputs, vectors)
