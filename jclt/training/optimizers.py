"""Learning rate schedules, and optimizers by name as optax chains."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jclt.models import Weight, declare
from jclt.training.config import LmConfig, TrainConfig

ADAM_SHARE = 0.6
"""Under Muon: the learning rate of the weights that are not matrices, which Adam trains, as a share of Muon's."""


def count_warmup_steps(config: LmConfig | TrainConfig) -> int:
    """The steps over which the rate rises: at most a fifth of the run, so that most steps learn at the full rate."""
    return min(config.warmup, config.steps // 5)


def make_lm_optimizer(config: LmConfig) -> optax.GradientTransformation:
    rate = optax.schedules.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, count_warmup_steps(config), config.steps, 0.0
    )
    weights = declare(config.model)
    decayed = {name: not name.endswith(("_gain", "_bias")) for name in weights}
    if config.optimizer == "adamw":
        rule = optax.adamw(rate, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=decayed)
    else:
        matrices: Any = {name: _find_matrix_axes(weight) for name, weight in weights.items()}
        rule = optax.contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            weight_decay_mask=decayed,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            adam_weight_decay=0.0,  # optax masks only the decay of matrices: Adam's weights are decayed below
            adam_learning_rate=lambda step: ADAM_SHARE * rate(step),
            muon_weight_dimension_numbers=matrices,
            consistent_rms=0.2,  # updates as large as Adam's, so that one rate serves both
        )
        by_adam = {name: decayed[name] and matrices[name] is None for name in weights}
        rule = optax.chain(rule, _decay_weights(lambda step: ADAM_SHARE * rate(step) * config.weight_decay, by_adam))
    return optax.chain(optax.clip_by_global_norm(config.clip), rule)


def _decay_weights(rate: optax.Schedule, chosen: Mapping[str, bool]) -> optax.GradientTransformation:
    """Subtracts this share of the chosen weights at each step."""

    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByScheduleState]:
        share = rate(state.count)
        decayed = {name: x - share * params[name] if chosen[name] else x for name, x in updates.items()}
        return decayed, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _find_matrix_axes(weight: Weight) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a stacked weight are a matrix's inputs and outputs; None for a weight that is not a matrix."""
    if not weight.inputs:
        return None
    axes = tuple(range(1, len(weight.shape)))
    return optax.contrib.MuonDimensionNumbers(axes[: weight.inputs], axes[weight.inputs :])


def make_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Warm-up, then constant, then the decay over the last share of the run."""
    rate, end, warmup = config.rate, config.steps, count_warmup_steps(config)
    rise = optax.schedules.linear_schedule(0.0, rate, warmup)
    if config.schedule == "constant":
        return optax.schedules.join_schedules([rise, optax.schedules.constant_schedule(rate)], [warmup])
    if config.schedule == "cosine":
        fall = optax.schedules.cosine_decay_schedule(rate, max(1, end - warmup))
        return optax.schedules.join_schedules([rise, fall], [warmup])
    start = max(warmup, round(end * (1 - config.decay)))
    fall = optax.schedules.linear_schedule(rate, 0.0, max(1, end - start))
    return optax.schedules.join_schedules([rise, optax.schedules.constant_schedule(rate), fall], [warmup, start])


def make_coder_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    rate, moment = make_rate_schedule(config), jnp.dtype(config.moment_dtype)
    b1, b2, epsilon = config.beta1, config.beta2, config.epsilon

    def select_matrices(update: Any) -> Any:
        """The weights that decay: a bias or a threshold's logarithm has no reason to be near 0."""
        return jax.tree.map(lambda x: x.ndim > 1, update)

    def adam() -> optax.GradientTransformation:
        if b1 == 0:  # the first moment is the gradient itself and need not be kept
            return optax.scale_by_rms(b2, epsilon, eps_in_sqrt=False, bias_correction=True)
        return optax.scale_by_adam(b1, b2, epsilon, mu_dtype=moment)

    def adamw() -> optax.GradientTransformation:
        return optax.chain(adam(), optax.add_decayed_weights(config.weight_decay, select_matrices))

    rules = {
        "adam": lambda: optax.chain(adam(), optax.scale_by_learning_rate(rate)),
        "adamw": lambda: optax.chain(adamw(), optax.scale_by_learning_rate(rate)),
        "adafactor": lambda: optax.adafactor(rate, momentum=b1 or None, dtype_momentum=moment),
    }
    return optax.chain(optax.clip_by_global_norm(config.clip), rules[config.optimizer]())
