"""What a run of a coder goes on from."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jclt.coders import SparseCoder
from jclt.shapes import Array, Float, Int
from jclt.training.coder.harvest import Scaling
from jclt.training.config import TrainConfig
from jclt.training.optimizers import coder_optimizer


class CoderState(NamedTuple):
    """Everything that a resumed run goes on from."""

    step: Array
    coder: SparseCoder  # on scaled activations; under JumpReLU `threshold` holds the threshold's logarithm
    optimizer: Any
    scaling: Scaling
    density: tuple[Float[Array, "F"], ...]  # running share of tokens on which each feature fires, from 0 on
    silent: tuple[Int[Array, "F"], ...]  # tokens since each feature last fired, counted up to `dead_after`
    running: Float[Array, ""]  # BatchTopK's running threshold
    skipped: Array  # steps whose loss was not finite
    skipped_in_row: Array
    room: Array  # entries a token, layer and device that the sparse path has room for; 0 on the dense path


def fresh_state(config: TrainConfig, coder: SparseCoder, scaling: Scaling) -> CoderState:
    """A run's first state, from its initial weights."""
    return CoderState(
        step=jnp.zeros((), jnp.int32),
        coder=coder,
        optimizer=jax.jit(coder_optimizer(config).init)(coder),
        scaling=scaling,
        density=tuple(jnp.zeros_like(own.encoder_bias) for own in coder.layers),
        silent=tuple(jnp.zeros_like(own.encoder_bias, jnp.int32) for own in coder.layers),
        running=jnp.zeros(()),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
        room=jnp.zeros(()),
    )


def dead_after(config: TrainConfig) -> int:
    """A feature that is silent on so many tokens is dead."""
    return round(1 / config.dead_density)
