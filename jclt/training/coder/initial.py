"""Where a coder's training starts: the published initial weights, and biases calibrated on data."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jclt.coders import SparseCoder, abstract_coder, declare
from jclt.coders.activations import kth_largest
from jclt.shapes import Array, Float
from jclt.training.config import TrainConfig


def initial_weights(config: TrainConfig, mesh: Mesh) -> SparseCoder:
    """Fresh float32 weights, made where they will lie. Under JumpReLU the threshold's field holds its logarithm, which
    is what is trained."""
    c = config.coder
    placed = jax.tree.map(lambda x: x.sharding, abstract_coder(c, mesh))

    def made(key: Array) -> SparseCoder:
        keys = iter(jax.random.split(key, len(jax.tree.leaves(abstract_coder(c)))))

        def leaf(name: str, shape: tuple[int, ...]) -> Array:
            own = next(keys)
            if name in ("encoder", "decoder"):
                return uniform(own, name, shape)
            return jnp.full(shape, jnp.log(config.threshold) if name == "threshold" else 0.0, jnp.float32)

        def uniform(key: Array, name: str, shape: tuple[int, ...]) -> Array:
            if config.initial == "january":
                bound = 1 / c.size  # decoders; encoders are made from them below
            elif name == "encoder":
                bound = c.features**-0.5
            else:
                bound = (len(c.covered) * c.size) ** -0.5
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        coder = declare(c, leaf)
        if config.initial == "clt" or c.tied:
            return coder
        return eqx.tree_at(
            lambda t: [own.encoder for own in t.layers], coder, [encoder(own.rows) for own in coder.layers]
        )

    def encoder(rows: Float[Array, "F R D"]) -> Float[Array, "F D"]:
        """From the decoder's row for the own layer: (n / m) of it, or that row at unit length."""
        own = rows[:, 0]
        if config.initial == "january":
            return own * (c.size / c.features)
        return own / jnp.linalg.norm(own, axis=1, keepdims=True)

    return jax.jit(made, out_shardings=placed)(jax.random.key(config.seed))


def calibrated_bias(h: Float[Array, "N F"], threshold: Array, density: float) -> Float[Array, "F"]:
    """The encoder bias with which each feature exceeds its threshold on this share of the tokens."""
    count = max(1, round(density * h.shape[0]))
    lifted = h - h.min()  # the search is among non-negative numbers
    last_in = kth_largest((lifted,), count, (0,))
    # Halfway to the next token below, so that no rounding decides about one that lies just on the threshold; equal
    # tokens, such as the first of every row, stand at the same place but for rounding.
    below = lifted < last_in - 1e-4 * lifted.max()
    first_out = jnp.max(jnp.where(below, lifted, jnp.zeros_like(lifted)), axis=0)
    return threshold - (0.5 * (last_in[0] + first_out) + h.min())


def first_density(config: TrainConfig) -> float:
    return min(config.initial_rate / config.coder.features, config.initial_density)
