"""Coders with random weights."""

import jax
import jax.numpy as jnp
import numpy as np

from jclt.coders import CoderConfig, SparseCoder, abstract_coder


def random_coder(config: CoderConfig, dtype=np.float32, seed: int = 0) -> SparseCoder:
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        values = rng.standard_normal(leaf.shape)
        return jnp.asarray(np.abs(values) if path[-1].name == "threshold" else values, dtype)

    return jax.tree_util.tree_map_with_path(fill, abstract_coder(config))
