"""Optimizers by name, as optax chains."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jclt.models import Weight, declare
from jclt.training.config import LmConfig, TrainConfig


def warmup_steps(config: LmConfig | TrainConfig) -> int:
    """Over how many steps the rate rises: in a short run no more than a fifth of them, so that most learn at it."""
    return min(config.warmup, config.steps // 5)


def lm_optimizer(config: LmConfig) -> optax.GradientTransformation:
    rate = optax.schedules.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup_steps(config), config.steps, config.learning_rate * config.final_rate
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
            adam_weight_decay=0.0,  # optax masks the matrices' decay alone: Adam's weights are decayed below
            adam_learning_rate=lambda step: config.adam_share * rate(step),
            muon_weight_dimension_numbers=matrices,
            consistent_rms=0.2,  # updates as large as Adam's, so that one rate serves both
        )
        adams = {name: decayed[name] and matrices[name] is None for name in weights}
        rule = optax.chain(rule, _decay(lambda step: config.adam_share * rate(step) * config.weight_decay, adams))
    return optax.chain(optax.clip_by_global_norm(config.clip), rule)


def _decay(rate: optax.Schedule, chosen: Mapping[str, bool]) -> optax.GradientTransformation:
    """Takes this share of the chosen weights off at each step."""

    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByScheduleState]:
        share = rate(state.count)
        made = {name: x - share * params[name] if chosen[name] else x for name, x in updates.items()}
        return made, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _matrix_axes(weight: Weight) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a stacked weight are a matrix's inputs and outputs; Adam takes what is no matrix."""
    if not weight.inputs:
        return None
    axes = tuple(range(1, len(weight.shape)))
    return optax.contrib.MuonDimensionNumbers(axes[: weight.inputs], axes[weight.inputs :])


def coder_rate(config: TrainConfig) -> optax.Schedule:
    """Warm-up, then constant, then the decay over the last share of the run."""
    rate, end, warmup = config.learning_rate, config.steps, warmup_steps(config)
    rise = optax.schedules.linear_schedule(0.0, rate, warmup)
    if config.schedule == "constant":
        return optax.schedules.join_schedules([rise, optax.schedules.constant_schedule(rate)], [warmup])
    if config.schedule == "cosine":
        fall = optax.schedules.cosine_decay_schedule(rate, max(1, end - warmup))
        return optax.schedules.join_schedules([rise, fall], [warmup])
    start = max(warmup, round(end * (1 - config.decay)))
    fall = optax.schedules.linear_schedule(rate, 0.0, max(1, end - start))
    return optax.schedules.join_schedules([rise, optax.schedules.constant_schedule(rate), fall], [warmup, start])


def coder_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    c, rate, moment = config, coder_rate(config), jnp.dtype(config.moment_dtype)
    b1, b2, epsilon = c.beta1, c.beta2, c.epsilon

    def decay(update: Any) -> Any:
        """Of matrices alone: a bias or a threshold's logarithm has no reason to be near 0."""
        return jax.tree.map(lambda x: x.ndim > 1, update)

    def adam() -> optax.GradientTransformation:
        if b1 == 0:  # its first moment is the gradient itself, and need not be kept
            return optax.scale_by_rms(b2, epsilon, eps_in_sqrt=False, bias_correction=True)
        return optax.scale_by_adam(b1, b2, epsilon, mu_dtype=moment)

    def adamw() -> optax.GradientTransformation:
        return optax.chain(adam(), optax.add_decayed_weights(c.weight_decay, decay))

    rules = {
        "adam": lambda: optax.chain(adam(), optax.scale_by_learning_rate(rate)),
        "adamw": lambda: optax.chain(adamw(), optax.scale_by_learning_rate(rate)),
        "adafactor": lambda: optax.adafactor(rate, momentum=b1 or None, dtype_momentum=moment),
        "lion": lambda: optax.lion(rate, b1, b2, mu_dtype=moment, weight_decay=c.weight_decay, mask=decay),
        "rmsprop": lambda: optax.chain(
            optax.rmsprop(rate, b2, epsilon, bias_correction=True),  # without it the first steps are far too long
            *([optax.trace(b1, accumulator_dtype=moment)] if b1 else []),
        ),
        "sgd": lambda: optax.sgd(rate, momentum=b1 or None, accumulator_dtype=moment),
    }
    return optax.chain(optax.clip_by_global_norm(config.clip), rules[config.optimizer]())
