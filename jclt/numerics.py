"""Products that are exact to float32 on every device, and functions of logits."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jclt.shapes import Array, DTypeLike, Float


def at_least_float32(dtype: DTypeLike) -> DTypeLike:
    """The type that sums, norms and softmaxes are computed in."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def einsum(equation: str, x: Array, *others: Array, out_sharding: P | None = None) -> Array:
    """An einsum in which float32 means float32 on every device; operands in bfloat16 or float16 give a float32 sum.

    By default accelerators multiply float32 numbers in fewer bits.
    """
    return jnp.einsum(
        equation,
        x,
        *others,
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=at_least_float32(x.dtype),
        out_sharding=out_sharding,
    )


def kl_divergence(logits: Float[Array, "*N V"], other: Float[Array, "*N V"]) -> Float[Array, "*N"]:
    """KL(p || q) of the distributions p and q that the first and the second logits give."""
    p, q = jax.nn.log_softmax(logits, axis=-1), jax.nn.log_softmax(other, axis=-1)
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)
