"""When a run can be given more steps: where none of those it has done would have been another."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jclt.training.config import LmConfig, TrainConfig
from jclt.training.optimizers import coder_rate


def reason_against_more_steps(config: LmConfig | TrainConfig, before: int, reached: int) -> str | None:
    """Why a run of `before` steps that has reached one of them is not the beginning of the run of `config`, if it is
    not."""
    if reached == 0:
        return None
    if isinstance(config, LmConfig):
        return "its learning rate falls over all steps"
    begun = replace(config, steps=before)
    if not np.array_equal(rates(begun, reached), rates(config, reached)):
        return f"its learning rate up to step {reached} would have been another"
    grows = config.sparsity_term != "none" and config.sparsity_weight
    if grows and not np.array_equal(ramp(begun, reached), ramp(config, reached)):
        return f"sparsity_ramp={config.sparsity_ramp} is a share of all steps"
    if config.end_to_end_steps and reached > before - config.end_to_end_steps:
        return "its end-to-end steps have begun"
    return None


def rates(config: TrainConfig, steps: int) -> np.ndarray:
    """Learning rates of so many first steps."""
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix types
        return np.asarray(coder_rate(config)(jnp.arange(steps)))


def ramp(config: TrainConfig, steps: int) -> np.ndarray:
    """Shares of the sparsity penalty's weight, likewise."""
    return np.minimum(1.0, np.arange(1, steps + 1) / max(1, round(config.sparsity_ramp * config.steps)))
