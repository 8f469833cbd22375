"""Step 1, the true pass: runs the model on a batch of prompts, and the coder on the values that it reads there."""

from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jclt.attribution.local import Frozen, LocalModel, list_frozen_sites
from jclt.coders import Coder
from jclt.models import forward, ops
from jclt.numerics import at_least_float32, einsum
from jclt.shapes import Array, Float, Int, Params, Tokens

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
    counts: Int[Array, "C T"]  # the number of active features
    activations: Float[Array, "C T F"] | None  # 0 at silent positions and at padding
    unexplained: Float[Array, "L T D"] | None  # the writes of features and errors: without `constant` and skips

    def drop_activations(self) -> "TruePass":
        """What is needed after the sources are gathered."""
        return self._replace(activations=None, unexplained=None)


def widen(tree: Tree) -> Tree:
    """Weights in at least float32. Half precision converts to it exactly, and products are then computed in it."""

    def widen_leaf(x: Array) -> Array:
        return x.astype(at_least_float32(x.dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(widen_leaf, tree)


@partial(jax.jit, static_argnames=("local", "silent"))
@jax.named_scope("true_pass")
def run_true_pass(
    local: LocalModel, params: Params, coder: Coder, tokens: Tokens, lengths: Int[Array, "B"], silent: int
) -> TruePass:
    """Runs the model on prompts that are padded at the end to one length. What is written at the first `silent`
    positions belongs to no node."""
    model, covered = local.model, coder.config.covered
    frozen_sites = list_frozen_sites(model)
    embeddings = ("token_embedding", *(("position_embedding",) if model.learned_positions else ()))
    capture = (*frozen_sites, *embeddings, local.reads, local.writes, "resid_final")
    _, seen, _ = forward(model, params, tokens, capture=capture)
    reads, writes = seen[local.reads], seen[local.writes]
    last = jnp.take_along_axis(seen["resid_final"], lengths[:, None, None] - 1, axis=1)
    table = params["token_embedding" if model.tied else "unembedding"]
    logits = ops.soft_cap(einsum("btd,vd->btv", last, table), model.logit_softcap)[:, 0]

    positions = jnp.arange(tokens.shape[1], dtype=lengths.dtype)
    has_nodes = (positions[None] < lengths[:, None]) & (positions[None] >= silent)
    wide_coder = widen(coder)
    encoded = jnp.stack([wide_coder.encode(index, reads[layer]) for index, layer in enumerate(covered)])
    activations = jnp.where(has_nodes[None, :, :, None], encoded, 0)
    biases = jnp.stack([wide_coder.decoder_bias(index) for index in range(len(covered))])
    constant = jnp.zeros_like(writes).at[jnp.asarray(covered)].set(biases[:, None, None])
    skip_writes = write_skips(coder, reads)
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
        counts=prompts_first(jnp.sum(activations != 0, axis=-1)),
        activations=prompts_first(activations),
        unexplained=prompts_first(writes - skip_writes - constant),
    )


def stack_skips(coder: Coder, layers: int) -> Float[Array, "L D D"] | None:
    """The affine skip of each of the model's layers, if the coder has any."""
    covered = coder.config.covered
    skips = [widen(skip) for index in range(len(covered)) if (skip := coder.skip(index)) is not None]
    if not skips:
        return None
    return jnp.zeros((layers, *skips[0].shape), skips[0].dtype).at[jnp.asarray(covered)].set(jnp.stack(skips))


def write_skips(coder: Coder, reads: Float[Array, "L *N D"]) -> Float[Array, "L *N D"]:
    """What affine skips write, given what each layer's coder reads."""
    skips = stack_skips(coder, reads.shape[0])
    return jnp.zeros_like(reads) if skips is None else einsum("l...d,led->l...e", reads, skips)
