"""Which rows make up the batch of a step, as a function of seed and step, and how they get to the devices."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from jclt.shapes import Array

ROUNDS = 6


def batch_rows(count: int, seed: int, step: int, batch: int) -> np.ndarray:
    """Which of `count` rows make up the batch of this step: every epoch is a permutation of its own."""
    epoch, at = np.divmod(np.arange(step * batch, (step + 1) * batch), count)
    return np.concatenate([shuffled(at[epoch == e], count, (seed, int(e))) for e in np.unique(epoch)])


def shuffled(places: np.ndarray, count: int, key: Sequence[int]) -> np.ndarray:
    """Where the key's permutation of `count` numbers takes these; no table is made, so billions cost what ten do.

    A Feistel network permutes the numbers of an even number of bits; what it takes beyond `count` goes round again.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)
    found = places.astype(np.uint64)
    outside = np.ones(len(found), bool)
    while outside.any():
        left, right = found[outside] >> half, found[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & mask)
        found[outside] = (left << half) | right
        outside = found >= count
    return found.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """A hash of 64 bits to 64 bits (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def place(read: Callable[[np.ndarray], Any], index: np.ndarray, sharding: Sharding) -> Any:
    """The rows of these numbers as global arrays: each process reads those that lie on its own devices.

    `read` gives arrays (in any pytree) whose first axis is the rows asked for; the sharding holds for each of them.
    """
    kinds, structure = jax.tree.flatten(read(index[:0]))

    @cache  # several devices may hold the same rows, and every array asks for them
    def rows(start: int, stop: int) -> list[np.ndarray]:
        return jax.tree.leaves(read(index[start:stop]))

    def placed(n: int) -> Array:
        def part(where: tuple[slice, ...] | None) -> np.ndarray:
            first, *others = where or (slice(None),)
            start, stop, _ = first.indices(len(index))
            return rows(start, stop)[n][(slice(None), *others)]

        shape = (len(index), *kinds[n].shape[1:])
        return jax.make_array_from_callback(shape, sharding, part, dtype=kinds[n].dtype)

    return jax.tree.unflatten(structure, [placed(n) for n in range(len(kinds))])
