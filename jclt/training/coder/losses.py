"""What a coder is trained to make small: each term one pure function of activations, averaged over tokens.

N tokens, L layers, F features of one layer. Features may lie in pieces on a mesh: every sum here is then a sum over
the pieces, and no term looks at them together. Sums over active features take activations in any shape, [N, F] or a
list of those that are not 0, beside what belongs to their features.
"""

import jax
import jax.numpy as jnp

from jclt.shapes import Array, Bool, Float


def squared_error(written: Float[Array, "N D"], target: Float[Array, "N D"]) -> Float[Array, ""]:
    """||y - y'||^2 of one layer (Circuit Tracing, 2025: the loss is the sum over layers)."""
    return jnp.sum(jnp.square(written - target)) / target.shape[0]


def tanh_penalty(a: Float[Array, "*A"], norms: Float[Array, "*#A"], scale: float, tokens: int) -> Float[Array, ""]:
    """sum tanh(c |W| a), |W| the length of all of a feature's decoders together (Circuit Tracing, 2025)."""
    return jnp.sum(jnp.tanh(scale * norms * a)) / tokens


def l1_penalty(a: Float[Array, "*A"], norms: Float[Array, "*#A"], tokens: int) -> Float[Array, ""]:
    """sum |W| a: no smaller for a feature that fires half as strongly through a decoder twice as long."""
    return jnp.sum(norms * a) / tokens


def l0_penalty(active: Float[Array, ""], target: float) -> Float[Array, ""]:
    """(2 / L0*) (L0 - L0*)^2 of the mean number of active features (Gemma Scope 2)."""
    return 2.0 / target * jnp.square(active - target)


def kl_penalty(mean: Float[Array, "F"], density: float) -> Float[Array, ""]:
    """sum over features of KL(density || mean of tanh a over tokens): the classical sparse autoencoder's term,
    activations first squashed to 0..1."""
    tiny = 1e-6
    mean = jnp.clip(mean, tiny, 1 - tiny)
    return jnp.sum(density * jnp.log(density / mean) + (1 - density) * jnp.log((1 - density) / (1 - mean)))


def below_threshold_penalty(
    h: Float[Array, "N F"], threshold: Float[Array, "F"], norms: Float[Array, "F"]
) -> Float[Array, ""]:
    """sum relu(threshold - h) |W|: a gradient for features that never fire (Anthropic's update of January 2025)."""
    return jnp.sum(jax.nn.relu(threshold[None] - h) * norms[None]) / h.shape[0]


def below_zero_penalty(h: Float[Array, "N F"]) -> Float[Array, ""]:
    """sum relu(-h): the other form in use (crosslayer-transcoder)."""
    return jnp.sum(jax.nn.relu(-h)) / h.shape[0]


def dead_values(h: Float[Array, "N F"], dead: Bool[Array, "F"]) -> Float[Array, "N F"]:
    """What the features that have died would say, which the auxiliary loss takes the largest of (Gao et al. 2024)."""
    return jnp.where(dead[None], jax.nn.relu(h), jnp.zeros_like(h))


def as_large(error: Float[Array, ""], kl: Float[Array, ""]) -> Float[Array, ""]:
    """The constant a = MSE / KL of the end-to-end loss (MSE + b a KL) / (1 + b), which makes both equally large
    (Gemma Scope 2)."""
    return jax.lax.stop_gradient(error / jnp.maximum(kl, 1e-9))
