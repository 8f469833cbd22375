"""The transformer: one definition for every family, pure functions of parameters and tokens in a thin Flax shell.

Reading order: `forward` embeds, runs the blocks, unembeds; `block` is attention, then the MLP, each reading the
residual stream through a norm and writing back to it. Every value passes through `site(name, value)`, where it may be
captured, replaced or frozen. The MLP is an argument: a function from what the MLP reads to what it adds to the stream.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jclt.mesh import gathered, is_split
from jclt.models import ops
from jclt.models.config import ModelConfig
from jclt.models.sites import Edit, Sites
from jclt.models.weights import declare, layer_weights
from jclt.shapes import Array, DTypeLike, Float, Int, Layer, Logits, Params, Seen, Stream, Tokens

Mlp = Callable[[Layer, Mapping[str, Array], Callable[[], Array]], Array]
"""`mlp(layer, reads, true)`: from the values at the sites that an MLP can read (`resid_mid`, `mlp_normalized`,
`mlp_in`) to what is added to the residual stream; `true()` is the model's own MLP."""


class Cache(NamedTuple):
    """Rotated keys and values of the positions seen so far, `[L, B, S, G, K]`."""

    keys: Array
    values: Array


class Context(NamedTuple):
    """What all blocks share in one pass."""

    config: ModelConfig
    positions: Int[Array, "B T"]
    turns: tuple[tuple[Array, Array], tuple[Array, Array]]  # rotations in global and in local layers
    masks: tuple[Array, Array]  # what each position may attend to, likewise
    mlp: Mlp


def shared_context(
    config: ModelConfig, positions: Int[Array, "B T"], keys: int, dtype: DTypeLike, mlp: Mlp | None = None
) -> Context:
    """The context of a pass over tokens at these positions, which attend to so many keys; the true MLPs by default."""
    at, wide = jnp.arange(keys, dtype=positions.dtype), ops.wide(dtype)
    return Context(
        config,
        positions,
        turns=(ops.rotation(config, positions, False, wide), ops.rotation(config, positions, True, wide)),
        masks=(ops.causal_mask(positions, at, None), ops.causal_mask(positions, at, config.window)),
        mlp=mlp or (lambda layer, reads, true: true()),
    )


def normalize(config: ModelConfig, name: str, site: Sites, x: Array) -> Array:
    """x over its last axis divided by its norm, in at least float32; the denominator is a site."""
    x = ops.held(x).astype(ops.wide(x.dtype))
    if config.norm == "layer":
        x = ops.centred(x)
    divisor = jnp.ones_like(x[..., 0]) if config.norm == "none" else ops.denominator(x, config.norm_epsilon)
    divisor = site(f"{name.removesuffix('_norm')}_denominator", divisor)
    return x / divisor[..., None]


def gain(config: ModelConfig, weights: Params, name: str, x: Array, dtype: DTypeLike) -> Array:
    """The second half of the norm `name`: its gain and bias."""
    per_axis = (None,) * (x.ndim - 1)
    x = x * (weights[f"{name}_gain"].astype(x.dtype) + jnp.asarray(config.norm_offset, x.dtype))[per_axis]
    bias = weights.get(f"{name}_bias")
    return (x if bias is None else x + bias.astype(x.dtype)[per_axis]).astype(dtype)


def norm(config: ModelConfig, weights: Params, name: str, site: Sites, x: Array) -> Array:
    return gain(config, weights, name, normalize(config, name, site, x), x.dtype)


def project(weights: Params, name: str, equation: str, x: Array) -> Array:
    """The weight `name` applied to x, with its bias where the model has one."""
    out = ops.contract(equation, x, weights[name]).astype(x.dtype)
    bias = weights.get(f"{name}_bias")
    return out if bias is None else out + bias[None, None]


def attention(
    context: Context, weights: Params, layer: int | Array, site: Sites, x: Stream, cache: Cache | None
) -> tuple[Stream, Cache | None]:
    """What attention returns, and the cache with this pass's keys and values added."""
    c = context.config
    queries, keys, values = (project(weights, name, "btd,dhk->bthk", x) for name in ("query", "key", "value"))
    if c.qk_norm:
        queries = norm(c, weights, "query_norm", site, queries)
        keys = norm(c, weights, "key_norm", site, keys)
    queries, keys, values = site("queries", queries), site("keys", keys), site("values", values)

    turn, mask = of_kind(c, layer, context.turns), of_kind(c, layer, context.masks)
    if not c.learned_positions:
        queries, keys = ops.rotate(queries, turn), ops.rotate(keys, turn)
    if cache is not None:
        rows = jnp.arange(keys.shape[0])[:, None]
        cache = Cache(
            *(old.at[rows, context.positions].set(new) for old, new in zip(cache, (keys, values), strict=True))
        )
        keys, values = cache

    scale = jnp.asarray(c.score_scale, ops.wide(queries.dtype))
    if c.attn_scale_by_layer:
        scale = scale / (jnp.asarray(layer, scale.dtype) + 1)
    scores = site("attn_scores", ops.soft_cap(ops.attention_scores(queries, keys, scale), c.attn_softcap))
    pattern = site("pattern", ops.softmax(scores, mask))
    heads = site("head_out", ops.attend(pattern, values))
    return project(weights, "attn_out", "bthk,hkd->btd", heads), cache


def true_mlp(config: ModelConfig, weights: Params, site: Sites, x: Stream) -> Stream:
    """What the model's own MLP returns."""
    act = ops.ACTIVATIONS[config.activation]
    up = project(weights, "up", "btd,dm->btm", x)
    neurons = act(project(weights, "gate", "btd,dm->btm", x)) * up if config.gated else act(up)
    return project(weights, "down", "btm,md->btd", site("mlp_neurons", neurons))


def block(
    context: Context, weights: Params, layer: int | Array, site: Sites, x: Stream, cache: Cache | None
) -> tuple[Stream, Cache | None]:
    """One layer: what attention and the MLP read from the residual stream and add to it."""
    c = context.config
    weights = {name: gathered(weight) for name, weight in weights.items()}
    x = site("resid_pre", x)

    with jax.named_scope("attention"):
        attn_in = site("attn_in", norm(c, weights, "attn_norm", site, x))
        raw, cache = attention(context, weights, layer, site, attn_in, cache)
        attn_out = site("attn_raw_out", raw)
        if c.post_norms:
            attn_out = ops.rounded(norm(c, weights, "attn_post_norm", site, attn_out))
        attn_out = site("attn_out", attn_out)
        stream = x + attn_out

    with jax.named_scope("mlp"):
        mid = site("resid_mid", x if c.parallel else stream)
        stream = stream if c.parallel else mid
        normalized = site("mlp_normalized", normalize(c, "mlp_norm", site, mid))
        mlp_in = site("mlp_in", gain(c, weights, "mlp_norm", normalized, mid.dtype))

        def true() -> Stream:
            out = site("mlp_raw_out", true_mlp(c, weights, site, mlp_in))
            return ops.rounded(norm(c, weights, "mlp_post_norm", site, out)) if c.post_norms else out

        reads = {"resid_mid": mid, "mlp_normalized": normalized, "mlp_in": mlp_in}
        mlp_out = site("mlp_out", context.mlp(layer, reads, true))
    return site("resid_post", stream + mlp_out), cache


def of_kind(config: ModelConfig, layer: int | Array, global_and_local: tuple[Any, Any]) -> Any:
    """Of two values the one that holds in this layer: that of global or that of local layers."""
    local = config.local_layers
    if len(local) in (0, config.layers) or isinstance(layer, int):
        return global_and_local[bool(local) and (layer in local if isinstance(layer, int) else True)]
    is_local = jnp.isin(layer, jnp.asarray(local))
    return jax.tree.map(lambda far, near: jnp.where(is_local, near, far), *global_and_local)


def rows(table: Float[Array, "V D"], index: Int[Array, "B T"]) -> Stream:
    """Rows of an embedding, split over devices as their indices are. Where the table lies in pieces the rows travel, of
    which there are few, and not the table: each device looks up its piece of all of them."""
    if not is_split(index) and not is_split(table):
        return table[index]
    pieces = jax.typeof(table).sharding.spec[1]
    found = table.at[gathered(index)].get(out_sharding=P(None, None, pieces))
    return jax.reshard(found, P(*jax.typeof(index).sharding.spec, None))


def embed(config: ModelConfig, params: Params, tokens: Tokens, positions: Int[Array, "B T"], site: Sites) -> Stream:
    """The residual stream before the first block."""
    x = rows(params["token_embedding"], tokens)
    if config.scaled_embedding:
        x = x * jnp.asarray(config.width**0.5, x.dtype)
    x = site("token_embedding", x)
    if config.learned_positions:
        x = x + site("position_embedding", rows(params["position_embedding"], positions))
    return x


def unembed(config: ModelConfig, params: Params, x: Stream, site: Sites) -> Logits:
    """Logits in at least float32."""
    weights = {name: gathered(params[name]) for name in params if name.startswith("final_norm")}
    x = site("resid_final", norm(config, weights, "final_norm", site, x))
    table = gathered(params["token_embedding" if config.tied else "unembedding"])
    logits = ops.contract("btd,vd->btv", x, table)
    return site("logits", ops.soft_cap(logits, config.logit_softcap))


def forward(
    config: ModelConfig,
    params: Params,
    tokens: Tokens,
    *,
    capture: tuple[str, ...] = (),
    freeze: tuple[str, ...] = (),
    edit: Edit | None = None,
    mlp: Mlp | None = None,
    cache: Cache | None = None,
    positions: Int[Array, "B T"] | None = None,
    unroll: bool = False,
    remat: bool = False,
) -> tuple[Logits, Seen, Cache | None]:
    """Logits `[B, T, V]`, the captured sites (inside the layers with a leading layer axis), and the cache.

    Layers run as one scanned program, or one after the other where `unroll` is set, so that `edit` and `mlp` are given
    their layer as an `int`. With a cache, `positions` says where the tokens stand; otherwise they start at 0.
    """
    if positions is None:
        positions = jnp.zeros_like(tokens) + jnp.arange(tokens.shape[1], dtype=tokens.dtype)[None]
    keys = tokens.shape[1] if cache is None else cache.keys.shape[2]
    context = shared_context(config, positions, keys, params["token_embedding"].dtype, mlp)
    outside = Sites(None, capture, freeze, edit)
    stacked = {name: params[name] for name in layer_weights(config)}

    def step(x: Stream, scanned: tuple[int | Array, Params, Cache | None]) -> tuple[Stream, tuple[Seen, Cache | None]]:
        layer, weights, layer_cache = scanned
        site = Sites(layer, capture, freeze, edit)
        x, layer_cache = block(context, weights, layer, site, x, layer_cache)
        return x, (site.seen, layer_cache)

    if remat:
        step = jax.checkpoint(step)
    x = embed(config, params, tokens, positions, outside)
    if unroll:
        per_layer = []
        for layer in range(config.layers):
            x, kept = step(x, (layer, *jax.tree.map(lambda leaf, layer=layer: leaf[layer], (stacked, cache))))
            per_layer.append(kept)
        seen, cache = jax.tree.map(lambda *leaves: jnp.stack(leaves), *per_layer)
    else:
        x, (seen, cache) = jax.lax.scan(step, x, (jnp.arange(config.layers), stacked, cache))
    logits = unembed(config, params, x, outside)
    everything = {**seen, **outside.seen}
    return logits, {name: everything[name] for name in capture if name in everything}, cache


class Transformer(nn.Module):
    """Holds the parameters, and nothing else; the arithmetic is `forward`."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens: Tokens, **options: Any) -> tuple[Logits, Seen, Cache | None]:
        params = {
            name: self.param(name, lambda key, weight=weight: weight.init(key, jnp.float32))
            for name, weight in declare(self.config).items()
        }
        return forward(self.config, params, tokens, **options)
