"""Products that are exact to float32 on every device, or of a named precision; and functions of logits."""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jclt.errors import UserError
from jclt.shapes import Array, ArrayLike, DTypeLike, Float

Precision = Literal["float32", "tf32_3x", "tf32", "bfloat16_3x", "bfloat16"]
"""How float32 numbers are multiplied. Their products are always summed in float32. `_3x`: each number is the sum of two
of the narrow type, and three of the four products are computed."""


class NarrowProduct(NamedTuple):
    algorithm: jax.lax.DotAlgorithmPreset
    bits: int  # that it keeps of each number's fraction


NARROW_PRODUCTS: dict[Precision, NarrowProduct] = {
    "tf32_3x": NarrowProduct(jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3, 21),
    "tf32": NarrowProduct(jax.lax.DotAlgorithmPreset.TF32_TF32_F32, 10),
    "bfloat16_3x": NarrowProduct(jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3, 15),
    "bfloat16": NarrowProduct(jax.lax.DotAlgorithmPreset.BF16_BF16_F32, 7),
}


SMALL_ARRAY = 1 << 20
"""Numbers that a host has looked at before a program for their shape would be compiled."""


def is_small(x: ArrayLike) -> bool:
    """Whether all of the array is at this host, and small enough to be looked at there."""
    return np.size(x) <= SMALL_ARRAY and (not isinstance(x, jax.Array) or x.is_fully_addressable)


def at_least_float32(dtype: DTypeLike) -> DTypeLike:
    """The type that sums, norms and softmaxes are computed in."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def einsum(
    equation: str, x: Array, *others: Array, precision: Precision = "float32", out_sharding: P | None = None
) -> Array:
    """An einsum in which float32 means float32 on every device; operands in bfloat16 or float16 give a float32 sum.

    Left to themselves accelerators multiply float32 numbers in fewer bits. They do so here if `precision` names it.
    """
    if precision != "float32" and x.dtype == jnp.float32:
        return multiply_narrowly(equation, NARROW_PRODUCTS[precision], x, *others)
    return jnp.einsum(
        equation,
        x,
        *others,
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=at_least_float32(x.dtype),
        out_sharding=out_sharding,
    )


def multiply_narrowly(equation: str, product: NarrowProduct, *operands: Float[Array, "..."]) -> Float[Array, "..."]:
    """An einsum of float32 numbers in fewer bits. CPUs have no such products: there the operands, and in the derivative
    the results, are rounded to the bits that the product keeps, and errors are as large as on a device that has it."""

    def multiply(*operands: Array) -> Array:
        return jnp.einsum(equation, *operands, precision=product.algorithm, preferred_element_type=jnp.float32)

    def multiply_rounded(*operands: Array) -> Array:
        return einsum(equation, *(jax.lax.reduce_precision(x, 8, product.bits) for x in operands))

    return jax.lax.platform_dependent(*operands, cpu=multiply_rounded, default=multiply)


def check_precision(name: str) -> None:
    """An error of one line where the device has no products of this precision."""
    names = get_args(Precision)
    if name not in names:
        raise UserError(f"precision '{name}': expected {', '.join(names[:-1])} or {names[-1]}")
    if name in NARROW_PRODUCTS and not has_precision(name):  # asking takes a compilation; float32 is everywhere
        able = " or ".join(other for other in names if has_precision(other))
        raise UserError(f"precision '{name}': this {jax.default_backend()} has no such products, expected {able}")


def has_precision(name: Any) -> bool:
    """Whether the device's compiler takes a small product of this precision."""
    x = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    try:
        jax.jit(lambda x, y: einsum("ab,bc->ac", x, y, precision=name)).lower(x, x).compile()
    except (jax.errors.JaxRuntimeError, ValueError):
        return False
    return True


def kl_divergence(logits: Float[Array, "*N V"], other: Float[Array, "*N V"]) -> Float[Array, "*N"]:
    """KL(p || q) of the distributions p and q that the first and the second logits give."""
    p, q = jax.nn.log_softmax(logits, axis=-1), jax.nn.log_softmax(other, axis=-1)
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)
