"""Generation with a cache of keys and values. One program is compiled for all prompts of similar length."""

from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp

from jclt.models.config import ModelConfig
from jclt.models.sites import Edit
from jclt.models.transformer import Cache, Mlp, forward
from jclt.shapes import Array, Float, Int, Logits, Params, Tokens


def sample(
    logits: Float[Array, "B V"], key: Array, temperature: Float[Array, ""], top_p: Float[Array, ""]
) -> Int[Array, "B"]:
    """The most probable token at temperature 0; otherwise a sample from the smallest set of tokens whose probabilities
    sum to `top_p`."""

    def draw() -> Int[Array, "B"]:
        scaled = logits / temperature.astype(logits.dtype)
        ordered = jnp.sort(scaled, axis=-1, descending=True)
        shares = jax.nn.softmax(ordered, axis=-1)
        share_before = jnp.cumsum(shares, axis=-1) - shares
        least = jnp.min(jnp.where(share_before < top_p.astype(logits.dtype), ordered, jnp.inf), axis=-1, keepdims=True)
        return jax.random.categorical(key, jnp.where(scaled >= least, scaled, -jnp.inf), axis=-1)

    # A conditional, so that greedy decoding does not sort the vocabulary at every step.
    return jax.lax.cond(temperature > 0, draw, lambda: jnp.argmax(logits, axis=-1))


@eqx.filter_jit
def generate_tokens(
    config: ModelConfig,
    params: Params,
    tokens: Tokens,
    lengths: Int[Array, "B"],
    new: int,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    key: Array,
    stop_tokens: tuple[int, ...] = (),
    edit: Edit | None = None,
    mlp: Mlp | None = None,
    unroll: bool = False,
    keep_logits: bool = False,
) -> tuple[Int[Array, "B new"], Float[Array, "B new V"] | None]:
    """`new` tokens for each row of right-padded prompts, and the logits that they were chosen by if these are kept.
    After a stop token the row repeats it."""
    batch, padded = tokens.shape
    shape = (config.layers, batch, padded + new, config.key_heads, config.head_size)
    cache = Cache(*(jnp.zeros(shape, params["token_embedding"].dtype),) * 2)

    def step(tokens: Tokens, positions: Int[Array, "B T"], cache: Cache) -> tuple[Logits, Cache]:
        logits, _, new_cache = forward(
            config, params, tokens, positions=positions, cache=cache, edit=edit, mlp=mlp, unroll=unroll
        )
        return logits, cast(Cache, new_cache)

    def choose(logits: Float[Array, "B V"], stopped: Array, last: Array, index: Array) -> tuple[Array, Array]:
        sampled = sample(logits, jax.random.fold_in(key, index), temperature, top_p).astype(tokens.dtype)
        chosen = jnp.where(stopped, last, sampled)
        return chosen, stopped | jnp.isin(chosen, jnp.asarray(stop_tokens, tokens.dtype))

    # Positions after a row's prompt are padding. No position attends to them before decoding overwrites them.
    logits, cache = step(tokens, jnp.zeros_like(tokens) + jnp.arange(padded, dtype=tokens.dtype)[None], cache)
    rows = jnp.arange(batch)
    first_logits = logits[rows, lengths - 1]
    last, stopped = choose(first_logits, jnp.zeros(batch, bool), tokens[:, 0], jnp.asarray(0))

    def decode(carry: tuple[Array, Array, Cache], index: Array) -> tuple[tuple[Array, Array, Cache], Any]:
        last, stopped, cache = carry
        logits, cache = step(last[:, None], (lengths + index)[:, None], cache)
        chosen, stopped = choose(logits[:, 0], stopped, last, index + 1)
        return (chosen, stopped, cache), (chosen, logits[:, 0] if keep_logits else None)

    _, (later, later_logits) = jax.lax.scan(decode, (last, stopped, cache), jnp.arange(new - 1, dtype=tokens.dtype))
    chosen = jnp.concatenate([last[:, None], later.T], axis=1)
    if not keep_logits:
        return chosen, None
    return chosen, jnp.concatenate([first_logits[:, None], jnp.moveaxis(later_logits, 0, 1)], axis=1)
