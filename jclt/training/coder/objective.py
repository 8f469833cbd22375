"""The loss of a micro-batch: its dense encoder, and beside it the one that reads active features alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jclt.coders import SparseCoder
from jclt.coders.activations import gate, top_k
from jclt.kernels.active import of_features, summed_by_feature
from jclt.kernels.matmuls import decode
from jclt.kernels.sparse_matmuls import Found, sensed
from jclt.shapes import Array, Float
from jclt.training.coder import losses
from jclt.training.coder.forms import activate, with_thresholds
from jclt.training.coder.sparse import activate_at, least_wanted
from jclt.training.coder.state import dead_after
from jclt.training.config import TrainConfig


class Weights(NamedTuple):
    """What micro-batches are computed with, made of the trained weights once a step."""

    coder: SparseCoder  # `threshold` holds the threshold itself
    norms: tuple[Float[Array, "F"], ...]  # a pass over all decoders


class Batch(NamedTuple):
    """A micro-batch in the coder's terms: scaled, flat over tokens."""

    x: tuple[Float[Array, "N D"], ...]  # on every feature shard
    y: tuple[Float[Array, "N D"], ...]  # split over all devices


class Features(NamedTuple):
    """What encoding a micro-batch gives."""

    a: tuple[Float[Array, "N F"], ...]  # in the type that products are computed in
    penalty: Float[Array, ""]
    spare: tuple[Float[Array, "N F"], ...]  # what dead features would write under the auxiliary loss; else empty
    fired: tuple[Float[Array, "F"], ...]  # share of tokens
    least: Float[Array, ""]  # BatchTopK's threshold on this micro-batch


def prepare(trained: SparseCoder) -> Weights:
    return Weights(with_thresholds(trained), tuple(layer.norms for layer in trained.layers))


class Sensed(NamedTuple):
    """What penalties are made of, in one layer: everything of shape [N, F] with what belongs to features of shape
    [1, F], or both as lists of the entries where an activation is not 0 or has a gradient."""

    h: Float[Array, "*A"]
    a: Float[Array, "*A"]
    norms: Float[Array, "*#A"]
    threshold: Float[Array, "*#A"]


def sparsity_penalty(
    config: TrainConfig, each: list[Sensed], tokens: int, mean: Callable[[int, Array], Array]
) -> Float[Array, ""]:
    """`mean(layer, values)` is each feature's mean over tokens."""
    if config.sparsity_term == "tanh":
        return sum((losses.tanh_penalty(own.a, own.norms, config.tanh_scale, tokens) for own in each), jnp.zeros(()))
    if config.sparsity_term == "l1":
        return sum((losses.l1_penalty(own.a, own.norms, tokens) for own in each), jnp.zeros(()))
    if config.sparsity_term == "kl":
        means = (mean(layer, jnp.tanh(own.a)) for layer, own in enumerate(each))
        return sum((losses.kl_penalty(own, config.target_density) for own in means), jnp.zeros(()))
    if config.sparsity_term == "l0":
        c = config.coder
        gates: list[Any] = [gate(own.h, own.threshold, c.bandwidth, c.through) for own in each]
        return losses.l0_penalty(jnp.stack([jnp.sum(g) for g in gates]).sum() / tokens, config.target_l0)
    return jnp.zeros(())


def encode(
    config: TrainConfig, weights: Weights, x: tuple[Array, ...], silent: tuple[Array, ...], ramp: Array
) -> Features:
    """Activations and every penalty on them, each feature shard by itself."""
    coder, norms = weights
    h = tuple(coder.preactivation(layer, own) for layer, own in enumerate(x))
    a, least = activate(coder, h, norms)
    fired = tuple(jnp.mean(own > 0, axis=0, dtype=jnp.float32) for own in a)
    thresholds = [own.opens_at for own in coder.layers]
    of_features = [(norm[None], threshold[None]) for norm, threshold in zip(norms, thresholds, strict=True)]
    each = [Sensed(h_, a_, *own) for h_, a_, own in zip(h, a, of_features, strict=True)]
    penalty = sparsity_penalty(config, each, x[0].shape[0], lambda _, values: jnp.mean(values, axis=0))
    penalty *= config.sparsity_weight * ramp
    if config.preactivation == "zero":
        penalty += config.preactivation_weight * sum(losses.below_zero_penalty(h_) for h_ in h)
    elif config.preactivation == "threshold":
        penalty += config.preactivation_weight * sum(
            losses.below_threshold_penalty(h_, threshold, norm)
            for h_, norm, threshold in zip(h, norms, thresholds, strict=True)
        )

    spare = ()
    if config.auxiliary_weight:
        k = min(config.auxiliary_k, config.coder.features)
        dead = tuple(losses.dead_values(h_, own >= dead_after(config)) for h_, own in zip(h, silent, strict=True))
        spare = tuple(top_k(own, k) for own in dead)
    low = x[0].dtype
    return Features(tuple(own.astype(low) for own in a), penalty, tuple(own.astype(low) for own in spare), fired, least)


def encode_at(
    config: TrainConfig, weights: Weights, x: tuple[Array, ...], chosen: tuple[Found, ...], ramp: Array
) -> Features:
    """`encode` where features are listed: equal to it as long as no other feature is active or has a gradient."""
    (coder, norms), tokens = weights, x[0].shape[0]
    entries = tuple(own.entries for own in chosen)
    made = [
        sensed(own, x_, layer.encoder, layer.encoder_bias, least_wanted(config, layer))
        for own, x_, layer in zip(chosen, x, coder.layers, strict=True)
    ]
    h, shortfalls = [own[0] for own in made], [own[1] for own in made]
    thresholds = [own.opens_at for own in coder.layers]
    at = [(of_features(e, norm), of_features(e, t)) for e, norm, t in zip(entries, norms, thresholds, strict=True)]
    a, least = activate_at(coder.config, entries, h, at, tokens)
    each = [Sensed(h_, a_, *own) for h_, a_, own in zip(h, a, at, strict=True)]
    fired = tuple(summed_by_feature(e, (a_ > 0).astype(jnp.float32)) / tokens for e, a_ in zip(entries, a, strict=True))
    penalty = sparsity_penalty(
        config, each, tokens, lambda layer, values: summed_by_feature(entries[layer], values) / tokens
    )
    penalty *= config.sparsity_weight * ramp
    if config.preactivation != "none":
        weighs = norms if config.preactivation == "threshold" else (1.0,) * len(norms)
        below = (jnp.sum(short * weight) / tokens for short, weight in zip(shortfalls, weighs, strict=True))
        penalty += config.preactivation_weight * sum(below)
    return Features(tuple(own.astype(x[0].dtype) for own in a), penalty, (), fired, least)


def objective(
    config: TrainConfig,
    share: float,
    weights: Weights,
    batch: Batch,
    silent: tuple[Array, ...],
    ramp: Array,
    chosen: tuple[Found, ...] | None = None,
) -> tuple[Array, dict[str, Any]]:
    """The loss of a micro-batch, of which the squared error counts `share`, and what there is to report."""
    entries = None
    with jax.named_scope("encode"):
        if chosen is not None:
            found = encode_at(config, weights, batch.x, chosen, ramp)
            entries = tuple(own.entries for own in chosen)
        else:
            encoder = jax.checkpoint(encode, static_argnums=0) if config.remat else encode
            found = encoder(config, weights, batch.x, silent, ramp)
    with jax.named_scope("decode"):
        written = weights.coder.decode(found.a, batch.x, entries)
    error = jnp.stack([losses.squared_error(y_, y) for y_, y in zip(written, batch.y, strict=True)])
    loss = share * jnp.sum(error) + found.penalty
    if config.auxiliary_weight:
        with jax.named_scope("auxiliary"):
            spare = decode(found.spare, tuple(own.rows for own in weights.coder.layers))
            missing = [jax.lax.stop_gradient(y - y_) for y_, y in zip(written, batch.y, strict=True)]
            left = sum(losses.squared_error(s_, y) for s_, y in zip(spare, missing, strict=True))
            loss += config.auxiliary_weight * left
    report = {"loss": loss, "error": error, "penalty": found.penalty}
    return loss, jax.lax.stop_gradient(report | {"fired": found.fired, "least": found.least})
