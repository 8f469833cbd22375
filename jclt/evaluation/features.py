"""Reads features in the true model, and runs it with features set to other values."""

import equinox as eqx
import jax
import jax.numpy as jnp

from jclt.coders import Coder
from jclt.kernels.matmuls import sharded_einsum
from jclt.mesh import shard_by_axes, shard_like
from jclt.models import ModelConfig, Replace, forward
from jclt.shapes import Array, ArrayLike, Bool, Float, Int, Logits, Params, Tokens


def read_features(
    config: ModelConfig, params: Params, coder: Coder, layers: tuple[int, ...], tokens: Tokens
) -> tuple[list[Float[Array, "B T F"]], list[Float[Array, "B T D"]]]:
    """Activations in these covered layers for what the unchanged model computes, and what its layers write."""
    reads, writes, covered = coder.config.reads, coder.config.writes, coder.config.covered
    _, seen, _ = forward(config, params, tokens, capture=(reads, writes))
    inputs = {i: shard_by_axes(seen[reads][covered[i]], ("tokens", None, None)) for i in layers}
    return [coder.encode(i, inputs[i]) for i in layers], [seen[writes][covered[i]] for i in layers]


def run_with_features(
    config: ModelConfig,
    params: Params,
    coder: Coder,
    layers: tuple[int, ...],
    tokens: Tokens,
    values: Float[Array, "l B T F"],
    where: Bool[Array, "l B T F"],
) -> Logits:
    """The true model's logits when features of these layers have `values` where the mask `where` is true.

    These layers write what they wrote on the unchanged prompt, plus the change that the features make. They are frozen
    there, so that none of them responds a second time to the change of an earlier one. Later layers are computed by the
    model, so what features write to them is not added. Attention is not frozen.
    """
    activations, writes = read_features(config, params, coder, layers, tokens)
    changes = [
        jnp.where(shard_like(where[i], a), shard_like(values[i], a).astype(a.dtype) - a, jnp.zeros_like(a))
        for i, a in enumerate(activations)
    ]
    changed_writes: list[Array] = []
    for i, target in enumerate(layers):
        out = writes[i]
        for source, change in zip(layers[: i + 1], changes, strict=False):
            if target - source < coder.config.reach(source):
                row = coder.decoder_rows(source)[:, target - source]
                written = sharded_einsum("btf,fd->btd", change, row)
                out = out + shard_by_axes(written, ("batch", None, None)).astype(out.dtype)
        changed_writes.append(out)

    covered = [coder.config.covered[i] for i in layers]
    edit = Replace({coder.config.writes: jnp.stack(changed_writes)}, value_layers=covered)
    return forward(config, params, tokens, edit=edit, unroll=True)[0]


@eqx.filter_jit
def compute_features(
    config: ModelConfig, params: Params, coder: Coder, layers: tuple[int, ...], tokens: Tokens
) -> Float[Array, "l B T F"]:
    """The activations, replicated on every device."""
    activations, _ = read_features(config, params, coder, layers, tokens)
    return shard_by_axes(jnp.stack(activations), (None,) * 4)


@eqx.filter_jit
def predict_with_features(
    config: ModelConfig,
    params: Params,
    coder: Coder,
    layers: tuple[int, ...],
    tokens: Tokens,
    values: Float[ArrayLike, "l B T F"],
    where: Bool[ArrayLike, "l B T F"],
) -> Int[Array, "B T"]:
    """The most probable next tokens under `with_features`."""
    logits = run_with_features(config, params, coder, layers, tokens, jnp.asarray(values), jnp.asarray(where))
    return shard_by_axes(jnp.argmax(logits, axis=-1), (None, None))


@eqx.filter_jit
def measure_effects(
    config: ModelConfig,
    params: Params,
    coder: Coder,
    layers: tuple[int, ...],
    tokens: Tokens,
    kept: Bool[ArrayLike, "B"],
    end: Int[ArrayLike, ""],
    words: Int[ArrayLike, "W"],
) -> Float[Array, "W l T F"]:
    """d (a word's logit at `end` - mean of the words' logits) / d activation, averaged over the rows that are kept."""
    activations = compute_features(config, params, coder, layers, tokens)
    everywhere, words = jnp.ones_like(activations, bool), jnp.asarray(words)
    weight = jnp.asarray(kept, jnp.float32) / jnp.sum(jnp.asarray(kept, jnp.float32))

    def average_logits(more: Float[Array, "l T F"]) -> Float[Array, "W"]:
        logits = run_with_features(config, params, coder, layers, tokens, activations + more[:, None], everywhere)
        word_logits = shard_by_axes(logits[:, end], (None, None))[:, words].astype(jnp.float32)
        return weight @ (word_logits - jnp.mean(word_logits, axis=1, keepdims=True))

    # One forward pass, and one backward pass for each word.
    logits, differentiate = jax.vjp(average_logits, jnp.zeros_like(activations[:, 0]))
    return jax.lax.map(lambda word: differentiate(word)[0], jnp.eye(len(logits), dtype=jnp.float32))
