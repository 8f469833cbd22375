"""Features read off the true model, and set to other values in it."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp

from jclt.coders import Coder
from jclt.kernels.matmuls import einsum
from jclt.mesh import as_placed, placed
from jclt.models import ModelConfig, forward
from jclt.shapes import Array, ArrayLike, Bool, Float, Int, Layer, Logits, Params, Tokens


def read_features(
    config: ModelConfig, params: Params, coder: Coder, layers: tuple[int, ...], tokens: Tokens
) -> tuple[list[Float[Array, "B T F"]], list[Float[Array, "B T D"]]]:
    """Activations of the given covered layers on the model's own values, and what these layers write."""
    own = coder.config
    _, seen, _ = forward(config, params, tokens, capture=(own.reads, own.writes))
    at = {i: placed(seen[own.reads][own.covered[i]], ("tokens", None, None)) for i in layers}
    return [coder.encode(i, at[i]) for i in layers], [seen[own.writes][own.covered[i]] for i in layers]


def with_features(
    config: ModelConfig,
    params: Params,
    coder: Coder,
    layers: tuple[int, ...],
    tokens: Tokens,
    values: Float[Array, "l B T F"],
    where: Bool[Array, "l B T F"],
) -> Logits:
    """The true model's logits when features of the given layers have the given values where the mask says so.

    What these layers write is what they wrote on the untouched prompt plus the change that the features make: held
    there, so that none of them answers the change of an earlier one a second time; later layers are left to the model,
    so what features write to those is not added. Attention is free.
    """
    activations, writes = read_features(config, params, coder, layers, tokens)
    changes = [
        jnp.where(as_placed(where[i], a), as_placed(values[i], a).astype(a.dtype) - a, jnp.zeros_like(a))
        for i, a in enumerate(activations)
    ]
    held: dict[int, Array] = {}
    for i, target in enumerate(layers):
        out = writes[i]
        for source, change in zip(layers[: i + 1], changes, strict=False):
            if target - source < coder.config.reach(source):
                row = coder.rows(source)[:, target - source]
                written = einsum("btf,fd->btd", change, row)
                out = out + placed(written, ("batch", None, None)).astype(out.dtype)
        held[coder.config.covered[target]] = out

    def edit(site: str, layer: Layer, value: Array) -> Array:
        return held[layer] if site == coder.config.writes and isinstance(layer, int) and layer in held else value

    return forward(config, params, tokens, edit=edit, unroll=True)[0]


@eqx.filter_jit
def features_on(
    config: ModelConfig, params: Params, coder: Coder, layers: tuple[int, ...], tokens: Tokens
) -> Float[Array, "l B T F"]:
    """The activations, whole on every device."""
    activations, _ = read_features(config, params, coder, layers, tokens)
    return placed(jnp.stack(activations), (None,) * 4)


@eqx.filter_jit
def answers_with(
    config: ModelConfig,
    params: Params,
    coder: Coder,
    layers: tuple[int, ...],
    tokens: Tokens,
    values: Float[ArrayLike, "l B T F"],
    where: Bool[ArrayLike, "l B T F"],
) -> Int[Array, "B T"]:
    """The most probable next tokens under `with_features`."""
    logits = with_features(config, params, coder, layers, tokens, jnp.asarray(values), jnp.asarray(where))
    return placed(jnp.argmax(logits, axis=-1), (None, None))


@eqx.filter_jit
def effects_on(
    config: ModelConfig,
    params: Params,
    coder: Coder,
    layers: tuple[int, ...],
    tokens: Tokens,
    kept: Bool[ArrayLike, "B"],
    end: int,
    words: Int[ArrayLike, "W"],
) -> Float[Array, "W l T F"]:
    """How much each word's logit at `end` rises above the words' mean for one more of a feature: a gradient, averaged
    over the rows that are kept."""
    activations = features_on(config, params, coder, layers, tokens)
    everywhere, words = jnp.ones_like(activations, bool), jnp.asarray(words)
    weight = jnp.asarray(kept, jnp.float32) / jnp.sum(jnp.asarray(kept, jnp.float32))

    def raised(more: Float[Array, "l T F"], own: Array) -> Float[Array, ""]:
        logits = with_features(config, params, coder, layers, tokens, activations + more[:, None], everywhere)
        among = placed(logits[:, end], (None, None))[:, words].astype(jnp.float32)
        return jnp.sum(weight * (among @ own - jnp.mean(among, axis=1)))

    nothing = jnp.zeros_like(activations[:, 0])
    return jax.lax.map(partial(jax.grad(raised), nothing), jnp.eye(words.shape[0], dtype=jnp.float32))
