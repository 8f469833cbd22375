"""A coder's dense products: float32 sums and float32 gradients whatever the operands' types, on any mesh.

`jax.vjp` would give a weight's gradient the type of the operands. These gradients are written by hand and stay float32,
so that the gradients of micro-batches add up without loss.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jclt.mesh import (
    FEATURES_AXIS,
    einsum_spec,
    is_summed_over_features,
    shard_by_axes,
    shard_shape,
    sum_over_feature_shards,
)
from jclt.models.ops import prevent_fusion
from jclt.numerics import at_least_float32, einsum
from jclt.shapes import Array, Float


def sharded_einsum(equation: str, x: Array, y: Array, weight: Array | None = None) -> Array:
    """An einsum of both operands in the type of x, summed in at least float32. Each axis stays split as in its operand.

    Where the sum runs over features, each feature shard adds up its part, and `sum_over_feature_shards` the results.
    Where the result is the gradient of `weight`, its sum over devices is deferred if the weight's type asks for that
    (`mesh.defer_gradient_sum`).
    """
    dtype = x.dtype
    spec = einsum_spec(equation, x, y)
    over_features = is_summed_over_features(equation, x, y)
    if spec is not None:
        deferred = frozenset() if weight is None else jax.typeof(weight).sharding.spec.reduced
        spec = P(*spec, unreduced=deferred | {FEATURES_AXIS} if over_features else deferred)

    def multiply(x: Array, y: Array) -> Array:
        return einsum(equation, x, y, out_sharding=spec)

    def multiply_in_float32(x: Array, y: Array) -> Array:
        return multiply(x.astype(jnp.float32), y.astype(jnp.float32))

    if dtype == jnp.bfloat16:
        # On CPUs the compiler lacks some of the products of bfloat16 with float32 sums; these are the same numbers.
        product = jax.lax.platform_dependent(x, y.astype(dtype), cpu=multiply_in_float32, default=multiply)
    else:
        product = multiply(x, y.astype(dtype))
    return sum_over_feature_shards(product) if over_features else product


def widen_for_product(x: Array, weight: Array) -> Array:
    """x in a type in which `apply_weight(x, weight)` rounds neither of them.

    That is their type, if they have the same; else the wider of the two, and at least float32.
    """
    if x.dtype == weight.dtype:
        return x
    wide_types = (at_least_float32(x.dtype), at_least_float32(weight.dtype))
    return x.astype(max(wide_types, key=lambda dtype: jnp.finfo(dtype).bits))


def token_letters(x: Array) -> str:
    """The token axes of x in an einsum, so that `[N, D]` and `[B, T, D]` use the same code."""
    return "bt"[: x.ndim - 1]


def apply_weight(equation: str, x: Array, weight: Array) -> Array:
    """`sharded_einsum(equation, x, weight)`, computed in the type of x; the weight's gradient has the weight's type.

    So training computes in the type that it gives x, whatever the type of the trained weights.
    """
    return _apply_weight(equation, x, weight)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply_weight(equation: str, x: Array, weight: Array) -> Any:
    return sharded_einsum(equation, x, weight)


def _apply_weight_forward(equation: str, x: Array, weight: Array) -> tuple[Array, Any]:
    return _apply_weight(equation, x, weight), (x, weight)


def _apply_weight_backward(equation: str, residuals: Any, gradient: Array) -> tuple[Array, Array]:
    x, weight = residuals
    left, right = equation.split("->")[0].split(",")
    out = equation.split("->")[1]
    gradient = gradient.astype(x.dtype)
    to_x = sharded_einsum(f"{out},{right}->{left}", gradient, weight).astype(x.dtype)
    return to_x, sharded_einsum(f"{left},{out}->{right}", x, gradient, weight).astype(weight.dtype)


_apply_weight.defvjp(_apply_weight_forward, _apply_weight_backward)

STACK_SOURCES_BELOW = 1024
"""Features of a layer on one device, below which the sum over source layers is one product (with several devices).

One product for each source layer adds to a target's sums once per source: this pays where the products are long enough.
With all sources stacked, one long product writes each target once, at the price of a copy of activations and decoders.
By the TPU compiler's schedule both take about as long at 1,024 features per chip on v5e, and at 1,536 on v6e.
"""


@jax.custom_vjp
def decode(
    activations: tuple[Float[Array, "N F"], ...], decoders: tuple[Float[Array, "F _ D"], ...]
) -> tuple[Float[Array, "N D"], ...]:
    """What all features write to each layer.

    1. decoders[s][:, r] writes to layer s + r.
    2. output[t] = sum over source layers s <= t of activations[s] @ decoders[s][:, t - s].

    Each feature shard computes the terms of its features; `sum_over_feature_shards` adds them up. Of the result
    each device keeps a share of its data shard's tokens, so that later work on it is not repeated on every device.
    Gradients have the type of the operands. The last target is computed first, since the backward pass needs it first;
    while its sum over shards is under way, the next target is computed.
    """
    features = activations[0].shape[-1]
    features_on_device = shard_shape(activations[0])[-1]
    stacked = features_on_device < min(features, STACK_SOURCES_BELOW)
    targets = [_decode_target(target, activations, decoders, stacked) for target in reversed(range(len(decoders)))]
    return tuple(shard_by_axes(written, ("batch", None)) for written in reversed(targets))


def _decode_target(
    target: int, activations: tuple[Array, ...], decoders: tuple[Array, ...], stacked: bool
) -> Float[Array, "N D"]:
    """What all features write to one layer, by one product over all source layers (`stacked`) or by one for each."""
    sources = [s for s, rows in enumerate(decoders[: target + 1]) if target - s < rows.shape[1]]
    a = [activations[s] for s in sources]
    with jax.named_scope(f"to_{target}"):
        rows = [decoders[s][:, target - s].astype(a[0].dtype) for s in sources]
        if stacked:
            return sharded_einsum("snf,sfd->nd", jnp.stack(a), jnp.stack(rows))
        first, *others = (sharded_einsum("nf,fd->nd", *pair) for pair in zip(a, rows, strict=True))
        return sum(others, first)


def _decode_forward(activations: tuple[Array, ...], decoders: tuple[Array, ...]) -> tuple[Any, Any]:
    return decode(activations, decoders), (activations, decoders)


def _decode_backward(residuals: Any, gradients: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    activations, decoders = residuals
    to_activations, to_decoders = [], []
    stacked = jnp.stack([x.astype(activations[0].dtype) for x in gradients], axis=1)
    # Without this barrier the compiler would stack them again for each source.
    gradient = prevent_fusion(shard_by_axes(stacked, ("tokens", None, None)))
    for source, (a, decoder) in enumerate(zip(activations, decoders, strict=True)):
        of_targets = gradient[:, source : source + decoder.shape[1]]
        with jax.named_scope(f"from_{source}"):
            to_a = sharded_einsum("nrd,frd->nf", of_targets, decoder.astype(a.dtype)).astype(a.dtype)
            # Without this barrier a TPU's compiler makes the penalties' gradients part of the product.
            to_activations.append(prevent_fusion(to_a))
            to_decoders.append(sharded_einsum("nf,nrd->frd", a, of_targets, decoder).astype(decoder.dtype))
    return tuple(to_activations), tuple(to_decoders)


decode.defvjp(_decode_forward, _decode_backward)
