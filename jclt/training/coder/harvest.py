"""Harvests the activations that a coder is trained on from a frozen language model, and scales them."""

from collections.abc import Callable
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jclt.coders import CoderConfig, CoderLayer, SparseCoder
from jclt.mesh import shard_by_axes
from jclt.models import ModelConfig, forward
from jclt.shapes import Array, DTypeLike, Float, Params, Tokens

ROUNDING = 1e-6
"""A variance that is a smaller share of the mean square is no more than rounding."""


class Harvest(eqx.Module):
    """Activations at the two sites that a coder reads and writes, split over all chips as the model's tokens are.

    *R: in a shuffle buffer its batches, else no axis. Batches from a store are `[B, L, T, D]` (`harvest_batch`).
    """

    reads: Float[Array, "*R L B T D"]
    writes: Float[Array, "*R L B T D"]


class Scaling(eqx.Module):
    """Scaled activations are (x - mean) / scale. Both differ by layer, and if standardised also by dimension."""

    read_mean: Float[Array, "L D"]
    read_scale: Float[Array, "L D"]
    write_mean: Float[Array, "L D"]
    write_scale: Float[Array, "L D"]


def harvest(model: ModelConfig, coder: CoderConfig, params: Params, tokens: Tokens) -> Harvest:
    """One forward pass. The compiled program leaves out the unembedding, since nothing uses it.

    Positions before the coder's first one are left out: in their place stand copies of the row's last positions, so
    that no shape depends on it.
    """
    _, seen, _ = forward(model, params, tokens, capture=(coder.reads, coder.writes))
    reads, writes, first = seen[coder.reads], seen[coder.writes], coder.first_position
    if coder.covered != tuple(range(model.layers)):
        covered = jnp.asarray(coder.covered)
        reads, writes = reads[covered], writes[covered]
    if first:
        reads, writes = (jnp.concatenate([x[:, :, -first:], x[:, :, first:]], axis=2) for x in (reads, writes))
    return Harvest(reads, writes)


def scale_tokens(x: Float[Array, "L B T D"], mean: Array, scale: Array, dtype: DTypeLike) -> Float[Array, "L N D"]:
    """Scaled activations, flat over tokens, with the sharding of the rows."""
    x = ((x.astype(jnp.float32) - mean[:, None, None]) / scale[:, None, None]).astype(dtype)
    spec = jax.typeof(x).sharding.spec
    layers, rows, length, width = x.shape
    return jax.lax.reshape(
        x,
        (layers, rows * length, width),
        out_sharding=None if jax.sharding.get_abstract_mesh().empty else jax.P(spec[0], spec[1], spec[3]),
    )


def measure_scaling(harvest: Callable[[int], Harvest], batches: int, normalize: str, shape: tuple[int, int]) -> Scaling:
    """The scaling that follows from the first batches.

    - "centre" takes the mean away and brings the variance of each layer to one.
    - "scale" brings the mean square of each layer to one (Gemma Scope 2).
    - "standardize" brings each dimension to mean zero and variance one (crosslayer-transcoder).

    Activations that are always 0 are not scaled.
    """

    @jax.jit
    def compute_moments(batch: Harvest) -> list[Array]:
        wide = (x.astype(jnp.float32) for x in (batch.reads, batch.writes))
        sums = [(jnp.mean(x, axis=(1, 2)), jnp.mean(jnp.square(x), axis=(1, 2))) for x in wide]
        return [shard_by_axes(x, (None, None)) for pair in sums for x in pair]

    if normalize == "none":
        return Scaling(*(jnp.zeros(shape), jnp.ones(shape)) * 2)
    moments = [compute_moments(harvest(i)) for i in range(batches)]
    parts: list[Array] = []
    means = [jnp.stack(column).mean(axis=0) for column in zip(*moments, strict=True)]
    for mean, square in zip(means[::2], means[1::2], strict=True):
        if normalize == "standardize":
            deviation = jnp.sqrt(jnp.maximum(square - jnp.square(mean), 0.0))  # rounding may make it negative
            # The scale has a lower bound, so that a dimension which hardly varies stays small.
            parts += [mean, _replace_zeros(jnp.maximum(deviation, 1e-3 * deviation.max(axis=1, keepdims=True)))]
        elif normalize == "centre":
            variance, size = (x.mean(axis=1, keepdims=True) for x in (square - jnp.square(mean), square))
            variance = jnp.where(variance > ROUNDING * size, variance, 0.0)
            parts += [mean, jnp.broadcast_to(_replace_zeros(jnp.sqrt(variance)), shape)]
        else:
            root = jnp.sqrt(square.mean(axis=1, keepdims=True))
            parts += [jnp.zeros(shape), jnp.broadcast_to(_replace_zeros(root), shape)]
    return Scaling(*parts)


def _replace_zeros(scale: Array) -> Array:
    return jnp.where(scale > 0, scale, 1.0)


def find_silent_layers(scaling: Scaling) -> list[int]:
    """The indices of covered layers that wrote only zeros while scales were measured, or under `centre` and
    `standardize` only one constant vector; none if scales were not measured."""
    scales = np.stack([np.asarray(jax.device_get(x)) for x in (scaling.read_scale, scaling.write_scale)])
    if np.all(scales == 1):  # they were not measured
        return []
    return np.flatnonzero(np.all(scales[1] == 1, axis=1)).tolist()


def fold_scaling(coder: SparseCoder, scaling: Scaling) -> SparseCoder:
    """A coder for raw activations that computes what this one does on scaled activations."""

    def fold_layer(index: int, layer: CoderLayer) -> CoderLayer:
        target_scales = scaling.write_scale[index : index + layer.decoder_rows.shape[1]]
        encoder = layer.encoder / scaling.read_scale[index][None]
        bias = layer.decoder_bias * scaling.write_scale[index] + scaling.write_mean[index]
        skip = layer.skip
        if skip is not None:
            skip = skip * scaling.write_scale[index][:, None] / scaling.read_scale[index][None]
            bias = bias - skip @ scaling.read_mean[index]
        return CoderLayer(
            encoder=encoder,
            encoder_bias=layer.encoder_bias - encoder @ scaling.read_mean[index],
            threshold=layer.threshold,
            decoder=layer.decoder_rows * target_scales[None],
            decoder_bias=bias,
            skip=skip,
        )

    layers = tuple(fold_layer(index, layer) for index, layer in enumerate(coder.layers))
    return SparseCoder(layers, replace(coder.config, tied=False))
