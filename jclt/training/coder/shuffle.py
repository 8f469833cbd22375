"""Shuffling of tokens: a rolling buffer on the device that mixes the tokens of several batches.

1. The positions of each batch are shuffled and cut into R pieces, where R is the number of batches that are mixed.
2. Each of the next R steps gets one of the pieces.

So a step's tokens come from all rows of the last R batches, and every token is seen once. They depend on the step
alone: the buffer is not saved, since a resumed run fills it again from the batches before and goes on bit for bit.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jclt.shapes import Array
from jclt.training.coder.harvest import Harvest


def mix_batches(buffer: Harvest, fresh: Harvest, number: Array, seed: int) -> tuple[Harvest, Harvest]:
    """The buffer `[R, L, B, T, D]` with the batch of this number, and the mix of the last R batches."""
    ages, length = buffer.reads.shape[0], fresh.reads.shape[2]
    order = jax.random.permutation(jax.random.fold_in(jax.random.key(seed), number), length)
    piece = length // ages

    def mix_site(buffer: Array, fresh: Array) -> tuple[Array, Array]:
        spec = None if jax.sharding.get_abstract_mesh().empty else jax.typeof(fresh).sharding.spec
        shuffled = fresh.at[:, :, order].get(out_sharding=spec)
        buffer = jax.lax.dynamic_update_index_in_dim(buffer, shuffled, number % ages, axis=0)
        pieces = [
            jax.lax.dynamic_index_in_dim(buffer, (number - age) % ages, axis=0, keepdims=False)[
                :, :, age * piece : (age + 1) * piece
            ]
            for age in range(ages)
        ]
        return buffer, jnp.concatenate(pieces, axis=2)

    reads, mixed_reads = mix_site(buffer.reads, fresh.reads)
    writes, mixed_writes = mix_site(buffer.writes, fresh.writes)
    return Harvest(reads, writes), Harvest(mixed_reads, mixed_writes)


def fill_buffer(harvest: Callable[[int], Harvest], step: int, ages: int, seed: int) -> Harvest:
    """The buffer as it is before a step.

    It holds the batches numbered step to step + R - 2. The step itself adds the batch numbered step + R - 1.
    """
    first = harvest(step)
    buffer = jax.tree.map(lambda x: jnp.zeros((ages, *x.shape), x.dtype, out_sharding=_add_age_axis(x)), first)
    add_batch = jax.jit(lambda buffer, fresh, number: mix_batches(buffer, fresh, number, seed)[0], donate_argnums=0)
    for number in range(step, step + ages - 1):
        buffer = add_batch(buffer, harvest(number), jnp.int32(number))
    return buffer


def _add_age_axis(x: Array) -> jax.NamedSharding:
    sharding = jax.typeof(x).sharding
    return jax.NamedSharding(sharding.mesh, jax.P(None, *sharding.spec))
