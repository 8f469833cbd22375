"""The loss of a micro-batch, and the two encoders that compute the activations for it.

`encode_dense` computes every feature at every token, `encode_sparse` only the pairs of a token and a feature that
are listed as active. Both take the same five steps:

1. pre-activations
2. activations
3. the share of tokens on which each feature fires
4. the sparsity penalty
5. the pre-activation penalty

They give the same numbers as long as the list holds every pair that is active or has a gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jclt.coders import SparseCoder
from jclt.coders.activations import gate, top_k
from jclt.kernels.active import gather_by_feature, sum_by_feature
from jclt.kernels.matmuls import decode
from jclt.kernels.sparse_matmuls import PairEncoding, attach_encoder_gradients
from jclt.shapes import Array, Float
from jclt.training.coder import losses
from jclt.training.coder.forms import activate_dense, exponentiate_thresholds
from jclt.training.coder.sparse import activate_sparse, get_penalty_threshold
from jclt.training.coder.state import tokens_until_dead
from jclt.training.config import TrainConfig


class Weights(NamedTuple):
    """The weights that micro-batches are computed with, made from the trained ones once a step."""

    coder: SparseCoder  # `threshold` is the threshold itself, not its logarithm
    norms: tuple[Float[Array, "F"], ...]  # of all decoders of a feature together; they cost a pass over all decoders


class MicroBatch(NamedTuple):
    """The inputs and targets of a micro-batch: scaled, flat over tokens, by layer."""

    x: tuple[Float[Array, "N D"], ...]  # on every feature shard
    y: tuple[Float[Array, "N D"], ...]  # split over all devices


class Encoded(NamedTuple):
    """The result of encoding a micro-batch. On the sparse path activations have the shape [E], one per listed pair."""

    a: tuple[Float[Array, "N F"], ...]  # in the dtype of the matmuls
    penalty: Float[Array, ""]
    dead: tuple[Float[Array, "N F"], ...]  # activations of dead features for the auxiliary loss; empty without it
    fired: tuple[Float[Array, "F"], ...]  # share of tokens
    batch_threshold: Float[Array, "L"]  # BatchTopK's thresholds on this micro-batch; else 0


class LayerValues(NamedTuple):
    """The numbers of one layer that penalties are computed from.

    Dense: h and a have the shape [N, F], norms and thresholds the shape [1, F].
    Sparse: all have the shape [E], one number per listed pair.
    """

    h: Float[Array, "*A"]
    a: Float[Array, "*A"]
    norms: Float[Array, "*#A"]
    threshold: Float[Array, "*#A"]


def prepare_weights(trained: SparseCoder) -> Weights:
    return Weights(
        coder=exponentiate_thresholds(trained),
        norms=tuple(layer.norms for layer in trained.layers),
    )


def encode_dense(
    config: TrainConfig, weights: Weights, x: tuple[Array, ...], silent: tuple[Array, ...], ramp: Array
) -> Encoded:
    """Encodes every feature at every token, each feature shard on its own device."""
    (coder, norms), tokens = weights, x[0].shape[0]
    thresholds = [layer.threshold_or_zero for layer in coder.layers]

    # 1. pre-activations
    h = tuple(coder.compute_preactivation(layer, x_) for layer, x_ in enumerate(x))

    # 2. activations
    a, batch_threshold = activate_dense(coder, h, norms)

    # 3. share of tokens
    fired = tuple(jnp.mean(a_ > 0, axis=0, dtype=jnp.float32) for a_ in a)

    # 4. sparsity penalty
    values = [
        LayerValues(h=h_, a=a_, norms=norm[None], threshold=threshold[None])
        for h_, a_, norm, threshold in zip(h, a, norms, thresholds, strict=True)
    ]
    penalty = sparsity_penalty(config, values, tokens, lambda layer, values: jnp.mean(values, axis=0))
    penalty *= config.sparsity_weight * ramp

    # 5. pre-activation penalty
    if config.preactivation == "zero":
        penalty += config.preactivation_weight * sum(losses.below_zero_penalty(h_) for h_ in h)
    elif config.preactivation == "threshold":
        penalty += config.preactivation_weight * sum(
            losses.below_threshold_penalty(h_, threshold, norm)
            for h_, norm, threshold in zip(h, norms, thresholds, strict=True)
        )

    dead = activate_dead(config, h, silent) if config.auxiliary_weight else ()
    return Encoded(
        a=to_dtype_of(x[0], a),
        penalty=penalty,
        dead=to_dtype_of(x[0], dead),
        fired=fired,
        batch_threshold=batch_threshold,
    )


def encode_sparse(
    config: TrainConfig, weights: Weights, x: tuple[Array, ...], encodings: tuple[PairEncoding, ...], ramp: Array
) -> Encoded:
    """Encodes the listed pairs; `encodings` has their pre-activations, without gradients, from `choose_active`."""
    (coder, norms), tokens = weights, x[0].shape[0]
    thresholds = [layer.threshold_or_zero for layer in coder.layers]
    pairs = tuple(encoding.pairs for encoding in encodings)
    pair_norms = [gather_by_feature(p, norm) for p, norm in zip(pairs, norms, strict=True)]
    pair_thresholds = [gather_by_feature(p, threshold) for p, threshold in zip(pairs, thresholds, strict=True)]

    # 1. pre-activations
    attached = [
        attach_encoder_gradients(encoding, x_, layer.encoder, layer.encoder_bias, get_penalty_threshold(config, layer))
        for encoding, x_, layer in zip(encodings, x, coder.layers, strict=True)
    ]
    h, shortfalls = [h_ for h_, _ in attached], [shortfall for _, shortfall in attached]

    # 2. activations
    a, batch_threshold = activate_sparse(coder.config, pairs, h, pair_norms, pair_thresholds, tokens)

    # 3. share of tokens
    fired = tuple(sum_by_feature(p, (a_ > 0).astype(jnp.float32)) / tokens for p, a_ in zip(pairs, a, strict=True))

    # 4. sparsity penalty
    values = [
        LayerValues(h=h_, a=a_, norms=norm, threshold=threshold)
        for h_, a_, norm, threshold in zip(h, a, pair_norms, pair_thresholds, strict=True)
    ]
    penalty = sparsity_penalty(
        config, values, tokens, lambda layer, values: sum_by_feature(pairs[layer], values) / tokens
    )
    penalty *= config.sparsity_weight * ramp

    # 5. pre-activation penalty
    if config.preactivation != "none":
        factors = norms if config.preactivation == "threshold" else (1.0,) * len(norms)
        below = (jnp.sum(shortfall * factor) / tokens for shortfall, factor in zip(shortfalls, factors, strict=True))
        penalty += config.preactivation_weight * sum(below)

    return Encoded(a=to_dtype_of(x[0], a), penalty=penalty, dead=(), fired=fired, batch_threshold=batch_threshold)


def sparsity_penalty(
    config: TrainConfig,
    layers: list[LayerValues],
    tokens: int,
    mean_over_tokens: Callable[[int, Array], Array],
) -> Float[Array, ""]:
    """The sparsity penalty over all layers. `mean_over_tokens(layer, values)` gives one number per feature."""
    if config.sparsity_term == "tanh":
        terms = (losses.tanh_penalty(layer.a, layer.norms, config.tanh_scale, tokens) for layer in layers)
        return sum(terms, jnp.zeros(()))
    if config.sparsity_term == "l1":
        return sum((losses.l1_penalty(layer.a, layer.norms, tokens) for layer in layers), jnp.zeros(()))
    if config.sparsity_term == "kl":
        means = (mean_over_tokens(index, jnp.tanh(layer.a)) for index, layer in enumerate(layers))
        return sum((losses.kl_penalty(mean, config.target_density) for mean in means), jnp.zeros(()))
    if config.sparsity_term == "l0":
        c = config.coder
        gates: list[Any] = [gate(layer.h, layer.threshold, c.bandwidth, c.through) for layer in layers]
        active = jnp.stack([jnp.sum(layer_gates) for layer_gates in gates]).sum() / tokens
        return losses.l0_penalty(active, config.target_l0)
    return jnp.zeros(())


def activate_dead(config: TrainConfig, h: tuple[Array, ...], silent: tuple[Array, ...]) -> tuple[Array, ...]:
    """The largest activations that dead features would have."""
    k, limit = min(config.auxiliary_k, config.coder.features), tokens_until_dead(config)
    dead = (losses.select_dead(h_, silence >= limit) for h_, silence in zip(h, silent, strict=True))
    return tuple(top_k(values, k) for values in dead)


def to_dtype_of(x: Array, values: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(value.astype(x.dtype) for value in values)


def compute_objective(
    config: TrainConfig,
    share: float,
    weights: Weights,
    batch: MicroBatch,
    silent: tuple[Array, ...],
    ramp: Array,
    encodings: tuple[PairEncoding, ...] | None = None,
) -> tuple[Array, dict[str, Any]]:
    """The loss of a micro-batch, and the numbers for the metrics; on the sparse path if there are `encodings`.

    loss = share * squared error + penalties + auxiliary_weight * squared error of the dead features
    """
    pairs = None if encodings is None else tuple(encoding.pairs for encoding in encodings)
    with jax.named_scope("encode"):
        if encodings is None:
            encode = jax.checkpoint(encode_dense, static_argnums=0) if config.remat else encode_dense
            encoded = encode(config, weights, batch.x, silent, ramp)
        else:
            encoded = encode_sparse(config, weights, batch.x, encodings, ramp)
    with jax.named_scope("decode"):
        reconstructed = weights.coder.decode(encoded.a, batch.x, pairs)
    error = jnp.stack([losses.squared_error(y_, y) for y_, y in zip(reconstructed, batch.y, strict=True)])
    loss = share * jnp.sum(error) + encoded.penalty
    if config.auxiliary_weight:
        with jax.named_scope("auxiliary"):
            by_dead = decode(encoded.dead, tuple(layer.decoder_rows for layer in weights.coder.layers))
            residual = [jax.lax.stop_gradient(y - y_) for y_, y in zip(reconstructed, batch.y, strict=True)]
            auxiliary = sum(losses.squared_error(y_, y) for y_, y in zip(by_dead, residual, strict=True))
            loss += config.auxiliary_weight * auxiliary
    report = {
        "loss": loss,
        "error": error,
        "penalty": encoded.penalty,
        "fired": encoded.fired,
        "batch_threshold": encoded.batch_threshold,
    }
    return loss, jax.lax.stop_gradient(report)
