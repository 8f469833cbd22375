"""Activation functions of sparse coders, each with the gradient that trains it.

The true gradient of a gate with respect to its threshold is zero almost everywhere. The straight-through estimate
replaces the jump at the threshold by a slope of 1/bandwidth over a window of width `bandwidth`. In expectation over
smooth pre-activations this is the gradient of the expected value; the tests check it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jclt.numerics import at_least_float32
from jclt.shapes import Array, Bool, Float, Int

GradientTo = Literal["threshold", "all"]
"""What receives the straight-through estimate: the threshold alone, or also the pre-activation and so the encoder."""


def window_density(h: Array, threshold: Array, bandwidth: float) -> Array:
    """The density of a rectangular kernel: 1/bandwidth within half a bandwidth of the threshold, else 0."""
    h, threshold = _widen(h), _widen(threshold)
    return jnp.where(jnp.abs(h - threshold) < bandwidth / 2, 1 / bandwidth, 0.0).astype(h.dtype)


def is_open(h: Array, threshold: Array) -> Bool[Array, "..."]:
    """Whether h exceeds the threshold, compared in at least float32: bfloat16 is too coarse near 0.03."""
    return _widen(h) > _widen(threshold)


def _widen(x: Array) -> Array:
    return x.astype(at_least_float32(x.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def jump_relu(
    h: Float[Array, "*N F"], threshold: Float[Array, "*M F"], bandwidth: float, through: GradientTo
) -> Float[Array, "*N F"]:
    """h where it exceeds its threshold, else 0 (Rajamanoharan et al. 2024)."""
    return jnp.where(is_open(h, threshold), h, jnp.zeros_like(h))


def _jump_relu_forward(h: Array, threshold: Array, bandwidth: float, through: GradientTo) -> tuple[Array, Any]:
    return jump_relu(h, threshold, bandwidth, through), (h, threshold)


def _jump_relu_backward(bandwidth: float, through: GradientTo, residuals: Any, gradient: Array) -> tuple[Array, Array]:
    """The straight-through gradient, with g the gradient of the output and K the `window_density`:

    1. to threshold: -g threshold K, as the output jumps by the threshold where h reaches it
    2. to h: g where h exceeds the threshold, else 0; with `through="all"` also + g threshold K
    """
    h, threshold = residuals
    jump = _widen(gradient) * _widen(threshold) * window_density(h, threshold, bandwidth)
    to_h = jnp.where(is_open(h, threshold), gradient, jnp.zeros_like(gradient))
    return to_h + jump.astype(h.dtype) if through == "all" else to_h, _sum_like(-jump, threshold)


jump_relu.defvjp(_jump_relu_forward, _jump_relu_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def gate(
    h: Float[Array, "*N F"], threshold: Float[Array, "*M F"], bandwidth: float, through: GradientTo
) -> Float[Array, "*N F"]:
    """1 where h exceeds its threshold, else 0: what an L0 penalty counts."""
    return is_open(h, threshold).astype(h.dtype)


def _gate_forward(h: Array, threshold: Array, bandwidth: float, through: GradientTo) -> tuple[Array, Any]:
    return gate(h, threshold, bandwidth, through), (h, threshold)


def _gate_backward(bandwidth: float, through: GradientTo, residuals: Any, gradient: Array) -> tuple[Array, Array]:
    h, threshold = residuals
    jump = _widen(gradient) * window_density(h, threshold, bandwidth)
    return jump.astype(h.dtype) if through == "all" else jnp.zeros_like(h), _sum_like(-jump, threshold)


gate.defvjp(_gate_forward, _gate_backward)


def _sum_like(gradient: Array, parameter: Array) -> Array:
    """The gradient summed over the axes along which the parameter was broadcast."""
    axes = tuple(i for i, size in enumerate(parameter.shape) if size == 1 and gradient.shape[i] != 1)
    return gradient.sum(axes, keepdims=True).astype(parameter.dtype)


def kth_largest(scores: tuple[Array, ...], k: int, axes: tuple[int, ...]) -> Array:
    """The k-th largest of non-negative scores over the given axes of all arrays together; those axes keep length 1."""
    zero = jnp.zeros_like(scores[0].sum(axes, keepdims=True), jnp.int32)  # sharded as the counts are
    return find_largest_reached(lambda value: sum(count_reached(x, value, axes) for x in scores) >= k, zero)


def count_reached(x: Float[Array, "..."], value: Array, axes: tuple[int, ...]) -> Int[Array, "..."]:
    """How many numbers are at least this value, over the given axes, which keep length 1."""
    # Counted along one axis in float32: exact, and much faster than in integers.
    along_axis = jnp.sum((x.astype(jnp.float32) >= value).astype(jnp.float32), axis=axes[-1], keepdims=True)
    return jnp.sum(along_axis.astype(jnp.int32), axis=axes[:-1], keepdims=True)


def find_largest_reached(is_reached: Callable[[Array], Any], zero: Int[Array, "*N"]) -> Float[Array, "*N"]:
    """The largest non-negative float32 for which `is_reached` is true. If it is true of a value, it must be true of all
    smaller ones. `zero` gives the shape.

    Bisection on the bits of a float: as integers, non-negative floats have the order of their values. So the result is
    exact and needs no sort, and on a mesh only counts are communicated, never scores.
    """

    def halve(i: Array, bits: Array) -> Array:
        middle = bits + (jnp.int32(1) << (jnp.int32(30) - i))
        return jnp.where(is_reached(jax.lax.bitcast_convert_type(middle, jnp.float32)), middle, bits)

    bits = jax.lax.fori_loop(jnp.int32(0), jnp.int32(31), halve, zero)
    bits = jnp.where(bits < 1 << 23, 0, bits)  # processors compare numbers below the smallest normal one as 0
    return jax.lax.stop_gradient(jax.lax.bitcast_convert_type(bits, jnp.float32))


def top_k(h: Float[Array, "*N F"], k: int) -> Float[Array, "*N F"]:
    """ReLU of the k largest of each row, 0 elsewhere."""
    values = jax.nn.relu(h)
    threshold = kth_largest((jax.lax.stop_gradient(values),), k, (h.ndim - 1,))
    return jnp.where(values.astype(jnp.float32) >= threshold, values, jnp.zeros_like(values))


def batch_thresholds(scores: tuple[Float[Array, "*N"], ...], k: int, tokens: int) -> Float[Array, "L"]:
    """BatchTopK: for each layer the score from which on its features are active, k a token on average in all layers.

    Half of them are the highest scores of every layer, as many in each, and the others the highest of those that are
    left. If all were the highest of all layers, layers whose features write little would starve, such as the last ones
    of a cross-layer transcoder: what is seldom active learns little.
    """
    axes, each = tuple(range(scores[0].ndim)), max(1, k * tokens // (2 * len(scores)))

    def reach_share(values: Float[Array, "L"]) -> Bool[Array, "L"]:
        counts = [count_reached(x, value, axes).reshape(()) for x, value in zip(scores, values, strict=True)]
        return jnp.stack(counts) >= each

    own = find_largest_reached(reach_share, jnp.zeros(len(scores), jnp.int32))  # one search for all layers
    lifted = tuple(jnp.where((x >= bound) & (x > 0), jnp.inf, x) for x, bound in zip(scores, own, strict=True))
    return jnp.minimum(own, kth_largest(lifted, k * tokens, axes).reshape(()))
