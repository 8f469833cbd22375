"""Rules of the backward pass: value x gradient over inputs and biases sums to the metric, and the controls do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import FOLDER
from more_cases import mark_others
from patching_prompts import get_pairs

import jclt
from jclt import UserError
from jclt.circuits.passes import measure_metric, pad_prompts, run_pass
from jclt.circuits.rules import RULE_SETS, make_activate, make_rules_edit, read_rules
from jclt.models import Compose

FAMILIES = ["gemma2", "gpt2", "gemma3", "llama3", "neox", "qwen3", "qwen2", "neox_sequential"]
INPUTS = ("token_embedding", "position_embedding")
LINEAR = read_rules("relp with attention")


def run_with_rules(model, prompts, rules, biases, shifts, capture=()):
    config, edit = model.config, make_rules_edit(model.config, rules)

    def add(place, value):
        return value + shifts[place.site] if place.site in shifts else value

    options = {"edit": Compose((add, edit)), "activate": make_activate(rules), "capture": capture}
    clean, last = jnp.asarray(prompts.clean), jnp.asarray(prompts.last)
    return run_pass(config, {**model.params, **biases}, clean, last, **options)


def explain(model, prompts, rules):
    """The metric of all pairs together, and the sum of value x gradient over the inputs and all biases."""
    biases = {name: x for name, x in model.params.items() if name.endswith("_bias")}
    inputs = tuple(name for name in INPUTS if name in model.params)
    answers = jax.tree.map(jnp.asarray, prompts.answers)

    def measure(biases, shifts):
        logits, seen = run_with_rules(model, prompts, rules, biases, shifts, inputs)
        return measure_metric("logit_difference", logits, answers).sum(), seen

    @jax.jit
    def explain_jitted():
        shape = (*prompts.clean.shape, model.config.width)
        nothing = {name: jnp.zeros(shape, model.params["token_embedding"].dtype) for name in inputs}
        (metric, seen), gradients = jax.value_and_grad(measure, (0, 1), has_aux=True)(biases, nothing)
        explained = [jnp.sum(x * gradients[0][name]) for name, x in biases.items()]
        return metric, sum(explained + [jnp.sum(x * gradients[1][name]) for name, x in seen.items()])

    return map(float, explain_jitted())


@pytest.mark.parametrize("name", mark_others(FAMILIES, ["gemma2", "gpt2"]))
def test_inputs_and_biases_explain_the_metric(name):
    """`gemma2` has gated neurons, post-norms, soft caps; `gpt2` has layer norms and biases everywhere."""
    with jax.enable_x64():
        model, prompts = jclt.load_model(FOLDER / name, dtype="float64"), pad_prompts(get_pairs(name))
        for rules in (LINEAR, read_rules("neuron graphs"))[: 1 + model.config.gated]:
            metric, explained = explain(model, prompts, rules)
            assert abs(explained - metric) <= 1e-12 * max(1, abs(metric)), rules


@pytest.mark.parametrize("without", ["norm", "attention", "identity", "half", "everything"])
def test_without_one_of_the_rules_they_do_not(without):
    name = {"half": "llama3"}.get(without, "gpt2")
    model, prompts = jclt.load_model(FOLDER / name), pad_prompts(get_pairs(name))
    rules = tuple(rule for rule in LINEAR if without not in (rule, "everything"))
    metric, explained = explain(model, prompts, rules)
    assert abs(explained - metric) > 0.01 * abs(metric)


@pytest.mark.parametrize("name", mark_others(FAMILIES, ["llama3"]))
def test_rules_leave_the_forward_pass_alone(name):
    model, prompts = jclt.load_model(FOLDER / name), pad_prompts(get_pairs(name))
    run = jax.jit(lambda rules: run_with_rules(model, prompts, rules, {}, {})[0], static_argnums=0)
    plain = run(())
    for rules in ("neuron circuits", "gim"):
        # The same numbers; a program with rules is fused differently, which moves last bits.
        np.testing.assert_allclose(run(RULE_SETS[rules]), plain, rtol=1e-6, atol=1e-6)


def test_a_softmax_at_temperature_two_and_halved_products_give_these_gradients():
    from jclt.circuits.rules import scale_gradient, soften

    with jax.enable_x64():
        scores, slopes = jax.random.normal(jax.random.key(0), (2, 1, 1, 4, 4))
        masked = jnp.where(jnp.tril(jnp.ones((4, 4), bool)), scores, -jnp.inf)
        pattern, softer = jax.nn.softmax(masked, axis=-1), jax.nn.softmax(masked / 2, axis=-1)
        got = jax.grad(lambda scores: jnp.sum(soften(pattern, scores) * slopes))(scores)
        want = softer * (slopes - jnp.sum(softer * slopes, axis=-1, keepdims=True))
        np.testing.assert_allclose(got, want, atol=1e-14)
        assert jax.grad(lambda x: scale_gradient(x, 0.25) ** 2)(3.0) == 1.5


def test_unknown_and_contradictory_rules_are_refused():
    assert read_rules("half") == ("half",) and read_rules(()) == () == RULE_SETS["none"]
    with pytest.raises(UserError, match=r"rule 'lrp': does not exist, expected one of: norm"):
        read_rules("lrp")
    with pytest.raises(UserError, match="both divide the gated product"):
        read_rules(("half", "gate"))
