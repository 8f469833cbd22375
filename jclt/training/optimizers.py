"""Optimizers by name, as optax chains."""

from typing import Any

import optax

from jclt.models import Weight, declare
from jclt.training.config import LmConfig


def optimizer(config: LmConfig) -> optax.GradientTransformation:
    rate = optax.schedules.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup, config.steps, config.learning_rate * config.final_rate
    )
    weights = declare(config.model)
    decayed = {name: not name.endswith(("_gain", "_bias")) for name in weights}
    if config.optimizer == "adamw":
        rule = optax.adamw(rate, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=decayed)
    else:
        matrices: Any = {name: _matrix_axes(weight) for name, weight in weights.items()}
        rule = optax.contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            weight_decay_mask=decayed,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            adam_weight_decay=config.weight_decay,
            adam_learning_rate=lambda step: config.adam_share * rate(step),
            muon_weight_dimension_numbers=matrices,
            consistent_rms=0.2,  # updates as large as Adam's, so that one rate serves both
        )
    return optax.chain(optax.clip_by_global_norm(config.clip), rule)


def _matrix_axes(weight: Weight) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a stacked weight are a matrix's inputs and outputs; Adam takes what is no matrix."""
    if not weight.inputs:
        return None
    axes = tuple(range(1, len(weight.shape)))
    return optax.contrib.MuonDimensionNumbers(axes[: weight.inputs], axes[weight.inputs :])
