"""What tells one set of weights from another: a few sums of bits, exact and the same however the weights lie.

For each array, with u_i its numbers' bits as whole numbers and w_i odd numbers that depend on the place i,

    sum of u_i  and  sum of w_i * u_i, both modulo 2^32

Whole numbers add up to the same in any order, so neither the mesh nor the kind of device matters, and one pass over the
weights is all it costs. A single changed bit changes both sums: it adds a power of two times an odd number.
"""

import hashlib
import json
import weakref
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jclt.shapes import Array

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


@jax.jit
def bit_sums(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Both sums of each array, `[2]`."""
    return {name: _sums(x) for name, x in arrays.items()}


@jax.jit
def _coarse_sums(arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {name: _sums(x.astype(jnp.bfloat16)) for name, x in arrays.items()}


def _sums(x: Array) -> Array:
    weight = jnp.uint32(1)
    if x.ndim:
        where = jax.typeof(x).sharding
        shape = (*x.shape, 2) if x.dtype.itemsize == 8 else x.shape
        spec = jax.P(*where.spec, None) if x.dtype.itemsize == 8 else where.spec
        out = None if where.mesh.empty else jax.NamedSharding(where.mesh, spec)
        place = jnp.zeros((), jnp.uint32)
        for axis, size in enumerate(shape):
            along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis, out_sharding=out)
            place = along if axis == 0 else place * jnp.uint32(size % (1 << 32)) + along
        weight = place * jnp.uint32(2) + jnp.uint32(1)
    if x.dtype == jnp.bool_:
        bits = x.astype(jnp.uint32)
    elif x.dtype.itemsize == 8:  # seen as two halves
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        weight = weight if x.ndim else jnp.array([1, 3], jnp.uint32)
    else:
        bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    return jnp.stack([jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * weight, dtype=jnp.uint32)])


_known: dict[int, tuple[Any, str]] = {}


def fingerprint(weights: Any) -> str:
    """Of a pytree of weights, 16 hexadecimal digits, kept as long as the pytree lives.

    Weights count as bfloat16 has them, so that a model or coder is the same one whether it was loaded in float32 or in
    bfloat16. On several hosts all must ask.
    """
    kept = _known.get(id(weights))
    if kept is not None and kept[0]() is weights:
        return kept[1]
    named = {
        jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in jax.tree.leaves_with_path(weights)
    }
    sums = _coarse_sums({name: x for name, x in named.items() if jnp.issubdtype(jnp.result_type(x), jnp.floating)})
    made = digest({name: [list(named[name].shape), np.asarray(own).tolist()] for name, own in sums.items()})
    try:
        key = id(weights)
        _known[key] = weakref.ref(weights, lambda _: _known.pop(key, None)), made
    except TypeError:  # a plain dictionary: its owner may keep it
        pass
    return made


def digest(settings: Any) -> str:
    """Of anything that JSON can say, 16 hexadecimal digits; the order of names does not matter."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
