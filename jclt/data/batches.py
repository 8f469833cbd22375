"""Which rows make up the batch of a step, as a function of seed and step, and how the rows get to the devices."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from jclt.shapes import Array

FEISTEL_ROUNDS = 6


def choose_batch_rows(count: int, seed: int, step: int, batch: int) -> np.ndarray:
    """The numbers of the rows, out of `count`, in the batch of this step. Each epoch is another permutation of all.

        n = step * batch + i        epoch = n // count
        row[i] = permutation[seed, epoch](n mod count)        for i = 0 ... batch - 1

    Every host computes the same numbers, and reads only the rows of its devices (`place_rows`): the batch axis is split
    over all D devices, in the order of the mesh, and device d holds i = d batch / D ... (d + 1) batch / D - 1.
    """
    epochs, places = np.divmod(np.arange(step * batch, (step + 1) * batch), count)
    return np.concatenate([permute(places[epochs == e], count, (seed, int(e))) for e in np.unique(epochs)])


def permute(places: np.ndarray, count: int, key: Sequence[int]) -> np.ndarray:
    """The images of these numbers under the key's permutation of 0 ... count - 1.

    No table is made, so the cost does not depend on `count`. A Feistel network permutes the numbers of an even number
    of bits; a result that is not below `count` is permuted again until it is.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    round_keys = np.random.SeedSequence(key).generate_state(FEISTEL_ROUNDS, np.uint64)
    result = places.astype(np.uint64)
    outside = np.ones(len(result), bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (hash_bits(right ^ round_key) & mask)
        result[outside] = (left << half) | right
        outside = result >= count
    return result.astype(np.int64)


def hash_bits(x: np.ndarray) -> np.ndarray:
    """A hash from 64 bits to 64 bits (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def place_rows(read: Callable[[np.ndarray], Any], index: np.ndarray, sharding: Sharding) -> Any:
    """The rows with these numbers as global arrays; each process reads only the rows of its devices.

    `read` returns a pytree of arrays whose first axis is the rows asked for. All of them get the same sharding.
    """
    empty_arrays, structure = jax.tree.flatten(read(index[:0]))

    @cache  # several devices can hold the same rows, and every array asks for them
    def read_slice(start: int, stop: int) -> list[np.ndarray]:
        return jax.tree.leaves(read(index[start:stop]))

    def build_array(n: int) -> Array:
        def read_shard(slices: tuple[slice, ...] | None) -> np.ndarray:
            rows, *others = slices or (slice(None),)
            start, stop, _ = rows.indices(len(index))
            return read_slice(start, stop)[n][(slice(None), *others)]

        shape = (len(index), *empty_arrays[n].shape[1:])
        return jax.make_array_from_callback(shape, sharding, read_shard, dtype=empty_arrays[n].dtype)

    return jax.tree.unflatten(structure, [build_array(n) for n in range(len(empty_arrays))])
