"""Decides when training takes the sparse path: measured every so many steps, with the same result on every host."""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jclt.kernels.active import SPARSE_BELOW
from jclt.mesh import FEATURES_AXIS, AnyMesh
from jclt.models import ModelConfig
from jclt.shapes import Array, Params
from jclt.training.coder.batches import harvest_batch
from jclt.training.coder.objective import prepare_weights
from jclt.training.coder.sparse import count_needed, explain_why_not_sparse
from jclt.training.coder.state import CoderState
from jclt.training.coder.step import split_micro_batches
from jclt.training.config import TrainConfig

log = logging.getLogger(__name__)
REVIEW_EVERY = 50
"""Steps between two measurements. Each costs a harvest and an encoding."""
LEAST_CAPACITY = 2.0**-6
"""The smallest capacity, in pairs per token."""


@partial(jax.jit, static_argnames=("config", "model"))
def measure_needed(config: TrainConfig, model: ModelConfig, state: CoderState, params: Params, batch: Any) -> Array:
    """The pairs per token that the sparse path would need for the first micro-batch."""
    harvest = harvest_batch(config, model, params, batch)
    weights = prepare_weights(state.coder)
    first = split_micro_batches(config, state.scaling, harvest)(0)
    return count_needed(config, weights.coder, weights.norms, first.x, state.running)


def update_capacity(config: TrainConfig, mesh: AnyMesh, state: CoderState, measure: Callable[[], Array]) -> CoderState:
    """The state with the capacity for the pairs that `measure()` counts; with 0 where the dense path is faster."""
    features = config.coder.features // mesh.shape[FEATURES_AXIS]
    # Where the sparse path was not measured, it has the limit of CPUs if the user asks for it.
    unmeasured = SPARSE_BELOW["cpu"] if config.path == "sparse" else 0.0
    limit = SPARSE_BELOW.get(jax.default_backend(), unmeasured) * features
    before, capacity, need = float(state.capacity), 0.0, 0.0
    if config.path != "dense" and limit and not explain_why_not_sparse(config):
        need = float(measure())
        capacity = choose_capacity(config.headroom * need, before)
        if capacity > limit:
            capacity = 0.0
    if capacity != before:
        path = f"the sparse path, with a capacity of {capacity:g}" if capacity else "the dense path"
        log.info("step %d: %.3g of %d features a device matter at a token: on %s", state.step, need, features, path)
    return state._replace(capacity=jnp.full_like(state.capacity, capacity))


def choose_capacity(need: float, present: float = 0.0) -> float:
    """The smallest capacity, out of a few, that is at least as large as wanted.

    The step is compiled for each capacity. So the capacities are powers of 2 and the numbers halfway between them, and
    the one from before is kept while it is enough and at most four times as much.
    """
    if need <= present <= 4 * need:
        return present
    power = 2.0 ** math.floor(math.log2(max(need, LEAST_CAPACITY)))
    return next(size for size in (power, 1.5 * power, 2 * power) if size >= need)
