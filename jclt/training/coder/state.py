"""The state of a coder's training: everything that a resumed run goes on from."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jclt.coders import SparseCoder
from jclt.shapes import Array, Float, Int
from jclt.training.coder.harvest import Scaling
from jclt.training.config import TrainConfig
from jclt.training.optimizers import make_coder_optimizer

DENSITY_DECAY = 0.99
"""The decay per step of a feature's average density ("The Circuits Research Landscape", August 2025)."""
THRESHOLD_DECAY = 0.9
"""The decay per step of BatchTopK's running thresholds. With 0.99 they lag so far behind in short runs that nearly
twice as many features are active at inference (69.7 instead of 40 after 300 steps)."""


class CoderState(NamedTuple):
    step: Array
    coder: SparseCoder  # for scaled activations; under JumpReLU `threshold` holds the threshold's logarithm
    optimizer: Any
    scaling: Scaling
    density: tuple[
        Float[Array, "F"], ...
    ]  # running average, from 0, of the share of tokens on which each feature fires
    silent: tuple[Int[Array, "F"], ...]  # tokens since each feature last fired, counted up to `tokens_until_dead`
    running: Float[Array, "L"]  # BatchTopK's running threshold of each layer
    skipped: Array  # steps whose loss was not finite
    skipped_in_row: Array
    capacity: Array  # pairs per token, layer and device that the sparse path can list; 0 on the dense path


def make_state(config: TrainConfig, coder: SparseCoder, scaling: Scaling) -> CoderState:
    """The initial state of a run with these initial weights."""
    return CoderState(
        step=jnp.zeros((), jnp.int32),
        coder=coder,
        optimizer=jax.jit(make_coder_optimizer(config).init)(coder),
        scaling=scaling,
        density=tuple(jnp.zeros_like(layer.encoder_bias) for layer in coder.layers),
        silent=tuple(jnp.zeros_like(layer.encoder_bias, jnp.int32) for layer in coder.layers),
        running=jnp.zeros(len(coder.layers)),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
        capacity=jnp.zeros(()),
    )


def tokens_until_dead(config: TrainConfig) -> int:
    """The number of silent tokens after which a feature is dead."""
    return round(1 / config.dead_density)
