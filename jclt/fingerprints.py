"""Fingerprints that tell one set of weights from another: exact, and the same on every mesh and kind of device.

Each array gives two sums modulo 2^32, where u_i are the bits of its i-th number as a whole number:

    sum_i u_i    and    sum_i w_i u_i    with    w_i = 2 i + 1

1. A sum of whole numbers does not depend on the order, so the sharding of the array does not matter.
2. A single changed bit changes u_i by a power of two below 2^32, and w_i is odd, so it changes both sums.

The cost is one pass over the weights.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jclt.kept import keep_result
from jclt.numerics import is_small
from jclt.shapes import Array, ArrayLike

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


@jax.jit
def sum_bits(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The two sums of each array, `[2]`, over its bits."""
    return {name: _sum_array_bits(x) for name, x in arrays.items()}


@jax.jit
def _sum_bfloat16_bits(x: Array) -> Array:
    return _sum_array_bits(x.astype(jnp.bfloat16))


def _sum_bits_in_bfloat16(x: ArrayLike) -> np.ndarray:
    if not is_small(x):
        return np.asarray(_sum_bfloat16_bits(x))
    bits = np.asarray(x).astype(jnp.bfloat16).view(np.uint16).ravel().astype(np.uint32)
    weights = np.arange(1, 2 * bits.size, 2, dtype=np.uint32)
    return np.array([bits.sum(dtype=np.uint32), (bits * weights).sum(dtype=np.uint32)])


def _sum_array_bits(x: Array) -> Array:
    weight = jnp.uint32(1)
    if x.ndim:
        sharding = jax.typeof(x).sharding
        shape = (*x.shape, 2) if x.dtype.itemsize == 8 else x.shape
        spec = jax.P(*sharding.spec, None) if x.dtype.itemsize == 8 else sharding.spec
        out = None if sharding.mesh.empty else jax.NamedSharding(sharding.mesh, spec)
        index = jnp.zeros((), jnp.uint32)
        for axis, size in enumerate(shape):
            along_axis = jax.lax.broadcasted_iota(jnp.uint32, shape, axis, out_sharding=out)
            index = along_axis if axis == 0 else index * jnp.uint32(size % (1 << 32)) + along_axis
        weight = index * jnp.uint32(2) + jnp.uint32(1)
    if x.dtype == jnp.bool_:
        bits = x.astype(jnp.uint32)
    elif x.dtype.itemsize == 8:  # as two halves of 4 bytes
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        weight = weight if x.ndim else jnp.array([1, 3], jnp.uint32)
    else:
        bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    # Both sums by one reduction: two would each write out all bits and weights before they add them up.
    nothing, axes = (jnp.uint32(0), jnp.uint32(0)), range(bits.ndim)
    sums = jax.lax.reduce((bits, bits * weight), nothing, lambda x, y: (x[0] + y[0], x[1] + y[1]), axes)
    return jnp.stack(sums)


@keep_result
def fingerprint(weights: Any) -> str:
    """The fingerprint of a pytree of weights, 16 hexadecimal digits, computed once for each pytree.

    Weights are rounded to bfloat16 first, so a model or coder has the same fingerprint whether it was loaded in float32
    or in bfloat16. With several hosts, every host must call it.
    """
    named = {
        jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in jax.tree.leaves_with_path(weights)
    }
    floating = {name: x for name, x in named.items() if jnp.issubdtype(jnp.result_type(x), jnp.floating)}
    sums = {name: _sum_bits_in_bfloat16(x) for name, x in floating.items()}
    return hash_json({name: [list(named[name].shape), pair.tolist()] for name, pair in sums.items()})


def sum_blocks(blocks: Iterable[Array]) -> list[int]:
    """The two sums of an array in bfloat16, of which one block of rows after another is in memory.

    A block that begins at number s of the array has weights that are larger by 2 s than those of an array of its own.
    """
    start = first = second = 0
    for block in blocks:
        in_block, weighted = map(int, _sum_bits_in_bfloat16(block))
        first, second, start = first + in_block, second + weighted + 2 * start * in_block, start + block.size
    return [first % (1 << 32), second % (1 << 32)]


def hash_json(value: Any) -> str:
    """A hash of any JSON value, 16 hexadecimal digits; the order of names does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
