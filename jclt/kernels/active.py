"""Which features matter on a batch, as a list with one entry for each feature at a token.

A sparse coder's work after encoding touches a feature only where it is active. Listed by token, entries say which rows
of a decoder a token sums up; listed by feature, which tokens a row's gradient comes from. On a mesh every device lists
its own: the features of its shard at the tokens of its share, numbered from 0.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jclt.mesh import ENTRIES, FEATURES, TOKENS, on_each_device, sum_over
from jclt.shapes import Array, Bool, Float, Int

WORD = 32
SPARSE_BELOW = {"cpu": 0.03}
"""The share of a device's features that there may be room for while the sparse path is the faster one, by the table of
`experiments/bench/sparse_step.py`. On other processors it is not measured yet: there `path` must ask for it."""


class Entries(NamedTuple):
    """Of one layer, E places for them; those past the last entry hold nothing."""

    token: Int[Array, "E"]  # ascending
    feature: Int[Array, "E"]
    token_starts: Int[Array, "_"]  # where each token's entries begin
    by_feature: Int[Array, "E"]  # the entries' places, feature by feature
    feature_starts: Int[Array, "_"]
    found: Int[Array, "_"]  # how many there are; more than places means that some are missing


_own: Any = ENTRIES
ON_EACH = Entries(*(_own,) * 6)
"""Where a list of entries lies."""


def listed(matters: Bool[Array, "N F"], room: float) -> Entries:
    """The entries where `matters` is true; on every device there is room for as many a token on average."""

    def own(matters: Array) -> Entries:
        tokens, features = matters.shape
        places = max(1, math.ceil(tokens * min(room, features)))
        words, width = _words(matters), -(-features // WORD)
        inside = jax.lax.population_count(words).astype(jnp.int32)
        each = jnp.sum(inside, axis=1)
        ends = jnp.cumsum(each)
        first = ((ends - each)[:, None] + jnp.cumsum(inside, axis=1) - inside).reshape(-1)
        place = jnp.arange(places, dtype=jnp.int32)
        at = jnp.searchsorted(first, place, side="right").astype(jnp.int32) - 1
        bit = _nth_bit(words.reshape(-1)[at], place - first[at])
        found = ends[-1]
        real = place < found
        token = jnp.where(real, at // width, tokens - 1)
        feature = jnp.where(real, at % width + bit * width, features)  # those of no entry come last
        in_order, by_feature = jax.lax.sort((feature, place), num_keys=1, is_stable=True)
        return Entries(
            token,
            jnp.minimum(feature, features - 1),
            jnp.minimum(jnp.concatenate([jnp.zeros(1, jnp.int32), ends]), places),
            by_feature,
            jnp.searchsorted(in_order, jnp.arange(features + 1, dtype=jnp.int32)).astype(jnp.int32),
            found[None],
        )

    return on_each_device(own, ON_EACH)(matters)


def _words(matters: Bool[Array, "N F"]) -> Array:
    """32 features in a word of bits; the i-th bit of word c is feature c + i times the number of words, so that
    neighbours are packed side by side."""
    tokens, features = matters.shape
    width = -(-features // WORD)
    matters = jnp.pad(matters, ((0, 0), (0, width * WORD - features)))
    bits = jnp.arange(WORD, dtype=jnp.uint32)[None, :, None]
    return jnp.sum(matters.reshape(tokens, WORD, width).astype(jnp.uint32) << bits, axis=1, dtype=jnp.uint32)


def _nth_bit(word: Array, n: Array) -> Array:
    """The position of the n-th bit that is set, from 0, found by halving."""
    position = jnp.zeros_like(n)
    for size in (16, 8, 4, 2, 1):
        low = (word >> position.astype(jnp.uint32)) & jnp.uint32((1 << size) - 1)
        below = jax.lax.population_count(low).astype(jnp.int32)
        above = n >= below
        n, position = jnp.where(above, n - below, n), jnp.where(above, position + size, position)
    return position


def all_found_places(entries: tuple[Entries, ...]) -> Bool[Array, ""]:
    """Whether every entry of every layer did, on every device."""
    places = [own.token.shape[0] // own.found.shape[0] for own in entries]  # on one device
    return jnp.stack([jnp.all(own.found <= room) for own, room in zip(entries, places, strict=True)]).all()


def taken(entries: Entries, x: Float[Array, "N F"]) -> Float[Array, "E"]:
    """The values at the entries; at places without one the least there is. Without a gradient."""

    def own(entries: Entries, x: Array) -> Array:
        holds = jnp.arange(entries.token.shape[0]) < entries.found
        return jnp.where(holds, x[entries.token, entries.feature], jnp.finfo(x.dtype).min)

    return on_each_device(own, ENTRIES)(entries, x)


def linear(forward: Callable[..., Array], backward: Callable[..., Array]) -> Callable[[Entries, Array], Array]:
    """A linear function of its second argument, with the other function as its gradient."""

    @jax.custom_vjp
    def function(entries: Entries, x: Array) -> Array:
        return forward(entries, x)

    function.defvjp(lambda entries, x: (forward(entries, x), entries), lambda entries, g: (None, backward(entries, g)))
    return function


def _of_features(entries: Entries, x: Float[Array, "F"]) -> Float[Array, "E"]:
    return on_each_device(lambda own, x: x[own.feature], ENTRIES)(entries, x)


def _summed_by_feature(entries: Entries, x: Float[Array, "E"]) -> Float[Array, "F"]:
    def own(entries: Entries, x: Array) -> Array:
        features = entries.feature_starts.shape[0] - 1
        return sum_over("data", jax.ops.segment_sum(x, entries.feature, features))

    return on_each_device(own, FEATURES)(entries, x)


of_features = linear(_of_features, _summed_by_feature)
"""Each entry's own of some numbers, one for each feature."""

summed_by_feature = linear(_summed_by_feature, _of_features)
"""For each feature the sum over its entries; what stands at places without an entry must be 0."""


def counted_by_token(entries: Entries, which: Bool[Array, "E"]) -> Int[Array, "N"]:
    """For each token how many of its entries are true, on all devices together."""

    def own(entries: Entries, which: Array) -> Array:
        tokens = entries.token_starts.shape[0] - 1
        return sum_over("features", jax.ops.segment_sum(which.astype(jnp.int32), entries.token, tokens))

    return on_each_device(own, TOKENS)(entries, which)


def of_tokens(entries: Entries, x: Float[Array, "N"]) -> Float[Array, "E"]:
    """Each entry's own of some numbers, one for each token. Without a gradient."""
    return on_each_device(lambda own, x: x[own.token], ENTRIES)(entries, x)
