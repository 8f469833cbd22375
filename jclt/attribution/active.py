"""Step 2, the active features of a batch of prompts, with what they read and write.

The coder's layers are encoded one after another, where the coder lies. Of each only the list of its active features is
kept, on the host, with their encoder rows; then the decoder rows of these features are read. Nothing that follows knows
how large the coder is, or where its weights are: on one device, split over a mesh, or on disk.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jclt.attribution.sizes import round_up
from jclt.attribution.sweep.bases import FeatureNodes
from jclt.attribution.sweep.nodes import count_prompt_shards
from jclt.coders import Coder
from jclt.kernels.take_rows import NO_ROW, count_most_rows, take_from_shards
from jclt.mesh import FEATURES_AXIS, count_feature_shards, find_place, is_split, map_over_devices, use_mesh
from jclt.shapes import Array, Bool, DTypeLike, Float, Int

RUN = 8
"""How many numbers `find_nonzero` counts together."""


class LayerList(NamedTuple):
    """One layer's active features, by prompt: sorted by position, then by feature."""

    positions: list[Int[np.ndarray, "_"]]
    features: list[Int[np.ndarray, "_"]]
    activations: list[Float[np.ndarray, "_"]]


def pad_lists(lists: Sequence[np.ndarray], length: int, filler: int = 0) -> np.ndarray:
    """Lists as one array `[B, length]`, filled up at their ends."""
    padded = np.full((len(lists), length), filler, lists[0].dtype)
    for row, numbers in zip(padded, lists, strict=True):
        row[: len(numbers)] = numbers
    return padded


class ActiveFeatures(NamedTuple):
    """The active features of a batch of prompts."""

    lists: list[LayerList]  # by covered layer, on the host
    encoders: list[tuple[Float[Array, "B _ D"], Float[Array, "B _"]]]  # rows and biases; these lists are padded
    length: int  # of the padded list of any layer

    def count_by_position(self, positions: int) -> Int[np.ndarray, "B C T"]:
        """How many are active in each prompt, in each layer and at each of so many positions."""
        by_layer = [[np.bincount(x, minlength=positions) for x in layer.positions] for layer in self.lists]
        return np.swapaxes(np.array(by_layer), 0, 1)


def find_active(
    coder: Coder,
    reads: Float[Array, "B L T D"],
    has_nodes: Bool[np.ndarray, "B T"],
    by_prompt: NamedSharding,
    chosen: Sequence[Bool[Array, "B T F"]] | None = None,
) -> ActiveFeatures:
    """Encodes what the coder reads in one layer after another, of several prompts at a time: with features split over S
    devices, of S times as many as without. Of each layer only the `chosen` features are listed, if given.

    Encoder rows are placed `by_prompt`, as the arrays of prompts are.
    """
    lists, encoders, longest = [], [], 0
    prompts_per_device = len(has_nodes) // count_prompt_shards(by_prompt.mesh)
    for index, layer in enumerate(coder.config.covered):
        encoder, read = coder.load_encoder(index), take_layer(reads, np.int32(layer))
        mesh, place = find_place(encoder)
        shards = count_feature_shards(mesh, coder.config.features)
        at_once = prompts_per_device * shards
        read, has = jax.device_put((read, has_nodes), place)
        with use_mesh(mesh):
            layer_list = LayerList([], [], [])
            for start in range(0, len(has_nodes), at_once):
                some = slice(start, start + at_once)
                of_layer = None if chosen is None else chosen[index][some]
                part = list_active_features(encoder, read[some], has[some], of_layer)
                for prompts, more in zip(layer_list, part, strict=True):
                    prompts.extend(more)
            # Lists never become shorter from layer to layer, so that few programs are compiled.
            longest = max(longest, round_up(max(map(len, layer_list.features)), 16))
            features = pad_lists(layer_list.features, longest, NO_ROW)
            most = count_most_rows(features, coder.config.features, shards)
            rows = take_encoder_rows(encoder, jnp.asarray(features, jnp.int32), most)
        lists.append(layer_list)
        encoders.append(tuple(jax.device_put(rows, by_prompt)))
    return ActiveFeatures(lists, encoders, longest)


@jax.jit
def take_layer(x: Float[Array, "B L T D"], layer: Int[Array, ""]) -> Float[Array, "B T D"]:
    return jax.lax.dynamic_index_in_dim(x, layer, axis=1, keepdims=False)


def list_active_features(
    encoder: Coder, x: Float[Array, "B T D"], has_nodes: Bool[Array, "B T"], chosen: Bool[Array, "B T F"] | None = None
) -> LayerList:
    """The active features of the one layer that the encoder has, or those of them that are chosen."""
    activations, counts = encode_layer(encoder, x, has_nodes, chosen)
    counts = np.asarray(counts)
    length = round_up(int(counts.max()), 16)
    positions, features, values = map(np.asarray, list_nonzero(activations, length))
    result = LayerList([], [], [])
    for prompt, shard_counts in enumerate(counts):
        valid = np.arange(length) < shard_counts[:, None]
        position, feature = positions[prompt][valid], features[prompt][valid]
        order = np.lexsort((feature, position)) if len(shard_counts) > 1 else slice(None)
        for lists, x in zip(result, (position, feature, values[prompt][valid]), strict=True):
            lists.append(np.asarray(x[order]))
    return result


@jax.jit
@jax.named_scope("encode_layer")
def encode_layer(
    encoder: Coder, x: Float[Array, "B T D"], has_nodes: Bool[Array, "B T"], chosen: Bool[Array, "B T F"] | None = None
) -> tuple[Float[Array, "B T F"], Int[Array, "B S"]]:
    """The activations of one layer, 0 where a position has no nodes or a feature is not chosen; and how many features
    are left on each of the feature shards, S of them."""

    def count(activations: Array, has_nodes: Array) -> tuple[Array, Array]:
        masked = jnp.where(has_nodes[..., None], activations, 0)
        return masked, jnp.sum(masked != 0, axis=(1, 2))[:, None]

    activations = encoder.encode(0, x)
    if chosen is not None:
        activations = jnp.where(chosen, activations, 0)
    outputs = (P(None, None, FEATURES_AXIS), P(None, FEATURES_AXIS))
    count = map_over_devices(count, outputs) if is_split(activations) else count
    return count(activations, has_nodes)


@partial(jax.jit, static_argnames=("length",))
@jax.named_scope("list_nonzero")
def list_nonzero(
    activations: Float[Array, "B T F"], length: int
) -> tuple[Int[Array, "B S n"], Int[Array, "B S n"], Float[Array, "B S n"]]:
    """Positions, features and values of what is active, for each prompt and feature shard; lists are padded."""

    def list_prompt(activations: Float[Array, "T F"]) -> tuple[Array, Array, Array]:
        features = activations.shape[1]
        flat = find_nonzero(activations.ravel(), length)
        return flat // features, flat % features, activations.ravel()[flat]

    def list_shard(activations: Array) -> tuple[Array, Array, Array]:
        positions, features, values = jax.vmap(list_prompt)(activations)
        if split:
            features = features + jax.lax.axis_index(FEATURES_AXIS).astype(features.dtype) * activations.shape[2]
        return positions[:, None], features[:, None], values[:, None]

    split = is_split(activations)
    return (map_over_devices(list_shard, (P(None, FEATURES_AXIS),) * 3) if split else list_shard)(activations)


def find_nonzero(x: Float[Array, "n"], length: int) -> Int[Array, "length"]:
    """Where x is not 0; the rest of the list holds arbitrary places. Nonzero numbers are counted run by run, and then
    only runs with one of them are searched. `jnp.nonzero` counts along all of x, which takes longer."""
    runs = jnp.pad(x != 0, (0, -len(x) % RUN)).reshape(-1, RUN)
    counts, ordinals = runs.sum(axis=1), jnp.arange(length)
    ends = jnp.cumsum(counts)
    run = jnp.minimum(jnp.searchsorted(ends, ordinals, side="right"), len(runs) - 1).astype(ends.dtype)
    in_run = ordinals - (ends - counts)[run]
    place = jnp.argmax(jnp.cumsum(runs[run], axis=1) > in_run[:, None], axis=1).astype(ends.dtype)
    return run * RUN + place


@partial(jax.jit, static_argnames=("most",))
@jax.named_scope("take_encoder_rows")
def take_encoder_rows(
    encoder: Coder, features: Int[Array, "B n"], most: int | None
) -> tuple[Float[Array, "B n D"], Float[Array, "B n"]]:
    rows, biases = encoder.encoder(0)
    return take_from_shards(rows, features, most), take_from_shards(biases, features, most)


def gather_features(active: ActiveFeatures, dtype: DTypeLike, by_prompt: NamedSharding) -> FeatureNodes:
    """The nodes of a batch of prompts."""
    padded = [[pad_lists(lists, active.length) for lists in layer] for layer in active.lists]
    positions, features, activations = (np.stack(x, axis=1) for x in zip(*padded, strict=True))
    counts = np.array([[len(x) for x in layer.features] for layer in active.lists]).T
    valid = np.arange(active.length) < counts[..., None]
    lists = (valid, positions.astype(int), features.astype(int), activations.astype(dtype))
    valid, positions, features, activations = jax.device_put(lists, by_prompt)
    encoders, biases = _stack_encoders(tuple(active.encoders), active.length, dtype)
    return FeatureNodes(valid, positions, features, activations, encoders, biases)


@partial(jax.jit, static_argnames=("length", "dtype"))
def _stack_encoders(
    encoders: tuple[tuple[Array, Array], ...], length: int, dtype: DTypeLike
) -> tuple[Float[Array, "B C n D"], Float[Array, "B C n"]]:
    def pad(x: Array) -> Array:
        return jnp.pad(x.astype(dtype), ((0, 0), (0, length - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))

    rows, biases = zip(*encoders, strict=True)
    return jnp.stack([pad(x) for x in rows], axis=1), jnp.stack([pad(x) for x in biases], axis=1)
