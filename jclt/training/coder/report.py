"""What a step reports, and what is said of it."""

from typing import Any

import jax.numpy as jnp

from jclt.shapes import Array
from jclt.training.coder.state import CoderState, dead_after
from jclt.training.config import TrainConfig

DECADES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Edges of the density histogram: shares of features that fire on fewer tokens than the first, on fewer than the
second, and so on, by the running average."""


def metrics(config: TrainConfig, state: CoderState, report: dict[str, Any], norm: Array, ramp: Array) -> dict[str, Any]:
    """What a step reports: numbers for all layers together, and lists with one for each.

    Normalised error is ||y - y'||^2 over the spread of y about its mean on these tokens; explained variance forgives
    the part of the error that is constant. A layer without spread has an error of 0 and does not count in the mean.
    How many features are dead is NaN until there have been as many tokens as it takes to tell.
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
    # Of an average that started at 0 only so much is made of densities.
    seen = 1 - jnp.power(jnp.float32(config.density_decay), steps.astype(jnp.float32))
    below = [jnp.stack([jnp.mean(own < edge * seen, dtype=jnp.float32) for own in state.density]) for edge in DECADES]
    most = dead_after(config)
    dead = jnp.stack([jnp.mean(own >= most, dtype=jnp.float32) for own in state.silent])
    dead = jnp.where(steps >= -(-most // (config.batch * config.length)), dead, jnp.nan)
    return {
        "loss": report["loss"],
        "nmse": jnp.sum(nmse) / layers,
        "explained": 1 - jnp.sum(unexplained) / layers,
        "l0": jnp.sum(l0),
        "dead": jnp.mean(dead),
        "penalty": report["penalty"],
        "gradient_norm": norm,
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
