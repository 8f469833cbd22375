"""A pass over many rows that begins in the middle of another: at a layer and a position before which nothing differs.

Rows that change one place each need neither the layers below it nor the positions before it. `keep_pass` keeps the
residual streams before every block and the keys and values of one prompt; `resume_pass` runs from there on.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jclt.attribution.true_pass import widen
from jclt.models import MODEL_SITES, Cache, Edit, Model, ModelConfig, Sites, forward
from jclt.models.transformer import block, make_context, unembed
from jclt.models.weights import declare_layer_weights
from jclt.shapes import Array, Captured, Float, Int, Logits, Params, Tokens


def make_rows_mesh() -> Mesh:
    """The devices of this host, between which rows are split."""
    devices = jax.local_devices()
    return jax.make_mesh((len(devices),), ("rows",), axis_types=(AxisType.Auto,), devices=devices)


def place_weights(model: Model, mesh: Mesh) -> Params:
    """The model's weights on every device of the mesh, in float32 at least."""
    return jax.device_put(widen(dict(model.params)), NamedSharding(mesh, P()))


class KeptPass(NamedTuple):
    """What a pass over one prompt left."""

    streams: Float[Array, "L T D"]  # before each block
    cache: Cache  # [L, T, G, K]
    logits: Float[Array, "V"]  # at the last position


def keep_pass(
    config: ModelConfig, params: Params, tokens: Tokens, capture: tuple[str, ...] = (), edit: Edit | None = None
) -> tuple[KeptPass, Captured]:
    """Runs one prompt `[1, T]`; also gives the captured sites, without their batch axis."""
    length = tokens.shape[1]
    shape = (config.layers, 1, length, config.key_heads, config.head_size)
    empty = Cache(*(jnp.zeros(shape, params["token_embedding"].dtype),) * 2)
    positions = jnp.arange(length, dtype=tokens.dtype)[None]
    sites = tuple(dict.fromkeys(("resid_pre", *capture)))
    logits, seen, cache = forward(config, params, tokens, capture=sites, edit=edit, cache=empty, positions=positions)
    assert cache is not None
    seen = {name: x[0] if name in MODEL_SITES else x[:, 0] for name, x in seen.items()}
    return KeptPass(seen["resid_pre"], Cache(*(x[:, 0] for x in cache)), logits[0, -1]), seen


def resume_pass(
    config: ModelConfig,
    params: Params,
    kept: KeptPass,
    first_layer: Int[Array, ""],
    start: int,
    rows: int,
    edit: Edit,
) -> Logits:
    """The logits `[rows, 1, V]` at the last position, of rows that differ from the kept pass by `edit` alone.

    The edit changes nothing below `first_layer` and before position `start`. It receives values of the positions from
    `start` on.
    """
    length, width = kept.streams.shape[1:]
    positions = jnp.broadcast_to(jnp.arange(start, length, dtype=jnp.int32), (rows, length - start))
    context = make_context(config, positions, length, kept.streams.dtype)
    stacked = {name: params[name] for name in declare_layer_weights(config)}

    def run_layer(layer: Array, x: Float[Array, "B t D"]) -> Float[Array, "B t D"]:
        weights = {name: weight[layer] for name, weight in stacked.items()}
        cache = Cache(*(jnp.broadcast_to(x[layer], (rows, *x.shape[1:])) for x in kept.cache))
        return block(context, weights, layer, Sites(layer, edit=edit, positions=positions), x, cache)[0]

    x = jnp.broadcast_to(kept.streams[first_layer][None, start:], (rows, length - start, width))
    x = jax.lax.fori_loop(first_layer, config.layers, run_layer, x)
    return unembed(config, params, x[:, -1:], Sites(None, edit=edit, positions=positions[:, -1:]))
