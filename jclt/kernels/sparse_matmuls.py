"""A coder's products where features are active and nowhere else: the numbers of `products`, at the cost of the entries.

The two sums of `rows` do all the work.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jclt.kernels.active import Entries
from jclt.kernels.row_lists import Rows
from jclt.kernels.row_sums import row_products, row_sums
from jclt.mesh import ENTRIES, FEATURES, TOKENS, on_each_device, placed, sum_over
from jclt.models.ops import held
from jclt.shapes import Array, Float

# What a layer's features read.


class Found(NamedTuple):
    """What a dense product finds of one layer's features before anything is differentiated."""

    entries: Entries
    h: Float[Array, "E"]  # pre-activations at the entries
    shortfall: Float[Array, "F"]  # how far each feature stays below a threshold, summed over tokens
    below: tuple[Float[Array, "F D"], Float[Array, "F"]] | None
    """On each device, its tokens below that threshold added up, and how many they are. None where they are all tokens
    but those of the entries above it."""


@jax.custom_vjp
def sensed(
    found: Found,
    x: Float[Array, "N D"],
    encoder: Float[Array, "F D"],
    bias: Float[Array, "F"],
    threshold: Float[Array, "F"],
) -> tuple[Float[Array, "E"], Float[Array, "F"]]:
    """Pre-activations at the entries and each feature's shortfall, as functions of the weights; what features read is
    data, and has no gradient.

    Every token below a threshold moves the shortfall alike. So its gradient is made of the sum of these tokens, which
    is that of all less that of the entries above the threshold: there no dense product is needed.
    """
    return found.h, found.shortfall


def _sensed_forward(found: Found, x: Array, encoder: Array, bias: Array, threshold: Array) -> Any:
    return sensed(found, x, encoder, bias, threshold), (found, x, encoder, bias, threshold)


def _sensed_backward(kept: Any, gradients: tuple[Array, Array]) -> Any:
    found, x, encoder, bias, threshold = kept
    where, added = of_gradient(encoder)

    def own(found: Found, x: Array, threshold: Array, g: Array, short: Array) -> Any:
        entries, features = found.entries, threshold.shape[0]
        moved = jax.ops.segment_sum(g, entries.feature, features)
        if found.below is None:
            above = found.h >= threshold[entries.feature]
            g = g + jnp.where(above, short[entries.feature], 0.0)
            often = x.shape[0] - jax.ops.segment_sum(above.astype(g.dtype), entries.feature, features)
            below = jnp.sum(x.astype(g.dtype), axis=0)[None]
        else:
            below, often = found.below
        order = entries.by_feature
        tokens = Rows(entries.feature_starts, entries.token[order], x[:, None])
        to_encoder = row_sums((tokens,), (g[order],), 1)[:, 0] - short[:, None] * below
        lifted = short * often
        return added(to_encoder).astype(encoder.dtype), sum_over("data", moved - lifted), sum_over("data", lifted)

    to_encoder, to_bias, to_threshold = on_each_device(own, (where, FEATURES, FEATURES))(
        found, x, threshold, *gradients
    )
    return None, None, to_encoder, to_bias.astype(bias.dtype), to_threshold.astype(threshold.dtype)


sensed.defvjp(_sensed_forward, _sensed_backward)


# What all features write.


@jax.custom_vjp
def decode_active(
    entries: tuple[Entries, ...],
    activations: tuple[Float[Array, "E"], ...],
    decoders: tuple[Float[Array, "F _ D"], ...],
) -> tuple[Float[Array, "N D"], ...]:
    """`products.decode` of activations that are 0 but at the entries."""

    def own(entries: tuple[Entries, ...], activations: tuple[Array, ...], decoders: tuple[Array, ...]) -> Any:
        written = row_sums(by_token(entries, decoders), activations, len(decoders))
        return tuple(sum_over("features", written[:, target]) for target in range(len(decoders)))

    out = on_each_device(own, (TOKENS,) * len(decoders))(entries, activations, decoders)
    return tuple(placed(own, ("batch", None)) for own in out)


def _decode_active_forward(entries: Any, activations: Any, decoders: Any) -> tuple[Any, Any]:
    return decode_active(entries, activations, decoders), (entries, activations, decoders)


def _decode_active_backward(kept: Any, gradients: tuple[Array, ...]) -> Any:
    entries, activations, decoders = kept
    errors = jnp.stack([x.astype(activations[0].dtype) for x in gradients], axis=1)
    gradient = held(placed(errors, ("tokens", None, None)))

    where = [of_gradient(decoder) for decoder in decoders]

    def own(entries: tuple[Entries, ...], activations: tuple[Array, ...], decoders: tuple[Array, ...], g: Array) -> Any:
        products = row_products(by_token(entries, decoders), g)
        to_activations = tuple(made.astype(a.dtype) for made, a in zip(products, activations, strict=True))
        to_decoders = []
        each = zip(where, entries, activations, decoders, strict=True)
        for source, ((_, added), listed, a, decoder) in enumerate(each):
            order = listed.by_feature
            tokens = Rows(listed.feature_starts, listed.token[order], g, source)
            made = row_sums((tokens,), (a[order],), decoder.shape[1])
            to_decoders.append(added(made).astype(decoder.dtype))
        return to_activations, tuple(to_decoders)

    placements = (ENTRIES,) * len(entries), tuple(placement for placement, _ in where)
    return None, *on_each_device(own, placements)(entries, activations, decoders, gradient)


decode_active.defvjp(_decode_active_forward, _decode_active_backward)


def by_token(entries: tuple[Entries, ...], decoders: tuple[Array, ...]) -> list[Rows]:
    """The decoders' rows that each token sums up."""
    each = enumerate(zip(entries, decoders, strict=True))
    return [Rows(own.token_starts, own.feature, rows, source) for source, (own, rows) in each]


def of_weight(weight: Array) -> P:
    return jax.typeof(weight).sharding.spec


def of_gradient(weight: Array) -> tuple[P, Callable[[Array], Array]]:
    """Where the gradient of a weight lies, and how it is added up over the devices that hold the same features: not at
    all where the weight's type says that this is done later."""
    where = of_weight(weight)
    if "data" in where.reduced:
        return P(*where.partitions, unreduced=where.reduced), lambda x: x
    return where, lambda x: sum_over("data", x)
