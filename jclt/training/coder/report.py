"""The metrics of a step."""

from typing import Any

import jax.numpy as jnp

from jclt.shapes import Array
from jclt.training.coder.state import DENSITY_DECAY, CoderState, tokens_until_dead
from jclt.training.config import TrainConfig

DECADES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Edges of the density histogram: the shares of features that fire on fewer tokens than the first edge, between the
first and the second, and so on, by the running average."""


def compute_metrics(
    config: TrainConfig, state: CoderState, report: dict[str, Any], gradient_norm: Array, ramp: Array
) -> dict[str, Any]:
    """The metrics of a step: numbers over all layers, and lists with one number per layer.

    1. spread = sum of (y - mean of y)^2, over the tokens of this step
    2. nmse = ||y - y'||^2 / spread
    3. explained = 1 - (||y - y'||^2 - ||mean of y - y'||^2) / spread: as if the decoder bias were the best one

    A layer without spread has an error of 0 and does not count in the means over layers. The share of dead features is
    NaN until there have been as many tokens as a feature must be silent for.
    """
    l0 = jnp.stack([jnp.sum(fired) for fired in report["fired"]])
    spread = report["spread"]
    varies = spread > 0
    layers = jnp.maximum(1, jnp.sum(varies, dtype=jnp.float32))
    nmse, unexplained = (
        jnp.where(varies, error / jnp.where(varies, spread, 1.0), 0.0)
        for error in (report["error"], report["error"] - report["drift"])
    )
    steps = jnp.maximum(1, state.step - state.skipped)
    # The running averages started at 0: this is the weight that observed densities have in them by now.
    weight = 1 - jnp.power(jnp.float32(DENSITY_DECAY), steps.astype(jnp.float32))
    below = [jnp.stack([jnp.mean(x < edge * weight, dtype=jnp.float32) for x in state.density]) for edge in DECADES]
    limit = tokens_until_dead(config)
    dead = jnp.stack([jnp.mean(silence >= limit, dtype=jnp.float32) for silence in state.silent])
    dead = jnp.where(steps >= -(-limit // (config.batch * config.length)), dead, jnp.nan)
    return {
        "loss": report["loss"],
        "nmse": jnp.sum(nmse) / layers,
        "explained": 1 - jnp.sum(unexplained) / layers,
        "l0": jnp.sum(l0),
        "dead": jnp.mean(dead),
        "penalty": report["penalty"],
        "gradient_norm": gradient_norm,
        "ramp": ramp,
        "skipped": state.skipped,
        "skipped_in_row": state.skipped_in_row,
        **{name: report[name] for name in ("kl", "overflow") if name in report},
        "layers_nmse": nmse,
        "layers_explained": 1 - unexplained,
        "layers_l0": l0,
        "layers_dead": dead,
        "density_histogram": jnp.diff(jnp.stack(below).mean(axis=1), prepend=0.0, append=1.0),
    }
