"""Activations of sparse coders, each with the gradient it is trained by, said out loud.

A gate's true gradient to its threshold is zero almost everywhere. The straight-through estimate takes the gate's jump
at the threshold for a slope of height 1/bandwidth over a window of that width: in expectation over smooth
pre-activations this is the gradient of the expected value, which the tests check.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jclt.models.ops import wide
from jclt.shapes import Array, Bool, Float, Int

Through = Literal["threshold", "all"]
"""Whom the estimate reaches: the threshold alone, or also what is compared with it and so every weight before it."""


def window(h: Array, threshold: Array, bandwidth: float) -> Array:
    """The rectangular kernel's density: 1/bandwidth within half a bandwidth of the threshold, else 0."""
    h, threshold = _wide(h), _wide(threshold)
    return jnp.where(jnp.abs(h - threshold) < bandwidth / 2, 1 / bandwidth, 0.0).astype(h.dtype)


def is_open(h: Array, threshold: Array) -> Bool[Array, "..."]:
    """The gate, strict and compared in at least float32: bfloat16 is coarse against thresholds of 0.03."""
    return _wide(h) > _wide(threshold)


def _wide(x: Array) -> Array:
    return x.astype(wide(x.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def jump_relu(
    h: Float[Array, "*N F"], threshold: Float[Array, "*M F"], bandwidth: float, through: Through
) -> Float[Array, "*N F"]:
    """h where it exceeds its threshold, else 0 (Rajamanoharan et al. 2024)."""
    return jnp.where(is_open(h, threshold), h, jnp.zeros_like(h))


def _jump_relu_forward(h: Array, threshold: Array, bandwidth: float, through: Through) -> tuple[Array, Any]:
    return jump_relu(h, threshold, bandwidth, through), (h, threshold)


def _jump_relu_backward(bandwidth: float, through: Through, kept: Any, gradient: Array) -> tuple[Array, Array]:
    h, threshold = kept
    jump = _wide(gradient) * _wide(threshold) * window(h, threshold, bandwidth)  # the value jumps by the threshold
    to_h = jnp.where(is_open(h, threshold), gradient, jnp.zeros_like(gradient))
    return to_h + jump.astype(h.dtype) if through == "all" else to_h, _like(-jump, threshold)


jump_relu.defvjp(_jump_relu_forward, _jump_relu_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def gate(
    h: Float[Array, "*N F"], threshold: Float[Array, "*M F"], bandwidth: float, through: Through
) -> Float[Array, "*N F"]:
    """1 where h exceeds its threshold, else 0: what an L0 penalty counts."""
    return is_open(h, threshold).astype(h.dtype)


def _gate_forward(h: Array, threshold: Array, bandwidth: float, through: Through) -> tuple[Array, Any]:
    return gate(h, threshold, bandwidth, through), (h, threshold)


def _gate_backward(bandwidth: float, through: Through, kept: Any, gradient: Array) -> tuple[Array, Array]:
    h, threshold = kept
    jump = _wide(gradient) * window(h, threshold, bandwidth)
    return jump.astype(h.dtype) if through == "all" else jnp.zeros_like(h), _like(-jump, threshold)


gate.defvjp(_gate_forward, _gate_backward)


def _like(gradient: Array, parameter: Array) -> Array:
    """The gradient summed over the axes that the parameter was broadcast along."""
    axes = tuple(i for i, size in enumerate(parameter.shape) if size == 1 and gradient.shape[i] != 1)
    return gradient.sum(axes, keepdims=True).astype(parameter.dtype)


def kth_largest(scores: tuple[Array, ...], k: int, axes: tuple[int, ...]) -> Array:
    """The k-th largest of non-negative scores over the given axes of all arrays together; those axes keep length 1."""
    low = jnp.zeros_like(scores[0].sum(axes, keepdims=True), jnp.int32)  # lies as the counts do

    def count(value: Array, own: Array) -> Array:
        # Counted along one axis in float32, exactly and much faster than in whole numbers.
        along = jnp.sum((own.astype(jnp.float32) >= value).astype(jnp.float32), axis=axes[-1], keepdims=True)
        return jnp.sum(along.astype(jnp.int32), axis=axes[:-1], keepdims=True)

    return largest_reached(lambda value: sum(count(value, own) for own in scores) >= k, low)


def largest_reached(is_reached: Callable[[Array], Any], low: Int[Array, "*N"]) -> Float[Array, "*N"]:
    """The largest non-negative float32 that is reached, where all below it are too; `low` is 0 in its shape.

    Found by bisection on the bits of a float, whose order as whole numbers is that of the values: exact, without a
    sort, and on a mesh only counts travel, never the scores.
    """

    def halve(i: Array, low: Array) -> Array:
        middle = low + (jnp.int32(1) << (jnp.int32(30) - i))
        return jnp.where(is_reached(jax.lax.bitcast_convert_type(middle, jnp.float32)), middle, low)

    found = jax.lax.fori_loop(jnp.int32(0), jnp.int32(31), halve, low)
    found = jnp.where(found < 1 << 23, 0, found)  # below the smallest normal number processors compare as with 0
    return jax.lax.stop_gradient(jax.lax.bitcast_convert_type(found, jnp.float32))


def top_k(h: Float[Array, "*N F"], k: int) -> Float[Array, "*N F"]:
    """ReLU of the k largest of each row, 0 elsewhere."""
    values = jax.nn.relu(h)
    least = kth_largest((jax.lax.stop_gradient(values),), k, (h.ndim - 1,))
    return jnp.where(values.astype(jnp.float32) >= least, values, jnp.zeros_like(values))


def batch_threshold(scores: tuple[Float[Array, "*N F"], ...], k: int) -> Float[Array, ""]:
    """The score that on average k features a token reach, over all tokens and all layers of the batch together."""
    tokens = scores[0].size // scores[0].shape[-1]
    least = kth_largest(scores, k * tokens, tuple(range(scores[0].ndim)))
    return least.reshape(())
