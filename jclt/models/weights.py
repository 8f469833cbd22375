"""One declaration per weight: its shape, initial values, sharding and the target for restoring a checkpoint."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jclt.mesh import AnyMesh, make_sharding
from jclt.models.config import ModelConfig
from jclt.shapes import Array, DTypeLike


class Weight(NamedTuple):
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical axes: `mesh.LOGICAL_AXES` says how each is sharded
    scale: float | None  # standard deviation of the initial values; None: the constant below
    constant: float = 0.0
    inputs: int = 0  # for matrices: how many leading axes it contracts

    def init(self, key: Array, dtype: DTypeLike) -> Array:
        if self.scale is None:
            return jnp.full(self.shape, self.constant, dtype)
        return (self.scale * jax.random.normal(key, self.shape, jnp.float32)).astype(dtype)

    def abstract(self, mesh: AnyMesh | None, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
        where = make_sharding(mesh, self.shape, self.axes) if mesh is not None else None
        return jax.ShapeDtypeStruct(self.shape, dtype, sharding=where)


def declare_layer_weights(config: ModelConfig) -> dict[str, Weight]:
    """The weights of one layer; every layer has the same ones."""
    c = config
    d, m, h, g, k = c.width, c.mlp_width, c.heads, c.key_heads, c.head_size
    # Initially products keep the scale of their inputs. Writes to the residual stream are smaller, so that the stream
    # does not grow with depth.
    read, write = d**-0.5, (2 * c.layers) ** -0.5
    gain = Weight((d,), ("stored",), None, 1.0 - c.norm_offset)
    head_gain = Weight((k,), (None,), None, 1.0 - c.norm_offset)
    bias = Weight((d,), ("stored",), None)
    norms = ["attn_norm", *([] if c.post_norms is False else ["attn_post_norm", "mlp_post_norm"]), "mlp_norm"]

    weights = {f"{norm}_gain": gain for norm in norms}
    if c.norm == "layer":
        weights |= {f"{norm}_bias": bias for norm in norms}
    weights |= {
        "query": Weight((d, h, k), ("stored", None, None), read, inputs=1),
        "key": Weight((d, g, k), ("stored", None, None), read, inputs=1),
        "value": Weight((d, g, k), ("stored", None, None), read, inputs=1),
        "attn_out": Weight((h, k, d), ("stored",) * 3, (h * k) ** -0.5 * write, inputs=2),
        "up": Weight((d, m), ("stored", None), read, inputs=1),
        "down": Weight((m, d), ("stored",) * 2, m**-0.5 * write, inputs=1),
    }
    if c.gated:
        weights["gate"] = Weight((d, m), ("stored", None), read, inputs=1)
    if c.qk_norm:
        weights |= {"query_norm_gain": head_gain, "key_norm_gain": head_gain}
    if c.qkv_bias:
        weights |= {
            "query_bias": Weight((h, k), (None, None), None),
            "key_bias": Weight((g, k), (None, None), None),
            "value_bias": Weight((g, k), (None, None), None),
        }
    if c.attn_out_bias:
        weights["attn_out_bias"] = bias
    if c.mlp_bias:
        weights |= {"up_bias": Weight((m,), (None,), None), "down_bias": bias}
        if c.gated:
            weights["gate_bias"] = Weight((m,), (None,), None)
    return weights


def declare_model_weights(config: ModelConfig) -> dict[str, Weight]:
    """The weights outside the layers."""
    c = config
    embedding = Weight((c.vocabulary, c.width), (None, "stored"), 0.02)
    weights = {
        "token_embedding": embedding,
        "final_norm_gain": Weight((c.width,), ("stored",), None, 1.0 - c.norm_offset),
    }
    if c.learned_positions:
        weights["position_embedding"] = Weight((c.context, c.width), (None, "stored"), 0.02)
    if c.norm == "layer":
        weights["final_norm_bias"] = Weight((c.width,), ("stored",), None)
    if not c.tied:
        weights["unembedding"] = embedding
    return weights


def declare(config: ModelConfig) -> dict[str, Weight]:
    """Every weight of the model. Weights of the layers are stacked along a leading layer axis."""
    stacked = {
        name: weight._replace(shape=(config.layers, *weight.shape), axes=(None, *weight.axes))
        for name, weight in declare_layer_weights(config).items()
    }
    return declare_model_weights(config) | stacked


def abstract_params(
    config: ModelConfig, mesh: AnyMesh | None = None, dtype: DTypeLike = jnp.float32
) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: weight.abstract(mesh, dtype) for name, weight in declare(config).items()}


def count_local_bytes(arrays: Iterable[jax.ShapeDtypeStruct]) -> int:
    """The memory that these arrays take on one device; for CPU devices, on this host."""
    total = 0
    for x in arrays:
        where = x.sharding
        pieces = 1 if where is None else len(where.addressable_devices)
        on_host = jax.local_devices()[0].platform == "cpu"
        shape = x.shape if where is None else where.shard_shape(x.shape)
        total += math.prod(shape) * x.dtype.itemsize * (pieces if on_host else 1)
    return total
