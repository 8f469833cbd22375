"""Active pairs: which features are active at which tokens, as a list in place of a matrix.

A sparse coder's work after encoding touches a feature only where it is active. Sorted by token, the pairs tell which
decoder rows each token sums up. Sorted by feature, they tell which tokens the gradient of each row comes from. On a
mesh every device has its own list: the features of its shard at the tokens of its shard, both counted from 0.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jclt.mesh import (
    FEATURES_SPEC,
    PER_DEVICE_SPEC,
    TOKENS_SPEC,
    map_over_devices,
    sum_over_data_shards,
    sum_over_feature_shards,
)
from jclt.shapes import Array, Bool, Float, Int

WORD_BITS = 32
SPARSE_BELOW = {"cpu": 0.03}
"""The sparse path is the faster one while its capacity is below this share of a device's features; measured by
`experiments/bench/sparse_step.py`. Other processors are not measured yet: there the setting `path` must ask for it."""


class ActivePairs(NamedTuple):
    """The active pairs of one layer, in E slots; slots after the last pair are empty."""

    token: Int[Array, "E"]  # ascending
    feature: Int[Array, "E"]
    token_starts: Int[Array, "_"]  # the slot of each token's first pair
    by_feature: Int[Array, "E"]  # the slots, sorted by feature
    feature_starts: Int[Array, "_"]  # the first of each feature in `by_feature`
    total: Int[Array, "_"]  # active pairs; if there are more than slots, the others are missing


_per_device: Any = PER_DEVICE_SPEC
PAIRS_SPECS = ActivePairs(
    token=_per_device,
    feature=_per_device,
    token_starts=_per_device,
    by_feature=_per_device,
    feature_starts=_per_device,
    total=_per_device,
)


def list_active(is_active: Bool[Array, "N F"], capacity: float) -> ActivePairs:
    """The pairs where `is_active` is true. Every device has `capacity` slots for each of its tokens."""

    def list_on_device(is_active: Array) -> ActivePairs:
        tokens, features = is_active.shape
        slots = max(1, math.ceil(tokens * min(capacity, features)))
        token, feature, token_ends = find_active_pairs(is_active, slots)
        slot, total = jnp.arange(slots, dtype=jnp.int32), token_ends[-1]
        is_filled = slot < total
        token = jnp.where(is_filled, token, tokens - 1)
        # Sorted by feature, empty slots come last.
        feature = jnp.where(is_filled, feature, features)
        sorted_feature, by_feature = jax.lax.sort((feature, slot), num_keys=1, is_stable=True)
        feature_starts = jnp.searchsorted(sorted_feature, jnp.arange(features + 1, dtype=jnp.int32))
        return ActivePairs(
            token=token,
            feature=jnp.minimum(feature, features - 1),
            token_starts=jnp.minimum(jnp.concatenate([jnp.zeros(1, jnp.int32), token_ends]), slots),
            by_feature=by_feature,
            feature_starts=feature_starts.astype(jnp.int32),
            total=total[None],
        )

    return map_over_devices(list_on_device, PAIRS_SPECS)(is_active)


def find_active_pairs(
    is_active: Bool[Array, "N F"], slots: int
) -> tuple[Int[Array, "E"], Int[Array, "E"], Int[Array, "N"]]:
    """Token and feature of each pair where `is_active` is true, on one device, sorted by token; and for each token the
    number of pairs up to its last. What slots after the last pair hold has no meaning."""
    words, words_per_token = _pack_into_words(is_active), -(-is_active.shape[1] // WORD_BITS)
    word_counts = jax.lax.population_count(words).astype(jnp.int32)
    token_counts = jnp.sum(word_counts, axis=1)
    token_ends = jnp.cumsum(token_counts)
    starts_in_token = jnp.cumsum(word_counts, axis=1) - word_counts
    word_starts = ((token_ends - token_counts)[:, None] + starts_in_token).reshape(-1)
    slot = jnp.arange(slots, dtype=jnp.int32)
    word = jnp.searchsorted(word_starts, slot, side="right").astype(jnp.int32) - 1
    bit = _nth_bit(words.reshape(-1)[word], slot - word_starts[word])
    return word // words_per_token, word % words_per_token + bit * words_per_token, token_ends


def _pack_into_words(is_active: Bool[Array, "N F"]) -> Array:
    """One bit for each feature, in words of 32. With W words, bit i of word w is feature w + i * W, so that
    neighbouring features are packed side by side."""
    tokens, features = is_active.shape
    words = -(-features // WORD_BITS)
    padded = jnp.pad(is_active, ((0, 0), (0, words * WORD_BITS - features)))
    bits = jnp.arange(WORD_BITS, dtype=jnp.uint32)[None, :, None]
    return jnp.sum(padded.reshape(tokens, WORD_BITS, words).astype(jnp.uint32) << bits, axis=1, dtype=jnp.uint32)


def _nth_bit(word: Array, n: Array) -> Array:
    """The position of the n-th bit that is set (n from 0), by bisection."""
    position = jnp.zeros_like(n)
    for size in (16, 8, 4, 2, 1):
        low = (word >> position.astype(jnp.uint32)) & jnp.uint32((1 << size) - 1)
        below = jax.lax.population_count(low).astype(jnp.int32)
        above = n >= below
        n, position = jnp.where(above, n - below, n), jnp.where(above, position + size, position)
    return position


def all_fit(layers: tuple[ActivePairs, ...]) -> Bool[Array, ""]:
    """Whether the active pairs of every layer fit into its slots, on every device."""
    slots_per_device = [pairs.token.shape[0] // pairs.total.shape[0] for pairs in layers]
    fit = [jnp.all(pairs.total <= slots) for pairs, slots in zip(layers, slots_per_device, strict=True)]
    return jnp.stack(fit).all()


def gather_values(pairs: ActivePairs, x: Float[Array, "N F"]) -> Float[Array, "E"]:
    """x at the pairs; at empty slots the smallest finite number. Without a gradient."""

    def gather_on_device(pairs: ActivePairs, x: Array) -> Array:
        is_filled = jnp.arange(pairs.token.shape[0]) < pairs.total
        return jnp.where(is_filled, x[pairs.token, pairs.feature], jnp.finfo(x.dtype).min)

    return map_over_devices(gather_on_device, PER_DEVICE_SPEC)(pairs, x)


def linear_with_transpose(
    forward: Callable[..., Array], transpose: Callable[..., Array]
) -> Callable[[ActivePairs, Array], Array]:
    """`forward`, which is linear in its second argument, with `transpose` as its gradient."""

    @jax.custom_vjp
    def function(pairs: ActivePairs, x: Array) -> Array:
        return forward(pairs, x)

    function.defvjp(lambda pairs, x: (forward(pairs, x), pairs), lambda pairs, g: (None, transpose(pairs, g)))
    return function


def _gather_by_feature(pairs: ActivePairs, x: Float[Array, "F"]) -> Float[Array, "E"]:
    return map_over_devices(lambda pairs, x: x[pairs.feature], PER_DEVICE_SPEC)(pairs, x)


def _sum_by_feature(pairs: ActivePairs, x: Float[Array, "E"]) -> Float[Array, "F"]:
    def sum_on_device(pairs: ActivePairs, x: Array) -> Array:
        features = pairs.feature_starts.shape[0] - 1
        return sum_over_data_shards(jax.ops.segment_sum(x, pairs.feature, features))

    return map_over_devices(sum_on_device, FEATURES_SPEC)(pairs, x)


gather_by_feature = linear_with_transpose(_gather_by_feature, _sum_by_feature)
"""For each pair the number of its feature."""

sum_by_feature = linear_with_transpose(_sum_by_feature, _gather_by_feature)
"""For each feature the sum over its pairs; the numbers at empty slots must be 0."""


def count_by_token(pairs: ActivePairs, where: Bool[Array, "E"]) -> Int[Array, "N"]:
    """For each token the number of its pairs at which `where` is true, over all devices."""

    def count_on_device(pairs: ActivePairs, where: Array) -> Array:
        tokens = pairs.token_starts.shape[0] - 1
        return sum_over_feature_shards(jax.ops.segment_sum(where.astype(jnp.int32), pairs.token, tokens))

    return map_over_devices(count_on_device, TOKENS_SPEC)(pairs, where)


def gather_by_token(pairs: ActivePairs, x: Float[Array, "N"]) -> Float[Array, "E"]:
    """For each pair the number of its token. Without a gradient."""
    return map_over_devices(lambda pairs, x: x[pairs.token], PER_DEVICE_SPEC)(pairs, x)
