"""The transformer's arithmetic as plain functions of arrays, with no notion of layers, sites or parameters."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jclt.models.config import Activation, ModelConfig, RopeScaling
from jclt.numerics import einsum, is_small
from jclt.shapes import Array, Bool, DTypeLike, Float, Int, Mask


def find_finite_rows(x: Float[Array, "..."]) -> Bool[Array | np.ndarray, "_"]:
    """Whether all numbers of each row are finite."""
    if is_small(x):
        return np.asarray(np.isfinite(np.asarray(x)).all(axis=tuple(range(1, x.ndim))))
    return _find_finite_rows(x)


@jax.jit
def _find_finite_rows(x: Float[Array, "..."]) -> Bool[Array, "_"]:
    return jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))


ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


def compute_neurons(config: ModelConfig, up: Array, gate: Array | None) -> Array:
    """The neurons of an MLP, of what its projections return."""
    activation = ACTIVATIONS[config.activation]
    return activation(up) if gate is None else activation(gate) * up


def center(x: Float[Array, "*batch D"], axis: int = -1) -> Float[Array, "*batch D"]:
    return x - x.mean(axis=axis, keepdims=True)


def compute_denominator(x: Float[Array, "*batch D"], epsilon: float) -> Float[Array, "*batch"]:
    """The denominator of a norm: the root mean square of its (centred) input."""
    return prevent_fusion(jnp.sqrt(jnp.mean(x * x, axis=-1) + jnp.asarray(epsilon, x.dtype)))


def prevent_fusion(x: Array) -> Array:
    """The same value, which the compiler may not fuse with the operations that use it.

    Otherwise it fuses a norm's sums with the operations before them, and its root with the division, in ways that
    depend on which sites are in use. Unfused, the network computes the same bits whatever is captured.
    """
    return jax.lax.optimization_barrier(x)


def prevent_fma(x: Array) -> Array:
    """The same value, rounded before it is added to anything: no fused multiply-add.

    A fused multiply-add does not round the product. The compiler uses it where it sees product and sum together, so the
    sum would depend on whether a site is between the two. A maximum that changes no finite value separates them.
    """
    return jnp.maximum(x, jnp.finfo(x.dtype).min)


def soft_cap(x: Array, cap: float | None) -> Array:
    if cap is None:
        return x
    limit = jnp.asarray(cap, x.dtype)
    return limit * jnp.tanh(x / limit)


def rotary_frequencies(width: int, base: float, scaling: RopeScaling | None) -> Float[Array, "half"]:
    """Radians per position, for each pair of rotating dimensions."""
    frequencies = 1.0 / base ** (jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # Llama 3 divides frequencies by the factor where a wave is longer than the original context, keeps those of short
    # waves, and interpolates between the two.
    turns = scaling.original_context * frequencies / (2 * jnp.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept_share = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept_share + (1.0 - kept_share) / scaling.factor)


def rotation(config: ModelConfig, positions: Int[Array, "B T"], local: bool, dtype: DTypeLike) -> tuple[Array, Array]:
    """Cosines and sines `[B, T, 1, half]` of the angles by which queries and keys are rotated."""
    if local and config.rope_local_base is not None:
        frequencies = rotary_frequencies(config.rotary_width, config.rope_local_base, None)
    else:
        frequencies = rotary_frequencies(config.rotary_width, config.rope_base, config.rope_scaling)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: Float[Array, "B T H K"], cos_and_sin: tuple[Array, Array]) -> Float[Array, "B T H K"]:
    """Rotates the first dimensions of every head, in pairs (i, i + half); the other dimensions stay as they are."""
    cos, sin = cos_and_sin
    half = cos.shape[-1]
    first, second = x[..., :half].astype(cos.dtype), x[..., half : 2 * half].astype(cos.dtype)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*(part.astype(x.dtype) for part in rotated), x[..., 2 * half :]], axis=-1)


def causal_mask(queries: Int[Array, "B T"], keys: Int[Array, "S"], window: int | None) -> Mask:
    """The positions that each position may attend to. A window of w is the position itself and the w - 1 before it."""
    distance = queries[:, :, None] - keys[None, None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def attention_scores(
    queries: Float[Array, "B T H K"], keys: Float[Array, "B S G K"], scale: Float[Array, ""]
) -> Float[Array, "B H T S"]:
    """Scaled products in float32; each group of H / G query heads shares one key head."""
    (b, t, h, k), (s, g) = queries.shape, keys.shape[1:3]
    grouped = queries.reshape(b, t, g, h // g, k)
    return einsum("btgrk,bsgk->bgrts", grouped, keys).reshape(b, h, t, s) * scale


def softmax(scores: Float[Array, "B H T S"], mask: Bool[Array, "B T S"]) -> Float[Array, "B H T S"]:
    return jax.nn.softmax(jnp.where(mask[:, None], scores, jnp.finfo(scores.dtype).min), axis=-1)


def attend(pattern: Float[Array, "B H T S"], values: Float[Array, "B S G K"]) -> Float[Array, "B T H K"]:
    (b, h, t, s), (g, k) = pattern.shape, values.shape[2:]
    grouped = pattern.astype(values.dtype).reshape(b, g, h // g, t, s)
    return einsum("bgrts,bsgk->btgrk", grouped, values).astype(values.dtype).reshape(b, t, h, k)
