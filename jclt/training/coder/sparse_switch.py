"""When training takes the sparse path: measured at every so many steps, and decided the same way on every host."""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jclt.kernels.active import SPARSE_BELOW
from jclt.mesh import AnyMesh
from jclt.models import ModelConfig
from jclt.shapes import Array, Params
from jclt.training.coder.batches import activations
from jclt.training.coder.objective import prepare
from jclt.training.coder.sparse import needed, reason_against
from jclt.training.coder.state import CoderState
from jclt.training.coder.step import micro_batches
from jclt.training.config import TrainConfig

log = logging.getLogger(__name__)
REVIEW = 50
"""Steps between two measurements, each of which costs a harvest and an encoding."""
LEAST = 2.0**-6
"""Entries a token that there is room for at least."""


@partial(jax.jit, static_argnames=("config", "model"))
def entries_needed(config: TrainConfig, model: ModelConfig, state: CoderState, params: Params, batch: Any) -> Array:
    """Entries a token that the sparse path would need for the first micro-batch."""
    found = activations(config, model, params, batch)
    weights = prepare(state.coder)
    own = micro_batches(config, state.scaling, found)(0)
    return needed(config, weights.coder, weights.norms, own.x, state.running)


def reviewed(config: TrainConfig, mesh: AnyMesh, state: CoderState, measure: Callable[[], Array]) -> CoderState:
    """The state with room for what `measure()` says is needed, or on the dense path where that pays more."""
    features = config.coder.features // mesh.shape["features"]
    unmeasured = SPARSE_BELOW["cpu"] if config.path == "sparse" else 0.0
    limit = SPARSE_BELOW.get(jax.default_backend(), unmeasured) * features
    before, room, need = float(state.room), 0.0, 0.0
    if config.path != "dense" and limit and not reason_against(config):
        need = float(measure())
        room = room_for(config.headroom * need, before)
        if room > limit:
            room = 0.0
    if room != before:
        path = f"the sparse path, with room for {room:g}" if room else "the dense path"
        log.info("step %d: %.3g of %d features a device matter at a token: on %s", state.step, need, features, path)
    return state._replace(room=jnp.full_like(state.room, room))


def room_for(wanted: float, before: float = 0.0) -> float:
    """As many places, on a scale of powers of 2 and numbers halfway between, since each new number is compiled anew;
    what there was before while that is enough and not far too much."""
    if wanted <= before <= 4 * wanted:
        return before
    power = 2.0 ** math.floor(math.log2(max(wanted, LEAST)))
    return next(size for size in (power, 1.5 * power, 2 * power) if size >= wanted)
