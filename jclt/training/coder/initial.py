"""The initial weights of a coder, as in Circuit Tracing (2025) or Gemma Scope 2, and encoder biases fitted to data."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jclt.coders import SparseCoder, abstract_coder, declare_coder
from jclt.coders.activations import kth_largest
from jclt.shapes import Array, Float
from jclt.training.config import TrainConfig

INITIAL_TOKENS = 10_000.0
"""Divided by the number of features, this is the share of tokens on which each feature fires at the start."""


def make_initial_weights(config: TrainConfig, mesh: Mesh) -> SparseCoder:
    """Initial float32 weights, created with their shardings.

    Under JumpReLU the field `threshold` holds the threshold's logarithm, which is the weight that is trained.
    """
    c = config.coder
    shardings = jax.tree.map(lambda x: x.sharding, abstract_coder(c, mesh))

    def make(key: Array) -> SparseCoder:
        keys = iter(jax.random.split(key, len(jax.tree.leaves(abstract_coder(c)))))

        def make_leaf(name: str, shape: tuple[int, ...]) -> Array:
            leaf_key = next(keys)
            if name in ("encoder", "decoder"):
                bound = c.features**-0.5 if name == "encoder" else (len(c.covered) * c.size) ** -0.5
                return jax.random.uniform(leaf_key, shape, jnp.float32, -bound, bound)
            return jnp.full(shape, jnp.log(config.threshold) if name == "threshold" else 0.0, jnp.float32)

        coder = declare_coder(c, make_leaf)
        if config.initial == "clt" or c.tied:
            return coder
        encoders = [transpose_decoder(layer.decoder_rows) for layer in coder.layers]
        return eqx.tree_at(lambda t: [layer.encoder for layer in t.layers], coder, encoders)

    return jax.jit(make, out_shardings=shardings)(jax.random.key(config.seed))


def transpose_decoder(rows: Float[Array, "F R D"]) -> Float[Array, "F D"]:
    """An encoder: each feature reads the direction that it writes to its own layer, at unit length."""
    to_same_layer = rows[:, 0]
    return to_same_layer / jnp.linalg.norm(to_same_layer, axis=1, keepdims=True)


def calibrate_bias(h: Float[Array, "N F"], threshold: Array, density: float) -> Float[Array, "F"]:
    """The encoder biases with which each feature exceeds its threshold on this share of the tokens."""
    count = max(1, round(density * h.shape[0]))
    lifted = h - h.min()  # the search needs non-negative numbers
    last_in = kth_largest((lifted,), count, (0,))
    # The threshold comes halfway to the next token below, so that rounding does not decide. Equal tokens, such as the
    # first of every row, differ by rounding only and count as one.
    below = lifted < last_in - 1e-4 * lifted.max()
    first_out = jnp.max(jnp.where(below, lifted, jnp.zeros_like(lifted)), axis=0)
    return threshold - (0.5 * (last_in[0] + first_out) + h.min())


def choose_initial_density(config: TrainConfig) -> float:
    """The share of tokens on which each feature fires at the start."""
    return min(INITIAL_TOKENS / config.coder.features, config.initial_density)
