"""Decides whether a run can be given more steps: only if that changes none of the steps it has done."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jclt.training.config import LmConfig, TrainConfig
from jclt.training.optimizers import make_rate_schedule


def explain_why_not_longer(config: LmConfig | TrainConfig, before: int, reached: int) -> str | None:
    """Why a run of `before` steps cannot go on as the longer run of `config`; None if it can.

    It can if its steps up to the one it has `reached` are the first steps of the longer run.
    """
    if reached == 0:
        return None
    if isinstance(config, LmConfig):
        return "its learning rate falls over all steps"
    begun = replace(config, steps=before)
    if not np.array_equal(compute_rates(begun, reached), compute_rates(config, reached)):
        return f"its learning rate up to step {reached} would have been another"
    grows = config.sparsity_term != "none" and config.sparsity_weight
    if grows and not np.array_equal(compute_ramp(begun, reached), compute_ramp(config, reached)):
        return f"sparsity_ramp={config.sparsity_ramp} is a share of all steps"
    if config.end_to_end_steps and reached > before - config.end_to_end_steps:
        return "its end-to-end steps have begun"
    return None


def compute_rates(config: TrainConfig, steps: int) -> np.ndarray:
    """The learning rates of the first steps."""
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix types
        return np.asarray(make_rate_schedule(config)(jnp.arange(steps)))


def compute_ramp(config: TrainConfig, steps: int) -> np.ndarray:
    """The shares of the sparsity penalty's weight in the first steps."""
    return np.minimum(1.0, np.arange(1, steps + 1) / max(1, round(config.sparsity_ramp * config.steps)))
