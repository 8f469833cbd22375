"""Rules of the backward pass. The forward pass stays the same to the last bit; gradients see a simpler model.

    norm         each norm divides by a constant
    attention    attention patterns are constant (AH-rule)
    identity     an activation z -> f(z) is z times the constant f(z) / z; so is the soft cap of logits
    half         of a gated product each of the two factors gets half of the gradient
    gate         of a gated product the activated gate is constant, so that the other factor gets all of the gradient
    product      of a product within attention, query x key and pattern x value, each factor gets half of the gradient
    temperature  the softmax of attention has the gradient that it would have at temperature 2: p_2 (g - p_2 . g)

With norm, attention, identity, and half or gate, the model is linear in its inputs and biases together: value x
gradient, summed over the inputs and all biases, is the metric. `RULE_SETS` names the sets of published
implementations.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from jclt.errors import UserError
from jclt.models import Compose, Edit, Freeze, ModelConfig, Place, ops
from jclt.models.sites import SITES
from jclt.models.transformer import Activate
from jclt.numerics import at_least_float32
from jclt.shapes import Array

RULES = ("norm", "attention", "identity", "half", "gate", "product", "temperature")
RULE_SETS: dict[str, tuple[str, ...]] = {
    "none": (),  # the plain gradient
    "relp": ("norm", "identity", "half"),  # FarnoushRJ/RelP by default, and the paper's experiments
    "relp with attention": ("norm", "attention", "identity", "half"),  # the paper's list of rules; conserves
    "neuron circuits": ("norm", "attention", "identity", "half"),  # TransluceAI/circuits: gate z sigmoid(z), halved
    "neuron graphs": ("norm", "attention", "identity", "gate"),  # `jclt.attribute` with a model's neurons
    "frozen": ("norm", "attention"),  # what attribution graphs freeze
    "gim": ("norm", "half", "product", "temperature"),  # corticph/gim
}
TEMPERATURE = 2.0
SMALLEST = 1e-6  # share of the soft cap below which its slope is 1


def read_rules(rules: str | Iterable[str]) -> tuple[str, ...]:
    """Rules as a tuple, of a set's name, a rule's name or several of these."""
    if isinstance(rules, str) and rules in RULE_SETS:
        return RULE_SETS[rules]
    names = (rules,) if isinstance(rules, str) else tuple(rules)
    for name in names:
        if name not in RULES:
            known = ", ".join((*RULES, *RULE_SETS))
            raise UserError(f"rule '{name}': does not exist, expected one of: {known}")
    if {"half", "gate"} <= set(names):
        raise UserError("rules 'half' and 'gate': both divide the gated product, expected one of them")
    return tuple(dict.fromkeys(names))


def scale_gradient(x: Array, factor: float | Array) -> Array:
    """x itself, with its gradient times a constant factor."""
    factor = jax.lax.stop_gradient(jnp.asarray(factor, x.dtype))
    return x + (factor - 1) * (x - jax.lax.stop_gradient(x))


def activate_linearly(z: Array, activated: Array) -> Array:
    """The value f(z) with the gradient of z (f(z) / z), whose second factor is constant."""
    ratio = jax.lax.stop_gradient(activated / jnp.where(z == 0, jnp.ones_like(z), z))
    return jax.lax.stop_gradient(activated) + ratio * (z - jax.lax.stop_gradient(z))


def make_activate(rules: tuple[str, ...]) -> Activate:
    """How the true MLP computes its neurons, under rules."""
    if not {"identity", "half", "gate"} & set(rules):
        return ops.compute_neurons

    def activate(config: ModelConfig, up: Array, gate: Array | None) -> Array:
        z = up if gate is None else gate
        activated = ops.ACTIVATIONS[config.activation](z)
        if "identity" in rules:
            activated = activate_linearly(z, activated)
        if gate is None:
            return activated
        if "gate" in rules:
            return jax.lax.stop_gradient(activated) * up
        return scale_gradient(activated * up, 0.5) if "half" in rules else activated * up

    return activate


def make_rules_edit(config: ModelConfig, rules: tuple[str, ...]) -> Edit:
    """The rules outside the MLP's neurons, as an edit. Of one block or of a scan over them: it keeps the scores that a
    block computed, for the same block's pattern."""
    frozen = [name for name in SITES if name.endswith("denominator")] if "norm" in rules else []
    freeze = Freeze([*frozen, *(["pattern"] if "attention" in rules else [])])
    scores: list[Array] = []

    def edit(place: Place, value: Array) -> Array:
        site = place.site
        if site == "attn_scores":
            scores[:] = [value]
        if "temperature" in rules and site == "pattern":
            value = soften(value, scores[0])
        if "product" in rules and site in ("queries", "keys", "values", "pattern"):
            value = scale_gradient(value, 0.5)
        if "identity" in rules and site == "logits" and config.logit_softcap is not None:
            value = scale_gradient(value, compare_slopes(value, config.logit_softcap))
        return value

    return Compose((edit, freeze))


def soften(pattern: Array, scores: Array) -> Array:
    """The pattern with the gradient p (g - p . g), where p is the pattern at a higher temperature."""
    masked = jnp.where(pattern > 0, scores / TEMPERATURE, jnp.finfo(scores.dtype).min)
    softer = TEMPERATURE * jax.nn.softmax(masked, axis=-1)
    return jax.lax.stop_gradient(pattern) + (softer - jax.lax.stop_gradient(softer)).astype(pattern.dtype)


def compare_slopes(capped: Array, cap: float) -> Array:
    """Of y = cap tanh(z / cap): y / z over dy / dz."""
    share = jax.lax.stop_gradient(capped.astype(at_least_float32(capped.dtype))) / cap
    tiny = jnp.abs(share) < SMALLEST
    share = jnp.clip(jnp.where(tiny, SMALLEST, share), -1 + SMALLEST, 1 - SMALLEST)
    return share / jnp.arctanh(share) / (1 - share * share)
