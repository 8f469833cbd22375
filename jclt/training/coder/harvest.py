"""What a frozen language model's layers read and write, as a coder is trained on it."""

from collections.abc import Callable
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jclt.coders import CoderConfig, CoderLayer, SparseCoder
from jclt.mesh import placed
from jclt.models import ModelConfig, forward
from jclt.shapes import Array, DTypeLike, Float, Params, Tokens


class Harvest(eqx.Module):
    """Values at the sites that a coder reads and writes. The rows lie where the language model's tokens do: split over
    every chip."""

    reads: Float[Array, "*R L B T D"]
    writes: Float[Array, "*R L B T D"]


class Scaling(eqx.Module):
    """What is taken off, and then divided by, before training: per layer, and per dimension where standardised."""

    read_mean: Float[Array, "L D"]
    read_scale: Float[Array, "L D"]
    write_mean: Float[Array, "L D"]
    write_scale: Float[Array, "L D"]


def harvest(model: ModelConfig, coder: CoderConfig, params: Params, tokens: Tokens) -> Harvest:
    """One forward pass; the unembedding, which nothing here needs, is not part of the compiled program."""
    _, seen, _ = forward(model, params, tokens, capture=(coder.reads, coder.writes))
    if coder.covered == tuple(range(model.layers)):
        return Harvest(seen[coder.reads], seen[coder.writes])
    covered = jnp.asarray(coder.covered)
    return Harvest(seen[coder.reads][covered], seen[coder.writes][covered])


def as_tokens(x: Float[Array, "L B T D"], mean: Array, scale: Array, dtype: DTypeLike) -> Float[Array, "L N D"]:
    """Scaled, and flat over tokens, each where its row lies."""
    x = ((x.astype(jnp.float32) - mean[:, None, None]) / scale[:, None, None]).astype(dtype)
    where = jax.typeof(x).sharding.spec
    layers, rows, length, width = x.shape
    return jax.lax.reshape(
        x,
        (layers, rows * length, width),
        out_sharding=None if jax.sharding.get_abstract_mesh().empty else jax.P(where[0], where[1], where[3]),
    )


def measure_scaling(
    harvested: Callable[[int], Harvest], batches: int, normalize: str, shape: tuple[int, int]
) -> Scaling:
    """Statistics of the first batches: "scale" brings each layer's mean square to one (Gemma Scope 2), "standardize"
    each dimension to mean zero and variance one (crosslayer-transcoder). What is 0 throughout is left as it is."""

    @jax.jit
    def moments(found: Harvest) -> list[Array]:
        wide = (x.astype(jnp.float32) for x in (found.reads, found.writes))
        sums = [(jnp.mean(x, axis=(1, 2)), jnp.mean(jnp.square(x), axis=(1, 2))) for x in wide]
        return [placed(x, (None, None)) for pair in sums for x in pair]

    if normalize == "none":
        return Scaling(*(jnp.zeros(shape), jnp.ones(shape)) * 2)
    sums = [moments(harvested(i)) for i in range(batches)]
    parts: list[Array] = []
    means = [jnp.stack(column).mean(axis=0) for column in zip(*sums, strict=True)]
    for mean, square in zip(means[::2], means[1::2], strict=True):
        if normalize == "standardize":
            deviation = jnp.sqrt(jnp.maximum(square - jnp.square(mean), 0.0))  # below it only by rounding
            # A dimension that hardly varies is left small instead of being blown up.
            parts += [mean, _or_one(jnp.maximum(deviation, 1e-3 * deviation.max(axis=1, keepdims=True)))]
        else:
            root = jnp.sqrt(square.mean(axis=1, keepdims=True))
            parts += [jnp.zeros(shape), jnp.broadcast_to(_or_one(root), shape)]
    return Scaling(*parts)


def _or_one(scale: Array) -> Array:
    return jnp.where(scale > 0, scale, 1.0)


def silent_layers(scaling: Scaling) -> list[int]:
    """Which of the covered layers wrote nothing but one constant vector when scales were measured, if they were."""
    scales = np.stack([np.asarray(jax.device_get(x)) for x in (scaling.read_scale, scaling.write_scale)])
    if np.all(scales == 1):  # none were
        return []
    return np.flatnonzero(np.all(scales[1] == 1, axis=1)).tolist()


def fold(coder: SparseCoder, scaling: Scaling) -> SparseCoder:
    """The coder that does on raw activations what this one does on scaled ones."""

    def layer(index: int, own: CoderLayer) -> CoderLayer:
        after = scaling.write_scale[index : index + own.rows.shape[1]]
        encoder = own.encoder / scaling.read_scale[index][None]
        bias = own.decoder_bias * scaling.write_scale[index] + scaling.write_mean[index]
        skip = own.skip
        if skip is not None:
            skip = skip * scaling.write_scale[index][:, None] / scaling.read_scale[index][None]
            bias = bias - skip @ scaling.read_mean[index]
        return CoderLayer(
            encoder=encoder,
            encoder_bias=own.encoder_bias - encoder @ scaling.read_mean[index],
            threshold=own.threshold,
            decoder=own.rows * after[None],
            decoder_bias=bias,
            skip=skip,
        )

    layers = tuple(layer(index, own) for index, own in enumerate(coder.layers))
    return SparseCoder(layers, replace(coder.config, tied=False))
