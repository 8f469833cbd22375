"""Small random models in float64, one of them linear, and pairs of prompts of two lengths."""

import jax
import jax.numpy as jnp

from jclt.interventions import make_pairs
from jclt.models import Model, ModelConfig, declare

SHAPE = {"vocabulary": 11, "width": 8, "layers": 2, "heads": 2, "mlp_width": 12, "context": 8}
LINEAR = {"norm": "none", "activation": "relu", "gated": False, "mlp_bias": True, "attn_scale": 0.0}
"""With uniform attention; `make_model` gives its neurons a bias with which all of them are active."""
ROWS = [
    ((1, 2, 3, 4, 5), (1, 6, 3, 4, 5), 7, 8),
    ((4, 3, 2, 1), (4, 5, 2, 9), (9, 10), 6),
    ((9, 3, 2, 1, 3), (9, 2, 5, 1, 3), 5, (8, 2)),
]


def make_model(seed=0, **options) -> Model:
    """Inside `jax.enable_x64()`."""
    config = ModelConfig("llama", **SHAPE, **options)
    key = jax.random.key(seed)
    params = {}
    for number, (name, weight) in enumerate(declare(config).items()):
        own = jax.random.fold_in(key, number)
        shape = weight.init(own, jnp.float32).shape
        drawn = jax.random.normal(own, shape, jnp.float64)
        params[name] = drawn if "embedding" in name else 0.3 * drawn + (1.0 if name.endswith("gain") else 0.0)
    if options == LINEAR:
        params["up_bias"] = params["up_bias"] + 100
    return Model(config, params, None, "random")


def make_small_pairs(model, rows=ROWS):
    return make_pairs(model, rows)
