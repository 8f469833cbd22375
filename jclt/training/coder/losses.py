"""The terms of the loss: each is one pure function of activations, averaged over tokens.

N tokens, L layers, F features of one layer. Features may be sharded over a mesh: every sum over features is then also a
sum over shards, and nothing else combines different features. The penalties on activations take them in any shape:
[N, F], or a list of the active ones with the norm of each one's feature.
"""

import jax
import jax.numpy as jnp

from jclt.shapes import Array, Bool, Float


def squared_error(reconstruction: Float[Array, "N D"], target: Float[Array, "N D"]) -> Float[Array, ""]:
    """||y - y'||^2 of one layer. The loss is the sum over layers (Circuit Tracing, 2025)."""
    return jnp.sum(jnp.square(reconstruction - target)) / target.shape[0]


def tanh_penalty(a: Float[Array, "*A"], norms: Float[Array, "*#A"], scale: float, tokens: int) -> Float[Array, ""]:
    """sum tanh(c |W| a), where |W| is the norm of all decoders of a feature together (Circuit Tracing, 2025)."""
    return jnp.sum(jnp.tanh(scale * norms * a)) / tokens


def l1_penalty(a: Float[Array, "*A"], norms: Float[Array, "*#A"], tokens: int) -> Float[Array, ""]:
    """sum |W| a. Half the activation with twice the decoder norm has the same penalty."""
    return jnp.sum(norms * a) / tokens


def l0_penalty(active: Float[Array, ""], target: float) -> Float[Array, ""]:
    """(2 / L0*) (L0 - L0*)^2, where L0 is the mean number of active features and L0* the target (Gemma Scope 2)."""
    return 2.0 / target * jnp.square(active - target)


def kl_penalty(mean: Float[Array, "F"], density: float) -> Float[Array, ""]:
    """sum over features of KL(density || mean of tanh a over tokens): the penalty of classical sparse autoencoders.

    tanh maps activations to 0..1.
    """
    tiny = 1e-6
    mean = jnp.clip(mean, tiny, 1 - tiny)
    return jnp.sum(density * jnp.log(density / mean) + (1 - density) * jnp.log((1 - density) / (1 - mean)))


def below_threshold_penalty(
    h: Float[Array, "N F"], threshold: Float[Array, "F"], norms: Float[Array, "F"]
) -> Float[Array, ""]:
    """sum relu(threshold - h) |W|: a gradient for features that never fire (Anthropic's update of January 2025)."""
    return jnp.sum(jax.nn.relu(threshold[None] - h) * norms[None]) / h.shape[0]


def below_zero_penalty(h: Float[Array, "N F"]) -> Float[Array, ""]:
    """sum relu(-h): the form of crosslayer-transcoder."""
    return jnp.sum(jax.nn.relu(-h)) / h.shape[0]


def select_dead(h: Float[Array, "N F"], dead: Bool[Array, "F"]) -> Float[Array, "N F"]:
    """ReLU of the pre-activations of dead features, 0 for all others. The auxiliary loss uses the largest of them
    (Gao et al. 2024)."""
    return jnp.where(dead[None], jax.nn.relu(h), jnp.zeros_like(h))


def balance_kl(error: Float[Array, ""], kl: Float[Array, ""]) -> Float[Array, ""]:
    """The constant a = MSE / KL of the end-to-end loss (MSE + b a KL) / (1 + b). It makes both terms equally large
    (Gemma Scope 2)."""
    return jax.lax.stop_gradient(error / jnp.maximum(kl, 1e-9))
