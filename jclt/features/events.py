"""Lists where the features of a layer fire, on the device: activations never go to the host densely."""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from jclt.coders import Coder
from jclt.errors import UserError
from jclt.kernels.active import find_active_pairs
from jclt.mesh import FEATURES_AXIS, find_place, is_split, map_over_devices, mesh_of, use_mesh
from jclt.shapes import Array, Bool, Float, Int

CHUNK_TOKENS = {"cpu": 512}
"""Tokens that are encoded at once: on a CPU so few that their activations stay in its cache."""
OTHER_CHUNK_TOKENS = 4096
FIRST_SLOTS = 16
"""Places for events per token of a chunk, before more are known to be needed."""


class Events(NamedTuple):
    """Where the features of one layer fire in a block: sorted by feature, then by place."""

    feature: Int[np.ndarray, "E"]
    place: Int[np.ndarray, "E"]  # row of the block * length + position
    value: Float[np.ndarray, "E"]


NONE = Events(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))


@eqx.filter_jit
def list_firing(
    encoder: Coder, x: Float[Array, "C n D"], valid: Bool[Array, "C n"], threshold: Float[Array, "F"], slots: int
) -> tuple[Int[Array, "C S E"], Int[Array, "C S E"], Float[Array, "C S E"], Int[Array, "C S"]]:
    """For each chunk and each feature shard, S of them: token, feature and value where an activation exceeds its
    threshold, and how many there are; -1 if the input is not finite."""

    def list_chunk(chunk: tuple[Array, Array]) -> tuple[Array, Array, Array, Array]:
        x, valid = chunk
        activations = encoder.encode(0, x).astype(jnp.float32)
        fires, split = (activations > threshold[None]) & valid[:, None], is_split(activations)

        def list_shard(activations: Array, fires: Array) -> tuple[Array, Array, Array, Array]:
            token, feature, ends = find_active_pairs(fires, slots)
            values = activations[token, feature]
            if split:
                feature = feature + jax.lax.axis_index(FEATURES_AXIS).astype(feature.dtype) * activations.shape[1]
            return token[None], feature[None], values[None], ends[-1:]

        list_shards = map_over_devices(list_shard, (P(FEATURES_AXIS),) * 4) if split else list_shard
        token, feature, value, totals = list_shards(activations, fires)
        return token, feature, value, jnp.where(jnp.isfinite(x).all(), totals, -1)

    return jax.lax.map(list_chunk, (x, valid))


def choose_chunk(rows: int, length: int) -> int:
    """How many of a batch's rows are encoded at once: a divisor of their number."""
    tokens = CHUNK_TOKENS.get(jax.default_backend(), OTHER_CHUNK_TOKENS)
    return max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * length <= tokens))


def move(x: Array, place: Sharding) -> Array:
    """The array at the place of an encoder, if either of them is on a mesh."""
    is_there = not isinstance(place, NamedSharding) and mesh_of(x) is None
    return x if is_there else jax.device_put(x, place)


class Listing(NamedTuple):
    """A batch of one layer while the device works on it."""

    encoder: Coder
    x: Float[Array, "C n D"]
    valid: Bool[Array, "C n"]
    threshold: Float[Array, "F"]
    slots: int  # per token, on each feature shard
    result: tuple[Array, Array, Array, Array]


def start_listing(
    encoder: Coder, x: Float[Array, "B T D"], valid: Bool[np.ndarray, "B T"], threshold: Array, slots: int
) -> Listing:
    """Has the device list the events of a batch in one layer."""
    rows, length, width = x.shape
    chunk = choose_chunk(rows, length)
    chunks, tokens = rows // chunk, chunk * length
    mesh, place = find_place(encoder)
    x = move(x, place).reshape(chunks, tokens, width)
    of_chunks = move(jnp.asarray(valid.reshape(chunks, tokens)), place)
    with use_mesh(mesh):
        result = list_firing(encoder, x, of_chunks, threshold, slots * tokens)
    return Listing(encoder, x, of_chunks, threshold, slots, result)


def fetch_events(listing: Listing) -> tuple[Events, int]:
    """The events of the batch, unsorted, and the slots per token that they needed: where there are too few, the list is
    made again with more."""
    chunks, tokens = listing.valid.shape
    counts = np.asarray(listing.result[3])
    if (counts < 0).any():
        raise UserError("model: what the coder reads is not finite, expected numbers")
    slots, result = listing.slots, listing.result
    while slots * tokens < counts.max():
        slots *= 2  # so that there are few programs
    if slots > listing.slots:
        with use_mesh(find_place(listing.encoder)[0]):
            result = list_firing(listing.encoder, listing.x, listing.valid, listing.threshold, slots * tokens)
    token, feature, value = map(np.asarray, result[:3])
    filled = np.arange(slots * tokens) < counts[..., None]
    place = token.astype(np.int64) + np.arange(chunks)[:, None, None] * tokens
    return Events(feature[filled], place[filled], value[filled]), slots


def join_events(batches: Sequence[Events], batch_tokens: int) -> Events:
    """The events of a block from those of its batches, sorted. The places of each feature ascend already."""
    feature = np.concatenate([events.feature for events in batches])
    place = np.concatenate([events.place + n * batch_tokens for n, events in enumerate(batches)])
    order = sort_stably(feature)
    return Events(feature[order], place[order], np.concatenate([events.value for events in batches])[order])


def sort_stably(numbers: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """The order of whole numbers from 0 on. Those of 16 bits are sorted without comparing them, which is faster."""
    return np.argsort(numbers.astype(np.uint16) if numbers.max(initial=0) < 1 << 16 else numbers, kind="stable")


@eqx.filter_jit
def find_thresholds(
    encoder: Coder, x: Float[Array, "B T D"], valid: Bool[Array, "B T"], share: Float[Array, ""]
) -> Float[Array, "F"]:
    """Values that this share of a feature's activations exceed, at least 0: halfway to the next activation, so that
    rounding decides nothing."""
    activations = encoder.encode(0, x).astype(jnp.float32).reshape(-1, encoder.config.features)
    ordered = jnp.sort(jnp.where(valid.reshape(-1)[:, None], activations, -jnp.inf), axis=0)[::-1]
    count = jnp.round(share * jnp.sum(valid).astype(jnp.float32)).astype(jnp.int32)
    count = jnp.clip(count, 1, len(ordered) - 1)
    return jnp.maximum((ordered[count - 1] + ordered[count]) / 2, 0.0)
