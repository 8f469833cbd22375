"""A coder while it is trained: log thresholds, BatchTopK over a whole batch, and what it becomes at inference."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp

from jclt.coders import SparseCoder
from jclt.coders.activations import batch_threshold
from jclt.shapes import Array, Float


def with_thresholds(coder: SparseCoder) -> SparseCoder:
    """A trained coder's thresholds instead of their logarithms, which keep them positive."""
    if coder.config.activation != "jumprelu":
        return coder
    return eqx.tree_at(lambda c: [own.threshold for own in c.layers], coder, replace_fn=jnp.exp)


def activate(
    coder: SparseCoder, h: tuple[Float[Array, "N F"], ...], norms: tuple[Float[Array, "F"], ...]
) -> tuple[tuple[Float[Array, "N F"], ...], Float[Array, ""]]:
    """All layers' activations from their pre-activations, and BatchTopK's threshold on this batch (else 0)."""
    if coder.config.activation != "batchtopk":
        return tuple(coder.activate(layer, own) for layer, own in enumerate(h)), jnp.zeros(())
    assert coder.config.k is not None
    a = tuple(jax.nn.relu(own) for own in h)
    # What a feature weighs is its activation times the length of all that it writes (ByteDance's joint TopK).
    scores = tuple(jax.lax.stop_gradient(own * norm[None]) for own, norm in zip(a, norms, strict=True))
    least = batch_threshold(scores, coder.config.k)
    kept = tuple(jnp.where((s >= least) & (s > 0), own, jnp.zeros_like(own)) for own, s in zip(a, scores, strict=True))
    return kept, least


def at_inference(coder: SparseCoder, running: Float[Array, ""]) -> SparseCoder:
    """The coder with its rule at inference. BatchTopK's running threshold over the length of what a feature writes is
    that feature's own threshold: a JumpReLU."""
    coder = with_thresholds(coder)
    if coder.config.activation != "batchtopk":
        return coder
    layers = tuple(replace(own, threshold=jax.lax.stop_gradient(running / own.norms)) for own in coder.layers)
    return SparseCoder(layers, replace(coder.config, activation="jumprelu", k=None))
