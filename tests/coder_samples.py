"""Coders of each kind and rule, for tests of files."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jclt.coders import CoderConfig, SparseCoder, abstract_coder

CLT = CoderConfig("clt", 16, layers=(0, 1, 2), width=6, model="a/model", bandwidth=0.5, through="threshold")


PLT = replace(CLT, kind="transcoder")


SAE = replace(PLT, kind="sae", reads="resid_post", writes="resid_post")


RULES = {"jumprelu": {}, "relu": {"activation": "relu"}, "topk": {"activation": "topk", "k": 5}}


def random_coder(config: CoderConfig, dtype="float32", seed=0) -> SparseCoder:
    """A coder with random weights that `dtype` holds without loss."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        values = np.float32(rng.standard_normal(leaf.shape) / leaf.shape[-1] ** 0.5)
        values = np.abs(values) if path[-1].name == "threshold" else values
        return jnp.asarray(values.astype(jnp.dtype(dtype)).astype(np.float32))

    return jax.tree_util.tree_map_with_path(fill, abstract_coder(config))


def compute_outputs(coder: SparseCoder, x: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Activations and reconstructions of every layer."""

    @jax.jit
    def compute(coder, inputs):
        activations = [coder.encode(layer, layer_x) for layer, layer_x in enumerate(inputs)]
        return activations, [coder.write(layer, activations, layer_x) for layer, layer_x in enumerate(inputs)]

    activations, reconstruction = compute(coder, list(x))
    return [np.asarray(a) for a in activations], [np.asarray(y) for y in reconstruction]
