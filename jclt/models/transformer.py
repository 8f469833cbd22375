"""The transformer: one definition for every family, as pure functions of parameters and tokens.

Reading order: `forward` embeds the tokens, runs the blocks and unembeds. `block` is attention, then the MLP. Each reads
the residual stream through a norm and adds its output to it. Every value passes through `site(name, value)`, which may
capture or edit it. The MLP is an argument: a function from its input to what it adds to the stream.

`Transformer`, a Flax module, holds the parameters and nothing else.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jclt.mesh import is_split, replicate
from jclt.models import ops
from jclt.models.config import ModelConfig
from jclt.models.sites import Edit, Sites
from jclt.models.weights import declare, declare_layer_weights
from jclt.numerics import at_least_float32, einsum
from jclt.shapes import Array, Captured, DTypeLike, Float, Int, Layer, Logits, Params, Stream, Tokens

Mlp = Callable[[Layer, Mapping[str, Array], Callable[[], Array]], Array]
"""`mlp(layer, reads, true)` returns what is added to the residual stream. `reads` holds the values at the sites that an
MLP can read (`resid_mid`, `mlp_normalized`, `mlp_in`); `true()` is the output of the model's MLP."""

Activate = Callable[[ModelConfig, Array, Array | None], Array]
"""`activate(config, up, gate)` returns an MLP's neurons, of what its projections return; without a gate it is None."""


class Cache(NamedTuple):
    """Rotated keys and values of the positions seen so far, `[L, B, S, G, K]`."""

    keys: Array
    values: Array


class Context(NamedTuple):
    """What all blocks of one pass share."""

    config: ModelConfig
    positions: Int[Array, "B T"]
    rotations: tuple[tuple[Array, Array], tuple[Array, Array]]  # of global layers, of local layers
    masks: tuple[Array, Array]  # of global layers, of local layers
    mlp: Mlp
    activate: Activate = ops.compute_neurons  # the neurons of the true MLP


def make_context(
    config: ModelConfig, positions: Int[Array, "B T"], keys: int, dtype: DTypeLike, mlp: Mlp | None = None
) -> Context:
    """The context of a pass over tokens at these positions, which attend to `keys` keys. By default with true MLPs."""
    key_positions, wide = jnp.arange(keys, dtype=positions.dtype), at_least_float32(dtype)
    return Context(
        config=config,
        positions=positions,
        rotations=(ops.rotation(config, positions, False, wide), ops.rotation(config, positions, True, wide)),
        masks=(
            ops.causal_mask(positions, key_positions, None),
            ops.causal_mask(positions, key_positions, config.window),
        ),
        mlp=mlp or (lambda layer, reads, true: true()),
    )


def normalize(config: ModelConfig, name: str, site: Sites, x: Array) -> Array:
    """x divided by its norm over the last axis, in at least float32. The denominator is a site."""
    x = ops.prevent_fusion(x).astype(at_least_float32(x.dtype))
    if config.norm == "layer":
        x = ops.center(x)
    denominator = jnp.ones_like(x[..., 0]) if config.norm == "none" else ops.compute_denominator(x, config.norm_epsilon)
    denominator = site(f"{name.removesuffix('_norm')}_denominator", denominator)
    return x / denominator[..., None]


def apply_gain(config: ModelConfig, weights: Params, name: str, x: Array, dtype: DTypeLike) -> Array:
    """The second half of the norm `name`: multiplies by its gain and adds its bias."""
    leading_axes = (None,) * (x.ndim - 1)
    x = x * (weights[f"{name}_gain"].astype(x.dtype) + jnp.asarray(config.norm_offset, x.dtype))[leading_axes]
    bias = weights.get(f"{name}_bias")
    return (x if bias is None else x + bias.astype(x.dtype)[leading_axes]).astype(dtype)


def apply_norm(config: ModelConfig, weights: Params, name: str, site: Sites, x: Array) -> Array:
    return apply_gain(config, weights, name, normalize(config, name, site, x), x.dtype)


def project(weights: Params, name: str, equation: str, x: Array) -> Array:
    """x times the weight `name`, plus its bias where the model has one."""
    out = einsum(equation, x, weights[name]).astype(x.dtype)
    bias = weights.get(f"{name}_bias")
    return out if bias is None else out + bias[None, None]


def attention(
    context: Context, weights: Params, layer: int | Array, site: Sites, x: Stream, cache: Cache | None
) -> tuple[Stream, Cache | None]:
    """The output of attention, and the cache with this pass's keys and values added."""
    c = context.config
    queries, keys, values = (project(weights, name, "btd,dhk->bthk", x) for name in ("query", "key", "value"))
    if c.qk_norm:
        queries = apply_norm(c, weights, "query_norm", site, queries)
        keys = apply_norm(c, weights, "key_norm", site, keys)
    queries, keys, values = site("queries", queries), site("keys", keys), site("values", values)

    rotation, mask = select_for_layer(c, layer, context.rotations), select_for_layer(c, layer, context.masks)
    if not c.learned_positions:
        queries, keys = ops.rotate(queries, rotation), ops.rotate(keys, rotation)
    if cache is not None:
        rows = jnp.arange(keys.shape[0])[:, None]
        cache = Cache(
            *(old.at[rows, context.positions].set(new) for old, new in zip(cache, (keys, values), strict=True))
        )
        keys, values = cache

    scale = jnp.asarray(c.score_scale, at_least_float32(queries.dtype))
    if c.attn_scale_by_layer:
        scale = scale / (jnp.asarray(layer, scale.dtype) + 1)
    scores = site("attn_scores", ops.soft_cap(ops.attention_scores(queries, keys, scale), c.attn_softcap))
    pattern = site("pattern", ops.softmax(scores, mask))
    heads = site("head_out", ops.attend(pattern, values))
    return project(weights, "attn_out", "bthk,hkd->btd", heads), cache


def true_mlp(context: Context, weights: Params, site: Sites, x: Stream) -> Stream:
    """The output of the model's MLP."""
    up = project(weights, "up", "btd,dm->btm", x)
    gate = project(weights, "gate", "btd,dm->btm", x) if context.config.gated else None
    neurons = context.activate(context.config, up, gate)
    return project(weights, "down", "btm,md->btd", site("mlp_neurons", neurons))


def block(
    context: Context, weights: Params, layer: int | Array, site: Sites, x: Stream, cache: Cache | None
) -> tuple[Stream, Cache | None]:
    """One layer: the residual stream after it, and the cache."""
    c = context.config
    weights = {name: widen_like(replicate(weight), x) for name, weight in weights.items()}
    x = site("resid_pre", x)

    with jax.named_scope("attention"):
        attn_in = site("attn_in", apply_norm(c, weights, "attn_norm", site, x))
        raw, cache = attention(context, weights, layer, site, attn_in, cache)
        attn_out = site("attn_raw_out", raw)
        if c.post_norms:
            attn_out = ops.prevent_fma(apply_norm(c, weights, "attn_post_norm", site, attn_out))
        attn_out = site("attn_out", attn_out)
        stream = x + attn_out

    with jax.named_scope("mlp"):
        mid = site("resid_mid", x if c.parallel else stream)
        stream = stream if c.parallel else mid
        normalized = site("mlp_normalized", normalize(c, "mlp_norm", site, mid))
        mlp_in = site("mlp_in", apply_gain(c, weights, "mlp_norm", normalized, mid.dtype))

        def true() -> Stream:
            out = site("mlp_raw_out", true_mlp(context, weights, site, mlp_in))
            return ops.prevent_fma(apply_norm(c, weights, "mlp_post_norm", site, out)) if c.post_norms else out

        reads = {"resid_mid": mid, "mlp_normalized": normalized, "mlp_in": mlp_in}
        mlp_out = site("mlp_out", context.mlp(layer, reads, true))
    return site("resid_post", stream + mlp_out), cache


def widen_like(weight: Array, x: Array) -> Array:
    """A weight in the type of x, if that is wider: of a model that is stored in half precision, one layer at a time is
    in the type of the computation."""
    return weight.astype(x.dtype) if weight.dtype.itemsize < x.dtype.itemsize else weight


def take_layer(stacked: Params, layer: Array) -> Params:
    """One layer's weights, of those that are then widened. Without the barrier the compiler widens those of all layers
    before the first one, and keeps them."""
    layer, stacked = jax.lax.optimization_barrier((layer, stacked))
    return {name: jax.lax.dynamic_index_in_dim(w, layer, keepdims=False) for name, w in stacked.items()}


def select_for_layer(config: ModelConfig, layer: int | Array, global_and_local: tuple[Any, Any]) -> Any:
    """The value for this layer, of a pair: one for global layers, one for layers with a sliding window."""
    local = config.local_layers
    if len(local) in (0, config.layers) or isinstance(layer, int):
        return global_and_local[bool(local) and (layer in local if isinstance(layer, int) else True)]
    is_local = jnp.isin(layer, jnp.asarray(local))
    return jax.tree.map(lambda far, near: jnp.where(is_local, near, far), *global_and_local)


def look_up_rows(table: Float[Array, "V D"], index: Int[Array, "B T"]) -> Stream:
    """Rows of an embedding, sharded like their indices.

    Where the table is sharded, the rows are communicated and not the table, which is larger: each device looks up its
    columns of all rows.
    """
    if not is_split(index) and not is_split(table):
        return table[index]
    column_axes = jax.typeof(table).sharding.spec[1]
    mesh = jax.typeof(table if is_split(table) else index).sharding.mesh
    table_rows = table.at[replicate(index)].get(out_sharding=NamedSharding(mesh, P(None, None, column_axes)))
    return jax.reshard(table_rows, NamedSharding(mesh, P(*jax.typeof(index).sharding.spec, None)))


def embed(config: ModelConfig, params: Params, tokens: Tokens, positions: Int[Array, "B T"], site: Sites) -> Stream:
    """The residual stream before the first block."""
    x = look_up_rows(params["token_embedding"], tokens)
    if config.scaled_embedding:
        x = x * jnp.asarray(config.width**0.5, x.dtype)
    x = site("token_embedding", x)
    if config.learned_positions:
        x = x + site("position_embedding", look_up_rows(params["position_embedding"], positions))
    return x


def unembed(config: ModelConfig, params: Params, x: Stream, site: Sites) -> Logits:
    """Logits in at least float32."""
    weights = {name: replicate(params[name]) for name in params if name.startswith("final_norm")}
    x = site("resid_final", apply_norm(config, weights, "final_norm", site, x))
    table = replicate(params["token_embedding" if config.tied else "unembedding"])
    logits = einsum("btd,vd->btv", x, table)
    return site("logits", ops.soft_cap(logits, config.logit_softcap))


def forward(
    config: ModelConfig,
    params: Params,
    tokens: Tokens,
    *,
    capture: tuple[str, ...] = (),
    edit: Edit | None = None,
    mlp: Mlp | None = None,
    cache: Cache | None = None,
    positions: Int[Array, "B T"] | None = None,
    unroll: bool = False,
    remat: bool = False,
) -> tuple[Logits, Captured, Cache | None]:
    """Logits `[B, T, V]`, the captured sites (inside the layers with a leading layer axis), and the cache.

    Layers run as one `jax.lax.scan`. With `unroll` they run one after the other, and `edit` and `mlp` receive the layer
    as an `int`. With a cache, `positions` are the positions of the tokens; without one they start at 0.
    """
    token_positions = positions
    if token_positions is None:
        token_positions = jnp.zeros_like(tokens) + jnp.arange(tokens.shape[1], dtype=tokens.dtype)[None]
    keys = tokens.shape[1] if cache is None else cache.keys.shape[2]
    context = make_context(config, token_positions, keys, params["token_embedding"].dtype, mlp)
    outside = Sites(None, capture, edit, positions)
    stacked = {name: params[name] for name in declare_layer_weights(config)}

    def step(
        x: Stream, scanned: tuple[int | Array, Params, Cache | None]
    ) -> tuple[Stream, tuple[Captured, Cache | None]]:
        layer, weights, layer_cache = scanned
        site = Sites(layer, capture, edit, positions)
        x, layer_cache = block(context, weights, layer, site, x, layer_cache)
        return x, (site.seen, layer_cache)

    if remat:
        step = jax.checkpoint(step)
    x = embed(config, params, tokens, token_positions, outside)
    if unroll:
        per_layer = []
        for layer in range(config.layers):
            x, outputs = step(x, (layer, *jax.tree.map(lambda leaf, layer=layer: leaf[layer], (stacked, cache))))
            per_layer.append(outputs)
        seen, cache = jax.tree.map(lambda *leaves: jnp.stack(leaves), *per_layer)
    else:
        narrow = {name: w for name, w in stacked.items() if w.dtype.itemsize < x.dtype.itemsize}
        others = {name: w for name, w in stacked.items() if name not in narrow}

        def step_widening(x: Stream, scanned: tuple[Array, Params, Cache | None]) -> Any:
            layer, weights, layer_cache = scanned
            return step(x, (layer, {**weights, **take_layer(narrow, layer)}, layer_cache))

        run = step_widening if narrow else step
        x, (seen, cache) = jax.lax.scan(run, x, (jnp.arange(config.layers), others, cache))
    logits = unembed(config, params, x, outside)
    everything = {**seen, **outside.seen}
    return logits, {name: everything[name] for name in capture if name in everything}, cache


class Transformer(nn.Module):
    """Holds the parameters and nothing else; the computation is `forward`."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens: Tokens, **options: Any) -> tuple[Logits, Captured, Cache | None]:
        params = {
            name: self.param(name, lambda key, weight=weight: weight.init(key, jnp.float32))
            for name, weight in declare(self.config).items()
        }
        return forward(self.config, params, tokens, **options)
