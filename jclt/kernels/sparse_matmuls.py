"""A coder's products at active pairs alone: the numbers of `matmuls.py`, at a cost that grows with the pairs.

The two sums of `row_sums.py` do all the work.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jclt.kernels.active import ActivePairs
from jclt.kernels.row_lists import GroupedRows
from jclt.kernels.row_sums import dot_rows, sum_rows
from jclt.mesh import (
    DATA_AXIS,
    FEATURES_SPEC,
    PER_DEVICE_SPEC,
    TOKENS_SPEC,
    map_over_devices,
    shard_by_axes,
    sum_over_data_shards,
    sum_over_feature_shards,
)
from jclt.models.ops import prevent_fusion
from jclt.shapes import Array, Float

# Encoding.


class PairEncoding(NamedTuple):
    """What a dense product computes of one layer's features at the start, without gradients."""

    pairs: ActivePairs
    h: Float[Array, "E"]  # pre-activations at the pairs
    shortfall: Float[Array, "F"]  # how far each feature stays below its threshold, summed over tokens
    below: tuple[Float[Array, "F D"], Float[Array, "F"]] | None
    """For each feature and device, the sum of the inputs of the tokens below the threshold, and the number of these
    tokens. None where every token above the threshold is an active pair: then they follow from the pairs."""


@jax.custom_vjp
def attach_encoder_gradients(
    encoding: PairEncoding,
    x: Float[Array, "N D"],
    encoder: Float[Array, "F D"],
    bias: Float[Array, "F"],
    threshold: Float[Array, "F"],
) -> tuple[Float[Array, "E"], Float[Array, "F"]]:
    """Pre-activations at the pairs and each feature's shortfall, now as functions of the weights. x has no gradient.

    1. h[n, f] = x[n] @ encoder[f] + bias[f]
    2. shortfall[f] = sum of threshold[f] - h[n, f] over the tokens n with h[n, f] < threshold[f]
    3. d shortfall[f] / d encoder[f] = -(sum of x[n] over the tokens below the threshold)
                                     = -(sum of x[n] over all tokens - sum of x[n] over those above)

    Where the tokens above are all active pairs, step 3 needs no dense product.
    """
    return encoding.h, encoding.shortfall


def _attach_forward(encoding: PairEncoding, x: Array, encoder: Array, bias: Array, threshold: Array) -> Any:
    h_and_shortfall = attach_encoder_gradients(encoding, x, encoder, bias, threshold)
    return h_and_shortfall, (encoding, x, encoder, bias, threshold)


def _attach_backward(residuals: Any, gradients: tuple[Array, Array]) -> Any:
    encoding, x, encoder, bias, threshold = residuals
    encoder_spec, sum_over_devices = gradient_spec_and_sum(encoder)

    def differentiate_on_device(
        encoding: PairEncoding, x: Array, threshold: Array, of_h: Array, of_shortfall: Array
    ) -> tuple[Array, Array, Array]:
        pairs, features = encoding.pairs, threshold.shape[0]
        to_bias = jax.ops.segment_sum(of_h, pairs.feature, features)
        if encoding.below is None:
            above = encoding.h >= threshold[pairs.feature]
            of_h = of_h + jnp.where(above, of_shortfall[pairs.feature], 0.0)
            count_below = x.shape[0] - jax.ops.segment_sum(above.astype(of_h.dtype), pairs.feature, features)
            sum_below = jnp.sum(x.astype(of_h.dtype), axis=0)[None]
        else:
            sum_below, count_below = encoding.below
        order = pairs.by_feature
        tokens = GroupedRows(pairs.feature_starts, pairs.token[order], x[:, None])
        to_encoder = sum_rows((tokens,), (of_h[order],), 1)[:, 0] - of_shortfall[:, None] * sum_below
        to_threshold = of_shortfall * count_below
        return (
            sum_over_devices(to_encoder).astype(encoder.dtype),
            sum_over_data_shards(to_bias - to_threshold),
            sum_over_data_shards(to_threshold),
        )

    specs = (encoder_spec, FEATURES_SPEC, FEATURES_SPEC)
    differentiate = map_over_devices(differentiate_on_device, specs)
    to_encoder, to_bias, to_threshold = differentiate(encoding, x, threshold, *gradients)
    return None, None, to_encoder, to_bias.astype(bias.dtype), to_threshold.astype(threshold.dtype)


attach_encoder_gradients.defvjp(_attach_forward, _attach_backward)


# Decoding.


@jax.custom_vjp
def decode_active(
    layers: tuple[ActivePairs, ...],
    activations: tuple[Float[Array, "E"], ...],
    decoders: tuple[Float[Array, "F _ D"], ...],
) -> tuple[Float[Array, "N D"], ...]:
    """`matmuls.decode` of activations that are 0 except at the pairs."""

    def decode_on_device(
        layers: tuple[ActivePairs, ...], activations: tuple[Array, ...], decoders: tuple[Array, ...]
    ) -> Any:
        written = sum_rows(group_by_token(layers, decoders), activations, len(decoders))
        return tuple(sum_over_feature_shards(written[:, target]) for target in range(len(decoders)))

    targets = map_over_devices(decode_on_device, (TOKENS_SPEC,) * len(decoders))(layers, activations, decoders)
    return tuple(shard_by_axes(written, ("batch", None)) for written in targets)


def _decode_active_forward(layers: Any, activations: Any, decoders: Any) -> tuple[Any, Any]:
    return decode_active(layers, activations, decoders), (layers, activations, decoders)


def _decode_active_backward(residuals: Any, gradients: tuple[Array, ...]) -> Any:
    layers, activations, decoders = residuals
    errors = jnp.stack([x.astype(activations[0].dtype) for x in gradients], axis=1)
    errors = prevent_fusion(shard_by_axes(errors, ("tokens", None, None)))
    specs_and_sums = [gradient_spec_and_sum(decoder) for decoder in decoders]

    def differentiate_on_device(
        layers: tuple[ActivePairs, ...], activations: tuple[Array, ...], decoders: tuple[Array, ...], errors: Array
    ) -> Any:
        products = dot_rows(group_by_token(layers, decoders), errors)
        to_activations = tuple(x.astype(a.dtype) for x, a in zip(products, activations, strict=True))
        to_decoders = []
        by_source = zip(specs_and_sums, layers, activations, decoders, strict=True)
        for source, ((_, sum_over_devices), pairs, a, decoder) in enumerate(by_source):
            order = pairs.by_feature
            tokens = GroupedRows(pairs.feature_starts, pairs.token[order], errors, source)
            to_decoder = sum_rows((tokens,), (a[order],), decoder.shape[1])
            to_decoders.append(sum_over_devices(to_decoder).astype(decoder.dtype))
        return to_activations, tuple(to_decoders)

    specs = (PER_DEVICE_SPEC,) * len(layers), tuple(spec for spec, _ in specs_and_sums)
    return None, *map_over_devices(differentiate_on_device, specs)(layers, activations, decoders, errors)


decode_active.defvjp(_decode_active_forward, _decode_active_backward)


def group_by_token(layers: tuple[ActivePairs, ...], decoders: tuple[Array, ...]) -> list[GroupedRows]:
    """The decoder rows that each token sums up, layer by layer."""
    return [
        GroupedRows(pairs.token_starts, pairs.feature, rows, source)
        for source, (pairs, rows) in enumerate(zip(layers, decoders, strict=True))
    ]


def gradient_spec_and_sum(weight: Array) -> tuple[P, Callable[[Array], Array]]:
    """The spec of a weight's gradient, and the function that adds it up over the devices with the same features.

    That function does nothing if the weight's type defers this sum.
    """
    spec = jax.typeof(weight).sharding.spec
    if DATA_AXIS in spec.reduced:
        return P(*spec.partitions, unreduced=spec.reduced), lambda x: x
    return spec, sum_over_data_shards
