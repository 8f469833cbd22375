"""A coder's products: float32 sums and float32 gradients whatever they multiply, on any mesh.

`jax.vjp` would give a weight's gradient the type that the product multiplied in. Written by hand it stays float32, so
that gradients of micro-batches add up without loss.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jclt.mesh import einsum_spec, placed, shard_shape
from jclt.models.ops import held, wide
from jclt.shapes import Array, Float


def einsum(equation: str, x: Array, y: Array, weight: Array | None = None) -> Array:
    """Both operands in the type of the first, the sum in at least float32; what is summed over pieces of a mesh axis is
    added up across it.

    Where the result is the gradient of a weight whose type says that its gradients are added up later (`reduced`), it
    is left as pieces of a sum (`unreduced`).
    """
    dtype = x.dtype
    where = einsum_spec(equation, x, y)
    if weight is not None and where is not None:
        where = P(*where, unreduced=jax.typeof(weight).sharding.spec.reduced)

    def multiply(x: Array, y: Array) -> Array:
        return jnp.einsum(
            equation,
            x,
            y,
            precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
            preferred_element_type=wide(dtype),
            out_sharding=where,
        )

    if dtype != jnp.bfloat16:
        return multiply(x, y.astype(dtype))
    # On CPUs the compiler lacks some of the products of bfloat16 with float32 sums; these are the same numbers.
    widened: Any = lambda x, y: multiply(x.astype(jnp.float32), y.astype(jnp.float32))  # noqa: E731
    return jax.lax.platform_dependent(x, y.astype(dtype), cpu=widened, default=multiply)


def exact(x: Array, weight: Array) -> Array:
    """x in a type in which `product(x, weight)` rounds neither: its own where both have one, else the wider of the two,
    at least float32."""
    if x.dtype == weight.dtype:
        return x
    return x.astype(max((wide(x.dtype), wide(weight.dtype)), key=lambda dtype: jnp.finfo(dtype).bits))


def letters(x: Array) -> str:
    """The axes of tokens in an einsum: `[N, D]` and `[B, T, D]` go through the same code."""
    return "bt"[: x.ndim - 1]


def product(equation: str, x: Array, weight: Array) -> Array:
    """`einsum(equation, x, weight)`, in the type of x; the weight's gradient in the weight's own type.

    So training computes in the type that it gives x, whatever the trained weights have.
    """
    return _product(equation, x, weight)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(equation: str, x: Array, weight: Array) -> Any:
    return einsum(equation, x, weight)


def _product_forward(equation: str, x: Array, weight: Array) -> tuple[Array, Any]:
    return _product(equation, x, weight), (x, weight)


def _product_backward(equation: str, kept: Any, gradient: Array) -> tuple[Array, Array]:
    x, weight = kept
    left, right = equation.split("->")[0].split(",")
    out = equation.split("->")[1]
    gradient = gradient.astype(x.dtype)
    to_x = einsum(f"{out},{right}->{left}", gradient, weight).astype(x.dtype)
    return to_x, einsum(f"{left},{out}->{right}", x, gradient, weight).astype(weight.dtype)


_product.defvjp(_product_forward, _product_backward)

JOINED_BELOW = 1024
"""Features of a layer on one of several devices, below which the sum over sources is contracted as one product.

A product for each source adds to a target's sums once per source, which pays while it is long enough. Joined over
sources a target is written once, by one long product; the price is a copy of activations and decoders in that order.
By the TPU compiler's schedule both take about as long at 1,024 features a chip on v5e, and at 1,536 on v6e.
"""


@jax.custom_vjp
def decode(
    activations: tuple[Float[Array, "N F"], ...], decoders: tuple[Float[Array, "F _ D"], ...]
) -> tuple[Float[Array, "N D"], ...]:
    """What all features write to each layer: the sum over source layers s of activations[s] times decoders[s], whose
    R-th row writes to layer s + R.

    Feature shards each hold a piece of every sum. Of the sums each device keeps the tokens that are its own, a share
    of its data shard's: what is made of them need not be made on every device. Gradients come back in the type that
    products are computed in. The last target comes first, as the backward pass asks for it first; while its pieces
    are added up the next can be multiplied.
    """
    features = activations[0].shape[-1]
    on_device = shard_shape(activations[0])[-1]
    joined = on_device < min(features, JOINED_BELOW)
    targets = [_written(target, activations, decoders, joined) for target in reversed(range(len(decoders)))]
    return tuple(placed(own, ("batch", None)) for own in reversed(targets))


def _written(target: int, activations: tuple[Array, ...], decoders: tuple[Array, ...], joined: bool) -> Array:
    """To one layer, by one product over all sources or by one for each."""
    sources = [s for s, rows in enumerate(decoders[: target + 1]) if target - s < rows.shape[1]]
    a = [activations[s] for s in sources]
    with jax.named_scope(f"to_{target}"):
        rows = [decoders[s][:, target - s].astype(a[0].dtype) for s in sources]
        if joined:
            return einsum("snf,sfd->nd", jnp.stack(a), jnp.stack(rows))
        first, *others = (einsum("nf,fd->nd", *pair) for pair in zip(a, rows, strict=True))
        return sum(others, first)


def _decode_forward(activations: tuple[Array, ...], decoders: tuple[Array, ...]) -> tuple[Any, Any]:
    return decode(activations, decoders), (activations, decoders)


def _decode_backward(kept: Any, gradients: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    activations, decoders = kept
    to_activations, to_decoders = [], []
    own = jnp.stack([x.astype(activations[0].dtype) for x in gradients], axis=1)
    # Held, or the compiler would stack them anew for each source.
    gradient = held(placed(own, ("tokens", None, None)))
    for source, (a, decoder) in enumerate(zip(activations, decoders, strict=True)):
        written = gradient[:, source : source + decoder.shape[1]]
        with jax.named_scope(f"from_{source}"):
            to_a = einsum("nrd,frd->nf", written, decoder.astype(a.dtype)).astype(a.dtype)
            to_activations.append(held(to_a))  # or a TPU's compiler makes penalties' gradients part of the product
            to_decoders.append(einsum("nf,nrd->frd", a, written, decoder).astype(decoder.dtype))
    return tuple(to_activations), tuple(to_decoders)


decode.defvjp(_decode_forward, _decode_backward)
