"""The local replacement model with its constants folded in: what edges are computed with.

While its denominator is frozen, a norm is linear apart from its bias: C subtracts the mean (in LayerNorm), d(t)
divides, g multiplies.

    norm(x)(t) = g . C x(t) / d(t)

So a layer has no norms left. With V_h and O_h the value and output matrices of head h, and W the coder's skip,

    attention(x)(t) = x(t) + sum over heads h and positions s: O'_h P'_h(t, s) V'_h x(s)
    skip(x)(t) = c(t) W' x(t)

    V'_h = V_h g . C    of the norm before attention        P'_h(t, s) = P_h(t, s) / (d_before(s) d_after(t))
    O'_h = g . C O_h    of the norm after it, if any
    W'   = g . C W g . C    of the norms after and before the MLP, c(t) = 1 / (d_after(t) d_before(t))

The vectors of targets and the writes of sources take up the norms between them and the residual stream.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jclt.attribution.local import Frozen, LocalModel, Weights
from jclt.attribution.true_pass import widen
from jclt.models import ModelConfig, ops
from jclt.numerics import einsum
from jclt.shapes import Array, Float, Int, Params


class FoldedWeights(NamedTuple):
    """Of all layers, in at least float32."""

    values: Float[Array, "L D G K"]
    outputs: Float[Array, "L H K D"]
    skips: Float[Array, "L D D"] | None  # [output, input]


class FoldedPrompt(NamedTuple):
    """What is frozen on one prompt, in all layers."""

    patterns: Float[Array, "L H T T"]
    skip_scales: Float[Array, "L T"] | None


class FoldedLayer(NamedTuple):
    """One layer of both."""

    values: Float[Array, "D G K"]
    outputs: Float[Array, "H K D"]
    skip: Float[Array, "D D"] | None
    pattern: Float[Array, "H T T"]
    skip_scale: Float[Array, "T"] | None

    def select(self, positions: slice) -> "FoldedLayer":
        """The layer at some positions alone."""
        skip_scale = None if self.skip_scale is None else self.skip_scale[positions]
        return self._replace(pattern=self.pattern[:, positions, positions], skip_scale=skip_scale)


@partial(jax.jit, static_argnames=("local",))
def fold_weights(local: LocalModel, weights: Weights) -> FoldedWeights:
    config, params = local.model, weights.params
    values = center(config, widen(params["value"]) * read_gain(config, params, "attn_norm")[:, :, None, None], axis=1)
    outputs = widen(params["attn_out"])
    if config.post_norms:
        outputs = center(config, outputs) * read_gain(config, params, "attn_post_norm")[:, None, None]
    skips = None if weights.skips is None else fold_skips(local, params, weights.skips)
    return FoldedWeights(values, outputs, skips)


def fold_prompt(local: LocalModel, weights: Weights, frozen: Frozen) -> FoldedPrompt:
    patterns = frozen["pattern"] / frozen["attn_denominator"][:, None, None, :]
    if local.model.post_norms:
        patterns = patterns / frozen["attn_post_denominator"][:, None, :, None]
    skip_scales = None
    if weights.skips is not None:
        skip_scales = invert_read_norms(local, frozen) * invert_write_norms(local, frozen)
    return FoldedPrompt(patterns, skip_scales)


def fold_targets(
    local: LocalModel,
    params: Params,
    frozen: Frozen,
    layers: Int[Array, "N"],
    positions: Int[Array, "N"],
    vectors: Float[Array, "N D"],
) -> Float[Array, "N D"]:
    """The targets' vectors of what is read, as vectors of the residual stream. The number of layers stands for what the
    unembedding reads."""
    config = local.model
    read_gains = read_gain(config, params, "mlp_norm")
    gains = jnp.concatenate(
        [
            read_gains if local.reads == "mlp_in" else jnp.ones_like(read_gains),
            read_gain(config, params, "final_norm")[None],
        ]
    )
    scales = jnp.concatenate([invert_read_norms(local, frozen), 1 / frozen["final_denominator"][None]])
    folded = center(config, vectors * gains[layers]) * scales[layers, positions][:, None]
    if local.reads == "resid_mid":
        return jnp.where((layers == config.layers)[:, None], folded, vectors)
    return folded


def fold_writes(
    local: LocalModel, params: Params, layers: Int[Array, "l"], writes: Float[Array, "l *n D"]
) -> Float[Array, "l *n D"]:
    """What is written at the coder's site of these layers, as it reaches the residual stream, times the norm's
    denominator."""
    if not writes_through_norm(local):
        return writes
    return center(local.model, writes) * align(read_gain(local.model, params, "mlp_post_norm")[layers], writes)


def fold_skips(local: LocalModel, params: Params, skips: Float[Array, "L D D"]) -> Float[Array, "L D D"]:
    layers = jnp.arange(len(skips))
    if local.reads == "mlp_in":
        skips = skips * align(read_gain(local.model, params, "mlp_norm"), skips)
    if local.reads != "resid_mid":
        skips = center(local.model, skips)
    return jnp.swapaxes(fold_writes(local, params, layers, jnp.swapaxes(skips, 1, 2)), 1, 2)


def invert_read_norms(local: LocalModel, frozen: Frozen) -> Float[Array, "L T"]:
    """One divided by the denominators through which the coder reads."""
    denominators = frozen["mlp_denominator"]
    return jnp.ones_like(denominators) if local.reads == "resid_mid" else 1 / denominators


def invert_write_norms(local: LocalModel, frozen: Frozen) -> Float[Array, "L T"]:
    """One divided by the denominators through which the coder writes."""
    if not writes_through_norm(local):
        return jnp.ones_like(frozen["mlp_denominator"])
    return 1 / frozen["mlp_post_denominator"]


def writes_through_norm(local: LocalModel) -> bool:
    return local.writes == "mlp_raw_out" and local.model.post_norms


def run_folded_layer(
    local: LocalModel, layer: FoldedLayer, x: Float[Array, "T R D"]
) -> tuple[Float[Array, "T R D"], Float[Array, "T R D"]]:
    """R residual streams after one layer, without what sources write there; and those where its coder reads."""
    (heads, length, _), groups = layer.pattern.shape, layer.values.shape[1]
    multiply = partial(einsum, precision=local.precision)
    values = multiply("srd,dgk->srgk", x, layer.values)
    pattern = layer.pattern.reshape(groups, heads // groups, length, length)
    mixed = multiply("ghts,srgk->trghk", pattern, values).reshape(*x.shape[:2], heads, -1)
    return add_skip(local, layer, x, x + multiply("trhk,hkd->trd", mixed, layer.outputs))


def add_skip(
    local: LocalModel, layer: FoldedLayer, before: Float[Array, "T R D"], after: Float[Array, "T R D"]
) -> tuple[Float[Array, "T R D"], Float[Array, "T R D"]]:
    """The streams after attention with the coder's skip, and those where its coder reads."""
    read = before if local.model.parallel else after
    if layer.skip is None or layer.skip_scale is None:
        return after, read
    skipped = einsum("trd,ed->tre", read, layer.skip, precision=local.precision)
    return after + layer.skip_scale[:, None, None] * skipped, read


def run_folded_layer_from(
    local: LocalModel, layer: FoldedLayer, positions: Int[Array, "R"], x: Float[Array, "R D"]
) -> tuple[Float[Array, "T R D"], Float[Array, "T R D"]]:
    """What `run_folded_layer` returns of streams that are x at one position each, and 0 elsewhere. O'_h V'_h x is
    computed once for all positions, so this takes about T times fewer operations."""
    (heads, length, _), groups = layer.pattern.shape, layer.values.shape[1]
    multiply, rows = partial(einsum, precision=local.precision), jnp.arange(len(positions))
    values = multiply("rd,dgk->rgk", x, layer.values)
    outputs = layer.outputs.reshape(groups, heads // groups, *layer.outputs.shape[1:])
    written = multiply("rgk,gmkd->rgmd", values, outputs).reshape(len(x), heads, -1)
    before = jnp.zeros((length, *x.shape), x.dtype).at[positions, rows].set(x)
    after = multiply("htr,rhd->trd", layer.pattern[:, :, positions], written)
    return add_skip(local, layer, before, after.at[positions, rows].add(x))


def read_folded_layer_at(
    local: LocalModel, layer: FoldedLayer, positions: Int[Array, "R"], x: Float[Array, "T R D"]
) -> Float[Array, "R D"]:
    """What the coder reads of R residual streams before the layer, each at one position."""
    here = x[positions, jnp.arange(len(positions))]
    if local.model.parallel:
        return here
    multiply, groups = partial(einsum, precision=local.precision), layer.values.shape[1]
    attended = multiply("hrs,srd->rhd", layer.pattern[:, positions], x)
    values = multiply("rgmd,dgk->rgmk", attended.reshape(len(here), groups, -1, here.shape[1]), layer.values)
    return here + multiply("rhk,hkd->rd", values.reshape(len(here), *layer.outputs.shape[:2]), layer.outputs)


def read_gain(config: ModelConfig, params: Params, name: str) -> Float[Array, "*L D"]:
    gain = widen(params[f"{name}_gain"])
    return gain + jnp.asarray(config.norm_offset, gain.dtype)


def center(config: ModelConfig, x: Array, axis: int = -1) -> Array:
    return ops.center(x, axis) if config.norm == "layer" else x


def align(per_layer: Float[Array, "L D"], like: Float[Array, "L *n D"]) -> Array:
    return per_layer.reshape(per_layer.shape[0], *(1,) * (like.ndim - 2), per_layer.shape[-1])
