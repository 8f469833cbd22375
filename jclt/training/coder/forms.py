"""The two forms of a coder: in training and at inference.

In training, JumpReLU's thresholds are stored as logarithms, which keeps them positive, and BatchTopK selects over a
whole batch. At inference, thresholds are the numbers themselves, and BatchTopK has become a JumpReLU.
"""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp

from jclt.coders import SparseCoder
from jclt.coders.activations import batch_thresholds
from jclt.shapes import Array, Float


def exponentiate_thresholds(coder: SparseCoder) -> SparseCoder:
    """The coder with thresholds in place of their logarithms."""
    if coder.config.activation != "jumprelu":
        return coder
    return eqx.tree_at(lambda c: [layer.threshold for layer in c.layers], coder, replace_fn=jnp.exp)


def activate_dense(
    coder: SparseCoder, h: tuple[Float[Array, "N F"], ...], norms: tuple[Float[Array, "F"], ...]
) -> tuple[tuple[Float[Array, "N F"], ...], Float[Array, "L"]]:
    """The activations of all layers, and BatchTopK's threshold of each on this batch (else 0)."""
    if coder.config.activation != "batchtopk":
        return tuple(coder.activate(layer, h_) for layer, h_ in enumerate(h)), jnp.zeros(len(h))
    assert coder.config.k is not None
    a = tuple(jax.nn.relu(h_) for h_ in h)
    # A feature's score is its activation times the norm of all its decoders together (ByteDance's joint TopK).
    scores = tuple(jax.lax.stop_gradient(a_ * norm[None]) for a_, norm in zip(a, norms, strict=True))
    thresholds = batch_thresholds(scores, coder.config.k, h[0].shape[0])
    masked = (
        jnp.where((score >= threshold) & (score > 0), a_, jnp.zeros_like(a_))
        for a_, score, threshold in zip(a, scores, thresholds, strict=True)
    )
    return tuple(masked), thresholds


def to_inference_form(coder: SparseCoder, running: Float[Array, "L"]) -> SparseCoder:
    """The coder in its form at inference.

    BatchTopK becomes JumpReLU: a feature's threshold is the running one of its layer divided by the norm of its
    decoders.
    """
    coder = exponentiate_thresholds(coder)
    if coder.config.activation != "batchtopk":
        return coder
    layers = tuple(
        replace(layer, threshold=jax.lax.stop_gradient(threshold / layer.norms))
        for layer, threshold in zip(coder.layers, running, strict=True)
    )
    return SparseCoder(layers, replace(coder.config, activation="jumprelu", k=None))
