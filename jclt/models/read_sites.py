"""What a site holds in some layers: a pass that goes no further than the last of these needs, and has no logits."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jclt.mesh import make_sharding
from jclt.models.config import ModelConfig
from jclt.models.model import Model, on_mesh
from jclt.models.sites import Sites
from jclt.models.transformer import block, embed, make_context, take_layer
from jclt.models.weights import declare_layer_weights
from jclt.shapes import Array, Float, Int, Params, Stream, Tokens


def read_sites(
    model: Model, tokens: Int[np.ndarray, "B T"], site: str, layers: tuple[int, ...]
) -> tuple[Float[Array, "B T D"], ...]:
    """What the site, such as `mlp_in`, holds in each of these layers."""
    placement = make_sharding(model.mesh, tokens.shape, ("batch", None)) if model.mesh else None
    with on_mesh(model):
        return run_to_sites(model.config, model.params, site, layers, jax.device_put(tokens, placement))


@eqx.filter_jit
def run_to_sites(
    config: ModelConfig, params: Params, site: str, layers: tuple[int, ...], tokens: Tokens
) -> tuple[Float[Array, "B T D"], ...]:
    """The last of the layers is not in the loop over layers, so that the compiled program has
    nothing of it that the site does not need: for the input of an MLP, no MLP."""
    positions = jnp.zeros_like(tokens) + jnp.arange(tokens.shape[1], dtype=tokens.dtype)[None]
    context = make_context(config, positions, tokens.shape[1], params["token_embedding"].dtype)
    stacked = {name: params[name] for name in declare_layer_weights(config)}

    def step(x: Stream, layer: Array) -> tuple[Stream, Float[Array, "B T D"]]:
        sites = Sites(layer, (site,), None, None)
        x, _ = block(context, take_layer(stacked, layer), layer, sites, x, None)
        return x, sites.seen[site]

    last = max(layers)
    x = embed(config, params, tokens, positions, Sites(None, (), None, None))
    x, below = jax.lax.scan(step, x, jnp.arange(last, dtype=jnp.int32))
    _, top = step(x, jnp.asarray(last, jnp.int32))
    return tuple(top if layer == last else below[layer] for layer in layers)
