"""Attribution patching of queries and keys with exact softmaxes: a fix for attention that is saturated (AtP*).

Where a pattern is near 0 or 1 the softmax is flat, and its gradient says that no query or key matters. Here the pattern
that the other run's query or key would give is computed exactly, and only what follows is linear:

    score = sum over patterns of (pattern with the new query or key - pattern of the clean run) x gradient
"""

from functools import partial

import jax
import jax.numpy as jnp

from jclt.circuits.gradients import Setting, differentiate, read_values
from jclt.circuits.passes import Prompts
from jclt.models import ops
from jclt.models.transformer import Context, make_context, select_for_layer
from jclt.numerics import at_least_float32
from jclt.shapes import Array, Float, Mask, Params


@partial(jax.jit, static_argnames=("setting", "zero"))
@jax.named_scope("saturation_fix")
def score_exact_softmax(setting: Setting, params: Params, prompts: Prompts, zero: bool) -> Float[Array, "P L T U"]:
    """The scores of each layer's queries or keys, `setting.site`; units are heads, or groups of them."""
    config, extra = setting.model, ("queries", "keys", "pattern")
    clean = read_values(setting, params, prompts.clean, prompts.last, extra)
    value = clean[setting.site]
    other = jnp.zeros_like(value)
    if not zero:
        other = read_values(setting, params, prompts.corrupted, prompts.last)[setting.site]
    at_pattern = setting._replace(site="pattern")
    gradient = differentiate(at_pattern, params, prompts, prompts.clean, clean["pattern"])
    tokens = prompts.clean
    positions = jnp.zeros_like(tokens) + jnp.arange(tokens.shape[1], dtype=tokens.dtype)[None]
    context = make_context(config, positions, tokens.shape[1], value.dtype)

    def score_layer(of_layer: tuple[Array, ...]) -> Float[Array, "P T U"]:
        layer, queries, keys, changed, pattern, slopes = of_layer
        recompute = partial(recompute_scores, context, layer)
        mask = select_for_layer(config, layer, context.masks)
        if setting.site == "queries":  # each row of a pattern has a query of its own
            new = ops.softmax(recompute(changed, keys), mask)
            return jnp.moveaxis(jnp.sum((new - pattern) * slopes, axis=-1), 1, 2)
        rise = recompute(queries, changed) - recompute(queries, keys)
        of_heads = score_keys(pattern, rise, slopes, mask)
        (b, h, s), groups = of_heads.shape, config.key_heads
        return jnp.moveaxis(of_heads.reshape(b, groups, h // groups, s).sum(axis=2), 1, 2)

    layers = jnp.arange(config.layers)
    columns = (layers, clean["queries"], clean["keys"], other, clean["pattern"], gradient)
    return jnp.moveaxis(jax.lax.map(score_layer, columns), 1, 0)


def recompute_scores(
    context: Context, layer: int | Array, queries: Float[Array, "P T H K"], keys: Float[Array, "P S G K"]
) -> Float[Array, "P H T S"]:
    """The scores of one layer's attention, as `transformer.py` computes them, of queries and keys before rotation."""
    config = context.config
    if not config.learned_positions:
        rotation = select_for_layer(config, layer, context.rotations)
        queries, keys = ops.rotate(queries, rotation), ops.rotate(keys, rotation)
    scale = jnp.asarray(config.score_scale, at_least_float32(queries.dtype))
    if config.attn_scale_by_layer:
        scale = scale / (jnp.asarray(layer, scale.dtype) + 1)
    return ops.soft_cap(ops.attention_scores(queries, keys, scale), config.attn_softcap)


def score_keys(
    pattern: Float[Array, "P H T S"], rise: Float[Array, "P H T S"], slopes: Float[Array, "P H T S"], mask: Mask
) -> Float[Array, "P H S"]:
    """The change of the pattern, times slopes, if the scores of one key alone rise. With p that key's share of the
    pattern, its new share is q = sigmoid(logit(p) + rise), and the others shrink by (1 - q) / (1 - p)."""
    tiny = jnp.finfo(pattern.dtype).tiny
    p = jnp.clip(pattern, tiny, 1 - jnp.finfo(pattern.dtype).epsneg)
    q = jax.nn.sigmoid(jnp.log(p) - jnp.log1p(-p) + rise)
    total = jnp.sum(pattern * slopes, axis=-1, keepdims=True)
    change = q * slopes + (1 - q) / (1 - p) * (total - pattern * slopes) - total
    return jnp.sum(jnp.where(mask[:, None], change, 0), axis=2)
