"""Token-level shuffling: a rolling buffer on the device that mixes the tokens of several batches.

Each batch's positions are cut into as many pieces as batches are mixed, in an order of its own, and one piece is
handed out at each of the next steps. So a step's tokens come from all rows of the last few batches, every token is
seen once, and what a step gets depends on the step alone: a resumed run fills the buffer again from the batches
before it and goes on bit for bit. Nothing of the buffer is saved.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jclt.shapes import Array
from jclt.training.coder.harvest import Harvest


def mixed(buffer: Harvest, fresh: Harvest, number: Array, seed: int) -> tuple[Harvest, Harvest]:
    """The buffer `[R, L, B, T, D]` with the batch of this number in it, and the mix of the last R batches."""
    ages, length = buffer.reads.shape[0], fresh.reads.shape[2]
    order = jax.random.permutation(jax.random.fold_in(jax.random.key(seed), number), length)
    piece = length // ages

    def one(kept: Array, new: Array) -> tuple[Array, Array]:
        where = jax.typeof(new).sharding.spec
        shuffled = new.at[:, :, order].get(out_sharding=None if jax.sharding.get_abstract_mesh().empty else where)
        kept = jax.lax.dynamic_update_index_in_dim(kept, shuffled, number % ages, axis=0)
        pieces = [
            jax.lax.dynamic_index_in_dim(kept, (number - age) % ages, axis=0, keepdims=False)[
                :, :, age * piece : (age + 1) * piece
            ]
            for age in range(ages)
        ]
        return kept, jnp.concatenate(pieces, axis=2)

    (reads, mixed_reads), (writes, mixed_writes) = one(buffer.reads, fresh.reads), one(buffer.writes, fresh.writes)
    return Harvest(reads, writes), Harvest(mixed_reads, mixed_writes)


def filled(harvested: Callable[[int], Harvest], step: int, ages: int, seed: int) -> Harvest:
    """The buffer as it is before a step, from the batches that came before: those numbered step to step + R - 2, since
    the step itself adds the one numbered step + R - 1."""
    first = harvested(step)
    buffer = jax.tree.map(lambda x: jnp.zeros((ages, *x.shape), x.dtype, out_sharding=_with_ages(x)), first)
    put = jax.jit(lambda buffer, fresh, number: mixed(buffer, fresh, number, seed)[0], donate_argnums=0)
    for number in range(step, step + ages - 1):
        buffer = put(buffer, harvested(number), jnp.int32(number))
    return buffer


def _with_ages(x: Array) -> jax.NamedSharding:
    where = jax.typeof(x).sharding
    return jax.NamedSharding(where.mesh, jax.P(None, *where.spec))
