"""Step 1, the true pass: runs the model on a batch of prompts."""

from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jclt.attribution.local import Frozen, LocalModel, Weights, list_frozen_sites
from jclt.coders import Coder
from jclt.mesh import replicate
from jclt.models import ModelConfig, forward, ops
from jclt.models.weights import declare_layer_weights
from jclt.numerics import at_least_float32, einsum
from jclt.shapes import Array, Bool, Float, Int, Params, Tokens

Tree = TypeVar("Tree")


class TruePass(NamedTuple):
    """The true pass over prompts; each array has a leading batch axis."""

    logits: Float[Array, "V"]  # at the last position
    frozen: Frozen
    tokens: Float[Array, "T D"]  # token embeddings, as they enter the residual stream
    positions: Float[Array, "T D"] | None  # position embeddings, where the model learns them
    reads: Float[Array, "L T D"]  # what the coder reads
    final: Float[Array, "T D"]  # what the unembedding reads
    constant: Float[Array, "L T D"]  # writes of no node: decoder biases, and all that silent positions write
    unexplained: Float[Array, "L T D"] | None  # the writes of features and errors: without `constant` and skips
    heads: Float[Array, "L T H K"] | None = None  # where heads or streams may be nodes: the heads' values,
    streams: Float[Array, "L T D"] | None = None  # and what enters each layer

    def drop_unexplained(self) -> "TruePass":
        """What is needed after the sources are gathered."""
        return self._replace(unexplained=None)


def widen(tree: Tree) -> Tree:
    """Weights in at least float32. Half precision converts to it exactly, and products are then computed in it."""

    def widen_leaf(x: Array) -> Array:
        return x.astype(at_least_float32(x.dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(widen_leaf, tree)


def widen_outside_layers(config: ModelConfig, params: Params) -> Params:
    """The model's parameters, those outside its layers in at least float32. The residual stream then has at least
    float32, and each layer's weights are widened while that layer is computed."""
    layers = declare_layer_weights(config)
    return {name: x if name in layers else widen(x) for name, x in params.items()}


@partial(jax.jit, static_argnames=("local", "silent", "for_vectors"))
@jax.named_scope("true_pass")
def run_true_pass(
    local: LocalModel,
    weights: Weights,
    biases: Float[Array, "L D"],
    tokens: Tokens,
    lengths: Int[Array, "B"],
    silent: int,
    for_vectors: bool = False,
) -> TruePass:
    """Runs the model on prompts that are padded at the end to one length. What is written at the first `silent`
    positions belongs to no node. `biases` are the coder's, of what it writes. `for_vectors` asks for what
    `vectors.py` needs."""
    model, params = local.model, weights.params
    frozen_sites = list_frozen_sites(model)
    embeddings = ("token_embedding", *(("position_embedding",) if model.learned_positions else ()))
    capture = (*frozen_sites, *embeddings, local.reads, local.writes, "resid_final")
    capture = (*capture, "head_out", "resid_pre") if for_vectors else capture
    _, seen, _ = forward(model, params, tokens, capture=capture)
    reads, writes = seen[local.reads], seen[local.writes]
    last = jnp.take_along_axis(seen["resid_final"], lengths[:, None, None] - 1, axis=1)
    table = params["token_embedding" if model.tied else "unembedding"]
    logits = ops.soft_cap(einsum("btd,vd->btv", last, table), model.logit_softcap)[:, 0]

    has_nodes = find_positions_with_nodes(lengths, tokens.shape[1], silent)
    constant = jnp.broadcast_to(biases[:, None, None].astype(writes.dtype), writes.shape)
    skip_writes = jnp.zeros_like(reads)
    if weights.skips is not None:
        skip_writes = replicate(einsum("lbtd,led->lbte", reads, weights.skips))
    constant = jnp.where(has_nodes[None, :, :, None], constant, writes - skip_writes)

    def prompts_first(x: Array) -> Array:
        return jnp.moveaxis(x, 1, 0)

    return TruePass(
        logits=logits,
        frozen={
            name: seen[name] if name == "final_denominator" else prompts_first(seen[name]) for name in frozen_sites
        },
        tokens=seen["token_embedding"],
        positions=seen.get("position_embedding"),
        reads=prompts_first(reads),
        final=seen["resid_final"],
        constant=prompts_first(constant),
        unexplained=prompts_first(writes - skip_writes - constant),
        heads=prompts_first(seen["head_out"]) if for_vectors else None,
        streams=prompts_first(seen["resid_pre"]) if for_vectors else None,
    )


def find_positions_with_nodes(lengths: Int[Array, "B"], length: int, silent: int) -> Bool[Array, "B T"]:
    """All but the first `silent` positions of prompts that are padded at the end."""
    positions = jnp.arange(length, dtype=lengths.dtype)
    return (positions[None] < lengths[:, None]) & (positions[None] >= silent)


def stack_biases(coder: Coder, layers: int) -> Float[Array, "L D"]:
    """What the coder writes at each of the model's layers whatever it reads; 0 where it does not cover the layer."""
    covered = coder.config.covered
    biases = jnp.stack([widen(coder.decoder_bias(index)) for index in range(len(covered))])
    return jnp.zeros((layers, biases.shape[1]), biases.dtype).at[jnp.asarray(covered)].set(biases)


def stack_skips(coder: Coder, layers: int) -> Float[Array, "L D D"] | None:
    """The affine skip of each of the model's layers, if the coder has any."""
    covered = coder.config.covered
    skips = [widen(skip) for index in range(len(covered)) if (skip := coder.skip(index)) is not None]
    if not skips:
        return None
    return jnp.zeros((layers, *skips[0].shape), skips[0].dtype).at[jnp.asarray(covered)].set(jnp.stack(skips))
