"""The parts of a coder's training against closed forms: losses, schedules, scales, initial weights, shuffling."""

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from more_cases import mark_others

from jclt.coders import CoderConfig, SparseCoder, abstract_coder
from jclt.errors import UserError
from jclt.mesh import make_mesh
from jclt.models import ModelConfig, declare
from jclt.numerics import kl_divergence
from jclt.training.checkpoints import Checkpoints
from jclt.training.coder import losses
from jclt.training.coder.forms import activate_dense, exponentiate_thresholds, to_inference_form
from jclt.training.coder.harvest import Harvest, Scaling, find_silent_layers, fold_scaling, measure_scaling
from jclt.training.coder.initial import calibrate_bias, make_initial_weights
from jclt.training.coder.objective import encode_dense, prepare_weights
from jclt.training.coder.shuffle import fill_buffer, mix_batches
from jclt.training.coder.speed import count_coder_operations
from jclt.training.coder.state import CoderState
from jclt.training.coder.step import compute_gradients, train_step
from jclt.training.config import LmConfig, TrainConfig, check_ranges
from jclt.training.loop import Reporting, fit
from jclt.training.metrics import Log
from jclt.training.optimizers import (
    ADAM_SHARE,
    count_warmup_steps,
    make_coder_optimizer,
    make_lm_optimizer,
    make_rate_schedule,
)
from jclt.training.presets import CODER_PRESETS, LM_PRESETS

MODEL = ModelConfig("llama", 8, 6, 2, 1, 8, 16)  # never run: the batches are activations
PLAIN = TrainConfig(
    CoderConfig("clt", 8, layers=(0, 1), width=6),
    steps=10,
    sparsity="none",
    preactivation="none",
    normalize="none",
    warmup=0,
)


STEP = replace(  # one program for what is claimed of any step
    PLAIN,
    coder=replace(PLAIN.coder, skip=True),
    batch=4,
    length=10,
    dead_density=1e-2,
    sparsity="tanh",
    sparsity_ramp=0.5,
    optimizer="adam",
    beta1=0.9,
)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


# Penalties, in float64: values by a formula in numpy, gradients by that formula's finite differences.


def softmax(z: np.ndarray) -> np.ndarray:
    return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


def bernoulli_divergence(a: np.ndarray, density: float) -> float:
    p, q = density, np.tanh(a).mean(0)
    return sum(p * np.log(p / mean) + (1 - p) * np.log((1 - p) / (1 - mean)) for mean in q)


N, F = (7, 3), (5, 9)
SHAPES = list(zip(N, F, strict=True))
CASES = {
    "squared error": (
        losses.squared_error,
        lambda y, target: np.sum((y - target) ** 2) / len(y),
        lambda n, f: (normal(n, f), normal(n, f, seed=1)),
    ),
    "tanh": (
        lambda a, norms: losses.tanh_penalty(a, norms[None], 4.0, len(a)),
        lambda a, norms: np.mean([sum(np.tanh(4 * x * w) for x, w in zip(row, norms, strict=True)) for row in a]),
        lambda n, f: (np.abs(normal(n, f)), np.abs(normal(f, seed=1))),
    ),
    "l1": (
        lambda a, norms: losses.l1_penalty(a, norms[None], len(a)),
        lambda a, norms: (a @ norms).mean(),
        lambda n, f: (np.abs(normal(n, f)), np.abs(normal(f, seed=1))),
    ),
    "l0": (
        lambda active: losses.l0_penalty(active, 5.0),
        lambda active: 2 / 5 * (active - 5) ** 2,
        lambda n, f: (np.asarray(float(n + f)),),
    ),
    "kl": (
        lambda a: losses.kl_penalty(jnp.mean(jnp.tanh(a), axis=0), 0.03),
        lambda a: bernoulli_divergence(a, 0.03),
        lambda n, f: (np.abs(normal(n, f)),),
    ),
    "below threshold": (
        losses.below_threshold_penalty,
        lambda h, t, norms: np.mean([sum(max(b - x, 0) * w for x, b, w in zip(r, t, norms, strict=True)) for r in h]),
        lambda n, f: (normal(n, f), np.abs(normal(f, seed=1)), np.abs(normal(f, seed=2))),
    ),
    "below zero": (
        losses.below_zero_penalty,
        lambda h: -np.minimum(h, 0).sum() / len(h),
        lambda n, f: (normal(n, f),),
    ),
    "kl of logits": (
        lambda p, q: jnp.mean(kl_divergence(p, q)),
        lambda p, q: np.mean(np.sum(softmax(p) * (np.log(softmax(p)) - np.log(softmax(q))), -1)),
        lambda n, f: (normal(n, 2, f), normal(n, 2, f, seed=1)),
    ),
}


def finite_differences(function, arguments: tuple[np.ndarray, ...], which: int) -> np.ndarray:
    x, step, slopes = arguments[which], 1e-6, np.zeros_like(arguments[which])
    for index in np.ndindex(x.shape):
        around = []
        for sign in (1, -1):
            moved = x.copy()
            moved[index] += sign * step
            around.append(function(*arguments[:which], moved, *arguments[which + 1 :]))
        slopes[index] = (around[0] - around[1]) / (2 * step)
    return slopes


@cache
def differentiate_penalties(*shape: int) -> dict[str, tuple[np.ndarray, tuple[np.ndarray, ...]]]:
    """The value and the gradients of each penalty, from one program."""

    def differentiate(arguments: dict[str, tuple[jax.Array, ...]]) -> dict[str, Any]:
        return {
            name: jax.value_and_grad(CASES[name][0], tuple(range(len(placed))))(*placed)
            for name, placed in arguments.items()
        }

    with jax.enable_x64():
        return jax.device_get(jax.jit(differentiate)({name: make(*shape) for name, (*_, make) in CASES.items()}))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_a_penalty_is_its_closed_form_and_so_is_its_gradient(name, shape):
    _, formula, make = CASES[name]
    arguments = make(*shape)
    value, slopes = differentiate_penalties(*shape)[name]
    assert value.dtype == np.float64
    assert float(value) == pytest.approx(formula(*arguments), rel=1e-12)
    for which, got in enumerate(slopes):
        np.testing.assert_allclose(got, finite_differences(formula, arguments, which), rtol=1e-6, atol=1e-8)
        assert np.abs(got).max() > 1e-3


def test_the_end_to_end_loss_weighs_both_terms_alike():
    balance, by_kl = jax.jit(jax.value_and_grad(losses.balance_kl, 1))(jnp.asarray(3.0), jnp.asarray(0.2))
    assert float(balance) * 0.2 == pytest.approx(3.0)
    assert float(by_kl) == 0, "the balance is a constant to the gradient"


# The step's objective.


def random_coder(config: CoderConfig, seed: int = 0, dtype=np.float32) -> SparseCoder:
    """A random coder in its training form: JumpReLU has logarithms of thresholds."""
    rng = np.random.default_rng(seed)
    fill = lambda leaf: jnp.asarray((0.5 * rng.standard_normal(leaf.shape)).astype(dtype))  # noqa: E731
    return jax.tree.map(fill, abstract_coder(config))


def identity(config: CoderConfig) -> Scaling:
    shape = (len(config.covered), config.size)
    return Scaling(*(jnp.asarray(np.full(shape, value, np.float32)) for value in (0, 1) * 2))


def state_of(config: TrainConfig, coder: SparseCoder, step: int = 0, silent=None) -> CoderState:
    """All that an optimizer keeps begins at 0."""
    c, rule = config.coder, make_coder_optimizer(config)
    state = CoderState(
        step=np.int32(step),
        coder=coder,
        optimizer=jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(rule.init, coder)),
        scaling=identity(c),
        density=tuple(np.zeros(c.features, np.float32) for _ in c.covered),
        silent=silent or tuple(np.zeros(c.features, np.int32) for _ in c.covered),
        running=np.zeros(len(c.covered), np.float32),
        skipped=np.int32(0),
        skipped_in_row=np.int32(0),
        capacity=np.float32(0),
    )
    return jax.device_put(state)


def harvest_of(config: CoderConfig, seed: int = 0) -> Harvest:
    shape = (len(config.covered), 4, 10, config.size)
    return Harvest(*(jnp.asarray(np.float32(normal(*shape, seed=2 * seed + i))) for i in range(2)))


def batch_of(config: CoderConfig) -> Harvest:
    """The same as a batch from a store."""
    return with_rows_first(harvest_of(config))


def with_rows_first(harvest: Harvest) -> Harvest:
    return jax.tree.map(lambda x: jnp.asarray(np.moveaxis(x, 1, 0)), jax.device_get(harvest))


def flat(x: jax.Array) -> np.ndarray:
    return np.float64(x).reshape(x.shape[0], -1, x.shape[-1])


def gradient_of(config: TrainConfig, share: float, state: CoderState, harvest: Harvest) -> tuple[SparseCoder, dict]:
    return jax.jit(compute_gradients, static_argnums=(0, 1))(config, share, state, harvest, jnp.float32(1))


@pytest.mark.parametrize("shift", [-0.5, 0.5])
def test_the_l0_penalty_moves_thresholds_towards_its_target(shift):
    target = 4.0
    config = replace(PLAIN, sparsity="l0", target_l0=target, sparsity_weight=2.0)
    coder, harvest = random_coder(config.coder), harvest_of(config.coder)
    layers = tuple(
        replace(layer, threshold=jnp.asarray(np.asarray(layer.threshold) + np.float32(shift))) for layer in coder.layers
    )
    state = state_of(config, SparseCoder(layers, coder.config))
    got, report = jax.device_get(gradient_of(config, 0.0, state, harvest))
    active = float(sum(fired.sum() for fired in report["fired"]))
    assert (2 < active < 3) if shift > 0 else (5 < active < 6)
    for layer, slope, x in zip(state.coder.layers, got.layers, flat(harvest.reads), strict=True):
        h, t = x @ np.float64(layer.encoder).T + np.float64(layer.encoder_bias), np.exp(np.float64(layer.threshold))
        share_near = (np.abs(h - t) < 0.5).mean(0)
        want = -2.0 * 4 / target * (active - target) * share_near * t
        np.testing.assert_allclose(slope.threshold, want, rtol=1e-4, atol=1e-6)
        assert np.all(np.sign(slope.threshold)[share_near > 0] == np.sign(target - active))


def test_the_auxiliary_loss_trains_dead_features_alone():
    config = replace(PLAIN, auxiliary_weight=0.25, auxiliary_k=2, dead_density=1e-3)
    dead = np.zeros((2, 8), bool)
    dead[0, [1, 4, 6]] = dead[1, [0, 2, 7]] = True
    silent = tuple(np.where(is_dead, 1000, 999).astype(np.int32) for is_dead in dead)
    coder, harvest = random_coder(config.coder), harvest_of(config.coder)
    none = tuple(np.full(8, 999, np.int32) for _ in range(2))
    without, _ = gradient_of(replace(config, auxiliary_weight=0.0), 1.0, state_of(config, coder), harvest)
    alive, _ = gradient_of(config, 1.0, state_of(config, coder, silent=none), harvest)
    for a, b in zip(jax.tree.leaves(alive), jax.tree.leaves(without), strict=True):
        np.testing.assert_array_equal(a, b)  # nothing is dead: nothing is added
    both, _ = gradient_of(config, 1.0, state_of(config, coder, silent=silent), harvest)
    difference = jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), both, without)

    x, y = flat(harvest.reads), flat(harvest.writes).swapaxes(0, 1)
    h = [x_ @ np.float64(c.encoder).T + np.float64(c.encoder_bias) for x_, c in zip(x, coder.layers, strict=True)]
    a = [np.where(h_ > np.exp(np.float64(c.threshold)), h_, 0) for h_, c in zip(h, coder.layers, strict=True)]
    spare = [np.where(is_dead, np.maximum(h_, 0), 0) for h_, is_dead in zip(h, dead, strict=True)]
    spare = [np.where(x_ >= np.sort(x_, 1)[:, -2:].min(1, keepdims=True), x_, 0) for x_ in spare]
    wrote, tried = np.zeros_like(y), np.zeros_like(y)
    for source, c in enumerate(coder.layers):
        wrote[:, source:] += np.einsum("nf,frd->nrd", a[source], np.float64(c.decoder))
        wrote[:, source] += np.float64(c.decoder_bias)
        tried[:, source:] += np.einsum("nf,frd->nrd", spare[source], np.float64(c.decoder))
    gradient = 2 * 0.25 / len(y) * (tried - (y - wrote))
    for source, (c, slope) in enumerate(zip(coder.layers, difference.layers, strict=True)):
        np.testing.assert_allclose(
            slope.decoder, np.einsum("nf,nrd->frd", spare[source], gradient[:, source:]), atol=1e-5
        )
        to_h = np.einsum("nrd,frd->nf", gradient[:, source:], np.float64(c.decoder)) * (spare[source] > 0)
        np.testing.assert_allclose(slope.encoder, to_h.T @ x[source], atol=1e-5)
        np.testing.assert_allclose(slope.encoder_bias, to_h.sum(0), atol=1e-5)
        assert np.all(slope.threshold == 0) and np.all(slope.decoder_bias == 0)
        moved = np.abs(slope.decoder).max((1, 2))
        assert np.all(moved[~dead[source]] == 0) and np.all(moved[dead[source]] > 1e-4)


@pytest.mark.parametrize(("ramp", "at_half"), mark_others([(1.0, 0.5), (0.5, 1.0)], [(0.5, 1.0)]))
def test_sparsity_grows_from_nothing_over_its_share_of_the_run(ramp, at_half):
    config = replace(STEP, sparsity_ramp=ramp)
    batch = batch_of(config.coder)
    seen = {}
    for step in (0, 4, 9):
        state = state_of(config, random_coder(config.coder), step)
        seen[step] = train_step(config, MODEL, False, state, None, {}, batch)[2]
    assert [float(seen[step]["ramp"]) for step in (0, 4, 9)] == pytest.approx([0.1 / ramp, at_half, 1.0])
    assert float(seen[9]["penalty"]) > 0.1
    for step in (0, 4):
        full = float(seen[9]["penalty"])
        assert float(seen[step]["penalty"]) == pytest.approx(float(seen[step]["ramp"]) * full, rel=1e-5)


# Steps that are no numbers.


def test_a_step_without_a_number_changes_nothing_but_its_count():
    good = batch_of(STEP.coder)
    bad, infinite = np.array(good.reads), np.array(good.writes)
    bad[1, 0, 3, 2], infinite[0, 0, 0, 0] = np.nan, np.inf
    bad, infinite = Harvest(jnp.asarray(bad), good.writes), Harvest(good.reads, jnp.asarray(infinite))

    def step(state: CoderState, batch: Harvest) -> CoderState:
        return train_step(STEP, MODEL, False, state, None, {}, batch)[0]

    state = step(state_of(STEP, random_coder(STEP.coder)), good)
    before = jax.device_get(state)
    counts = []
    for batch in (bad, bad, good, bad, infinite):
        state = step(state, batch)
        counts.append((int(state.step), int(state.skipped), int(state.skipped_in_row)))
        after = jax.device_get(state)
        unchanged = [(old, new) for old, new in zip(before[1:7], after[1:7], strict=True)]
        same = [
            np.array_equal(a, b)
            for old, new in unchanged
            for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
        ]
        if batch is good:
            assert not all(same) and all(np.isfinite(x).all() for x in jax.tree.leaves(after))
        else:
            assert all(same)
        before = after
    assert counts == [(2, 1, 1), (3, 2, 2), (4, 2, 0), (5, 3, 1), (6, 4, 2)]


# Dead features.


def test_a_feature_is_dead_when_it_was_silent_for_so_many_tokens_and_unknown_before():
    def move_biases(coder: SparseCoder, by: np.ndarray) -> SparseCoder:
        layers = (
            replace(layer, encoder_bias=jnp.asarray(np.asarray(layer.encoder_bias) + np.float32(by)))
            for layer in coder.layers
        )
        return SparseCoder(tuple(layers), coder.config)

    never, always = -1e4 * (np.arange(8) == 3), 1e4 * (np.arange(8) == 5)
    coder, batch = random_coder(STEP.coder), batch_of(STEP.coder)
    state, dead = state_of(STEP, move_biases(coder, never + always)), []
    for tokens in (40, 80, 100, 100):
        state, _, values = train_step(STEP, MODEL, False, state, None, {}, batch)
        silent = jax.device_get(state.silent)
        assert all(silence[3] == tokens and silence[5] == 0 for silence in silent)
        dead.append(float(values["dead"]))
        # Its density is known from the first step on, and so is that of the one that always fires.
        histogram = np.asarray(values["density_histogram"])
        assert histogram[0] >= 1 / 8 and histogram[-1] >= 1 / 8 and histogram.sum() == pytest.approx(1)
    assert np.isnan(dead[:2]).all() and dead[2] == dead[3] == float(np.mean([silence >= 100 for silence in silent])) > 0
    # A dead feature that fires again is none.
    again = state._replace(coder=move_biases(state.coder, -2 * never))
    state, _, _ = train_step(STEP, MODEL, False, again, None, {}, batch)
    assert all(silence[3] == 0 for silence in jax.device_get(state.silent))


# Layers that write nothing.


def test_a_layer_that_writes_nothing_counts_in_no_mean_and_is_named():
    harvest = harvest_of(STEP.coder)
    harvest = Harvest(harvest.reads, jnp.asarray(np.asarray(harvest.writes) * np.float32([[[[1]]], [[[0]]]])))
    for normalize in ("centre", "scale", "standardize"):
        scaling = measure_scaling(lambda _: harvest, 2, normalize, (2, 6))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(scaling)) and np.all(
            np.asarray(scaling.write_scale) > 0
        )
        assert np.all(np.asarray(scaling.write_scale[1]) == 1) and find_silent_layers(scaling) == [1]
    assert find_silent_layers(identity(PLAIN.coder)) == []  # none was measured
    state, batch = state_of(STEP, random_coder(STEP.coder)), with_rows_first(harvest)
    values = jax.device_get(train_step(STEP, MODEL, False, state, None, {}, batch)[2])
    assert values["layers_nmse"][1] == 0 and values["nmse"] == values["layers_nmse"][0] > 0
    assert values["explained"] == values["layers_explained"][0] < 1


# Rates and optimizers.


def test_muon_decays_what_adamw_decays_and_as_much():
    """Without a gradient, only decay changes weights: by rate times decay, under Muon Adam's weights by their share."""
    model = ModelConfig("gpt2", 8, 4, 1, 2, 8, 8, norm="layer", gated=False, qkv_bias=True, mlp_bias=True)
    config = LmConfig(model, steps=50, warmup=0, learning_rate=0.1, weight_decay=0.2)
    params = {name: np.ones(weight.shape, np.float32) for name, weight in declare(model).items()}
    shrunk = {}
    for name in ("adamw", "muon"):
        rule = make_lm_optimizer(replace(config, optimizer=name))

        @jax.jit
        def move(params: Any, rule: Any = rule) -> Any:
            return rule.update(jax.tree.map(jnp.zeros_like, params), rule.init(params), params)[0]

        with jax.numpy_dtype_promotion("standard"):
            moved = jax.device_get(move(params))
        shrunk[name] = {weight: -float(np.abs(x).max()) for weight, x in moved.items()}
    assert {weight for weight, x in shrunk["muon"].items() if x == 0} == {
        weight for weight, x in shrunk["adamw"].items() if x == 0
    }
    for weight, x in shrunk["adamw"].items():
        decayed = not weight.endswith(("_gain", "_bias"))
        assert x == pytest.approx(-0.1 * 0.2 * decayed)
        assert shrunk["muon"][weight] == pytest.approx(x * (ADAM_SHARE if "embedding" in weight else 1)), weight


def test_a_short_run_warms_up_for_a_fifth_of_it():
    short = replace(PLAIN, steps=40, warmup=100, learning_rate=1.0, decay=0.0)
    assert count_warmup_steps(short) == 8 and count_warmup_steps(replace(short, steps=3)) == 0
    with jax.numpy_dtype_promotion("standard"):
        assert [float(make_rate_schedule(short)(step)) for step in (0, 4, 8, 39)] == [0, 0.5, 1, 1]
    for preset in (*LM_PRESETS.values(), *CODER_PRESETS.values()):
        assert count_warmup_steps(preset()) == preset().warmup


TOPK = replace(PLAIN, coder=replace(PLAIN.coder, activation="topk", k=2), sparsity="auto")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"steps": 0}, "'steps': 0, expected at least 1"),
        ({"length": 1}, "'length': 1, expected at least 2"),
        ({"shuffle": True}, "'shuffle': True, expected a whole number"),
        ({"seed": -1}, "'seed': -1, expected 0 to 4294967295"),
        ({"seed": 2**32}, "'seed': 4294967296, expected 0 to 4294967295"),
        ({"learning_rate": -1.0}, "'learning_rate': -1.0, expected more than 0"),
        ({"learning_rate": float("nan")}, "'learning_rate': nan, expected a number"),
        ({"clip": float("inf")}, "'clip': inf, expected a number"),
        ({"clip": 0.0}, "'clip': 0.0, expected more than 0"),
        ({"beta1": 1.0}, "'beta1': 1.0, expected at least 0 and less than 1"),
        ({"beta2": -0.1}, "'beta2': -0.1, expected at least 0 and less than 1"),
        ({"headroom": -1.0}, "'headroom': -1.0, expected at least 1"),
        ({"dead_density": 0.0}, "'dead_density': 0.0, expected 1e-9 to 1"),
        ({"decay": 1.5}, "'decay': 1.5, expected 0 to 1"),
        ({"threshold": 0.0}, "'threshold': 0.0, expected more than 0"),
        ({"warmup": -1}, "'warmup': -1, expected at least 0"),
        ({"evaluate_every": -2}, "'evaluate_every': -2, expected at least -1"),
        ({"weight_decay": 0.5}, "'weight_decay': 0.5, expected 0 under optimizer=adam, or optimizer=adamw"),
        (
            {"sparsity_weight": 0.5, "coder": TOPK.coder, "sparsity": "auto"},
            "'sparsity_weight': 0.5, expected setting 'sparsity' as well: under coder.activation=topk there is no "
            "penalty by default",
        ),
    ],
)
def test_a_number_that_no_run_can_work_with_is_refused_in_one_line(change, line):
    with pytest.raises(UserError) as error:
        check_ranges(replace(PLAIN, **change))
    assert str(error.value) == f"setting {line}"


def test_what_runs_can_work_with_passes():
    for config in (PLAIN, TOPK, replace(PLAIN, optimizer="adamw", weight_decay=0.5), replace(PLAIN, evaluate_every=-1)):
        check_ranges(config)
    for preset in (*LM_PRESETS.values(), *CODER_PRESETS.values()):
        check_ranges(preset())
    with pytest.raises(UserError, match="setting 'text_weight': -1.0, expected at least 0"):
        check_ranges(replace(LM_PRESETS["small-world"](), text_weight=-1.0))


def test_the_largest_activations_pay_no_penalty_unless_asked():
    assert (TOPK.sparsity_term, replace(TOPK, sparsity="l1").sparsity_term) == ("none", "l1")
    assert replace(PLAIN, sparsity="auto").sparsity_term == "tanh"
    x = tuple(jnp.asarray(np.float32(normal(40, 6, seed=layer))) for layer in range(2))
    silent = tuple(jnp.asarray(np.zeros(8, np.int32)) for _ in x)

    @jax.jit
    def compute_penalties(coder: SparseCoder) -> list[jax.Array]:
        weights, ramp, configs = prepare_weights(coder), jnp.ones(()), (TOPK, replace(TOPK, sparsity="tanh"))
        return [encode_dense(config, weights, x, silent, ramp).penalty for config in configs]

    unasked, asked = compute_penalties(random_coder(TOPK.coder))
    assert unasked == 0 and asked > 0.1


@pytest.mark.parametrize(
    ("change", "rates"),
    [
        ({}, {0: 0, 5: 0.5, 10: 1, 79: 1, 80: 1, 90: 0.5, 100: 0}),
        ({"decay": 0.5}, {10: 1, 50: 1, 75: 0.5, 99: 0.02, 100: 0}),
        ({"decay": 1.0}, {5: 0.5, 10: 1, 55: 0.5, 100: 0}),
        ({"decay": 0.0}, {10: 1, 99: 1}),
        ({"warmup": 0}, {0: 1, 80: 1, 100: 0}),
        ({"schedule": "constant"}, {0: 0, 5: 0.5, 10: 1, 100: 1}),
        ({"schedule": "cosine"}, {0: 0, 10: 1, 55: 0.5, 32.5: (1 + 0.5**0.5) / 2, 100: 0}),
    ],
)
def test_the_learning_rate_turns_where_it_should(change, rates):
    config = replace(PLAIN, **{"steps": 100, "warmup": 10, "learning_rate": 3.0} | change)
    with jax.numpy_dtype_promotion("standard"):
        got = [float(make_rate_schedule(config)(step)) for step in rates]
    np.testing.assert_allclose(got, 3 * np.array(list(rates.values())), atol=1e-6)


OPTIMIZERS = ["adam", "adamw", "adafactor"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_every_optimizer_lowers_a_quadratic(name, beta1):
    config = replace(PLAIN, optimizer=name, beta1=beta1, learning_rate=0.02, schedule="constant", weight_decay=0.0)
    rule = make_coder_optimizer(config)
    target = np.float32(normal(6, 4))

    @jax.jit
    def descend(params: Any) -> list[jax.Array]:
        state, seen = rule.init(params), []
        for _ in range(5):
            seen.append(jnp.sum((params["w"] - target) ** 2))
            moved, state = rule.update({"w": 2 * (params["w"] - target)}, state, params)
            params = optax.apply_updates(params, moved)
        return seen

    with jax.numpy_dtype_promotion("standard"):
        seen = jax.device_get(descend({"w": target + np.float32(np.sign(normal(6, 4, seed=1)))}))
    assert np.all(np.diff(seen) < -1e-4 * seen[0])
    assert seen[0] == pytest.approx(24)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_moment_is_kept_in_its_type(name, dtype):
    config = replace(PLAIN, optimizer=name, beta1=0.9, moment_dtype=dtype)
    params = {"w": jax.ShapeDtypeStruct((6, 4), jnp.float32)}
    rule = make_coder_optimizer(config)
    state = jax.eval_shape(rule.init, params)
    with jax.numpy_dtype_promotion("standard"):
        _, after = jax.eval_shape(rule.update, params, state, params)
    for checked_state in (state, after):
        sizes = [x.dtype for x in jax.tree.leaves(checked_state) if x.shape == (6, 4)]
        assert sizes.count(jnp.dtype(dtype)) >= 1
        assert dtype == "float32" or sizes.count(jnp.dtype("float32")) == len(sizes) - 1


def test_gradients_are_clipped_to_their_length():
    """Checked by the second moment, which is the mean of the squared gradients."""
    config = replace(PLAIN, optimizer="adam", beta1=0.0, beta2=0.75, schedule="constant", clip=0.5)
    rule, params = make_coder_optimizer(config), {"w": np.zeros(2, np.float32)}
    update = jax.jit(lambda gradient: rule.update({"w": gradient}, rule.init(params), params))
    for gradient, clipped in (([3.0, 4.0], [0.3, 0.4]), ([0.1, 0.2], [0.1, 0.2])):
        with jax.numpy_dtype_promotion("standard"):
            _, state = update(np.float32(gradient))
        (moment,) = [x for x in jax.tree.leaves(state) if x.shape == (2,)]
        np.testing.assert_allclose(moment, 0.25 * np.square(clipped), rtol=1e-6)


# Scales.


def measure_batch(normalize: str) -> tuple[Scaling, np.ndarray, np.ndarray]:
    values = 3 * normal(4, 2, 2, 3, 5, 6) + normal(1, 2, 2, 1, 1, 6, seed=1)  # batch, site, layer, B, T, D
    values[:, 0, 1, :, :, 2] = 3.3  # a dimension that never changes
    batches = [Harvest(*(jnp.asarray(x) for x in batch)) for batch in np.float32(values)]
    scaling = measure_scaling(lambda i: batches[i], len(batches), normalize, (2, 6))
    reads, writes = np.moveaxis(values, 1, 0).swapaxes(1, 2).reshape(2, 2, -1, 6)
    return scaling, reads, writes


def test_scales_bring_each_layers_mean_square_to_one():
    scaling, reads, writes = measure_batch("scale")
    for scale, mean, x in (
        (scaling.read_scale, scaling.read_mean, reads),
        (scaling.write_scale, scaling.write_mean, writes),
    ):
        want = np.sqrt((x**2).mean((1, 2)))[:, None] * np.ones((2, 6))
        np.testing.assert_allclose(scale, want, rtol=1e-5)
        assert np.all(np.asarray(mean) == 0)


def test_centring_brings_each_dimension_to_mean_zero_and_each_layer_to_variance_one():
    scaling, reads, writes = measure_batch("centre")
    for scale, mean, x in (
        (scaling.read_scale, scaling.read_mean, reads),
        (scaling.write_scale, scaling.write_mean, writes),
    ):
        np.testing.assert_allclose(mean, x.mean(1), rtol=1e-4, atol=1e-6)
        want = np.sqrt(x.var(1).mean(1))[:, None] * np.ones((2, 6))
        np.testing.assert_allclose(scale, want, rtol=1e-4)


def test_standardising_brings_each_dimension_to_mean_zero_and_variance_one():
    scaling, reads, writes = measure_batch("standardize")
    np.testing.assert_allclose(scaling.read_mean, reads.mean(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scaling.write_scale, writes.std(1), rtol=1e-4)
    want = reads.std(1)
    want[1, 2] = 1e-3 * want[1].max()  # the one that never changes is not blown up, nor a NaN
    np.testing.assert_allclose(scaling.read_scale, want, rtol=1e-3)
    none = measure_batch("none")[0]
    assert np.all(np.asarray(none.read_scale) == 1) and np.all(np.asarray(none.write_mean) == 0)


@jax.jit
def fold_and_run(coder: SparseCoder, scaling: Scaling, raw: list[jax.Array], scaled: list[jax.Array]) -> tuple:
    """The folded coder, the activations of both coders, and what both write."""
    coders, xs = (fold_scaling(coder, scaling), coder), (raw, scaled)
    a = [[c.encode(layer, x_) for layer, x_ in enumerate(x)] for c, x in zip(coders, xs, strict=True)]
    written = [[c.write(i, a_, x_) for i, x_ in enumerate(x)] for c, a_, x in zip(coders, a, xs, strict=True)]
    return coders[0], a, written


@pytest.mark.parametrize("means", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        CoderConfig("clt", 8, layers=(0, 1, 3), width=6, skip=True),
        CoderConfig("transcoder", 8, activation="topk", k=3, layers=(0, 1, 3), width=6, skip=True),
        CoderConfig("sae", 8, layers=(0, 1), width=6, tied=True, reads="resid_post", writes="resid_post"),
    ],
    ids=["clt", "transcoder", "tied sae"],
)
def test_a_folded_coder_does_on_raw_activations_what_it_does_on_scaled_ones(config, means):
    layers = len(config.covered)
    parts = [np.exp(normal(layers, 6, seed=i)) if i % 2 else means * normal(layers, 6, seed=i) for i in range(4)]
    read_mean, read_scale, write_mean, write_scale = parts
    raw = 2 * normal(layers, 20, 6, seed=9) + read_mean[:, None]
    scaled = (raw - read_mean[:, None]) / read_scale[:, None]
    with jax.enable_x64():
        coder = exponentiate_thresholds(random_coder(config, dtype=np.float64))
        scaling = Scaling(*(jnp.asarray(part) for part in parts))
        folded, a, written = jax.device_get(fold_and_run(coder, scaling, list(raw), list(scaled)))
    for layer in range(layers):
        np.testing.assert_allclose(a[0][layer], a[1][layer], atol=1e-12)
        assert np.any(a[1][layer] > 0)
        want = written[1][layer] * write_scale[layer] + write_mean[layer]
        np.testing.assert_allclose(written[0][layer], want, atol=1e-11)
        if config.activation == "jumprelu":
            np.testing.assert_array_equal(folded.layers[layer].threshold, coder.layers[layer].threshold)
    assert folded.config == replace(config, tied=False)


# Starts.


def is_uniform(x: np.ndarray, bound: float) -> bool:
    """Whether all values are within the bound and each tenth holds its share, to four deviations."""
    shares = np.array([(np.asarray(x) < bound * (t / 5 - 1)).mean() for t in range(1, 10)])
    wanted = np.arange(1, 10) / 10
    near = np.abs(shares - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / x.size)
    return bool(np.abs(x).max() <= bound and near.all())


@pytest.mark.parametrize("initial", ["clt", "transposed"])
def test_initial_weights_are_the_published_ones(initial):
    features, width = 128, 24
    coder = CoderConfig("clt", features, layers=(0, 1, 2), width=width)
    config = replace(PLAIN, coder=coder, initial=initial, threshold=0.07)
    weights = jax.device_get(make_initial_weights(config, make_mesh(1, 1)))
    decoder_bound = (3 * width) ** -0.5
    for index, layer in enumerate(weights.layers):
        assert layer.decoder.shape == (features, 3 - index, width) and is_uniform(layer.decoder, decoder_bound)
        assert np.all(layer.encoder_bias == 0) and np.all(layer.decoder_bias == 0)
        np.testing.assert_allclose(np.exp(layer.threshold), 0.07, rtol=1e-6)
        rows = layer.decoder[:, 0]
        if initial == "clt":
            assert is_uniform(layer.encoder, features**-0.5)
            assert abs(np.corrcoef(layer.encoder.ravel(), rows.ravel())[0, 1]) < 0.1
        else:
            np.testing.assert_allclose(np.linalg.norm(layer.encoder, axis=1), 1, rtol=1e-5)
            np.testing.assert_allclose(np.sum(layer.encoder * rows, 1), np.linalg.norm(rows, axis=1), rtol=1e-5)
    first, second = (weights.layers[layer].encoder for layer in (0, 1))
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.1
    if initial == "clt":
        other = make_initial_weights(replace(config, seed=1), make_mesh(1, 1))
        assert not np.array_equal(other.layers[0].encoder, first)


@pytest.mark.parametrize("density", [0.001, 0.05, 0.5, 0.9])
def test_calibrated_features_fire_on_just_the_asked_share_of_tokens(density):
    """Also if pre-activations are far from zero, so that their differences are close to the rounding."""
    for spread, offset in ((1.0, 0.0), (5.0, -300.0), (1e-3, 7.0)):
        h = np.float32(spread * normal(1000, 16) + offset)
        bias = np.asarray(jax.jit(calibrate_bias, static_argnums=2)(h, np.full(16, 0.03, np.float32), density))
        assert bias.dtype == np.float32
        fired = (h + bias > np.float32(0.03)).sum(0)
        distinct = [len(np.unique(column)) for column in h.T]
        slack = 0 if min(distinct) == 1000 else 1
        assert np.all(np.abs(fired - round(density * 1000)) <= slack), fired


# Rules at inference, and counts.


def test_batch_top_k_is_a_jump_relu_at_inference():
    config = CoderConfig("clt", 8, activation="batchtopk", k=3, layers=(0, 1), width=6)
    coder = random_coder(config)
    x = [np.float32(normal(40, 6, seed=layer)) for layer in range(2)]

    @jax.jit
    def encode_in_both_forms(coder: SparseCoder, x: list[jax.Array]) -> tuple:
        h = tuple(coder.compute_preactivation(layer, x_) for layer, x_ in enumerate(x))
        activations, least = activate_dense(coder, h, tuple(layer.norms for layer in coder.layers))
        # The least of what is kept defines the threshold; a hair below it everything kept is above.
        forms = to_inference_form(coder, least * (1 - 1e-6)), to_inference_form(coder, least)
        return forms[0], activations, [[c.encode(layer, x_) for layer, x_ in enumerate(x)] for c in forms]

    after, activations, (below, at_threshold) = jax.device_get(encode_in_both_forms(coder, x))
    assert after.config == replace(config, activation="jumprelu", k=None)
    np.testing.assert_array_equal(below, activations)
    assert sum(int((a > 0).sum()) for a in activations) == 3 * 40
    # At the thresholds themselves nothing but that one value of each layer can differ: the gate is strict.
    assert np.all(np.sum(np.stack(at_threshold) != np.stack(activations), axis=(1, 2)) <= 1)


@pytest.mark.parametrize(
    ("layers", "width", "features", "tokens"), [(1, 3, 5, 7), (4, 16, 32, 11), (12, 768, 4096, 2048)]
)
def test_a_cross_layer_transcoders_step_costs_so_many_operations(layers, width, features, tokens):
    config = CoderConfig("clt", features, layers=tuple(range(layers)), width=width)
    assert count_coder_operations(config, tokens) == tokens * width * features * layers * (3 * layers + 7)
    # Encoder: forward and weights; each of the decoders: forward, activations and weights; 2 for each product.
    operations = sum(2 * 2 + 3 * 2 * (layers - source) for source in range(layers)) * tokens * width * features
    assert count_coder_operations(config, tokens) == operations
    assert count_coder_operations(replace(config, kind="transcoder"), tokens) == tokens * width * features * layers * 10


# Shuffling.

AGES, POSITIONS = 3, 12


def number_tokens(number: int) -> Harvest:
    """A batch whose activations encode their batch, row and position, at both sites and in every layer."""
    b, t = np.meshgrid(np.arange(2), np.arange(POSITIONS), indexing="ij")
    tag = np.broadcast_to(np.stack([np.full_like(b, number), b, t], -1), (2, 2, POSITIONS, 3))
    return Harvest(jnp.asarray(np.float32(tag)), jnp.asarray(np.float32(10.0 + tag)))


SHUFFLED = 8


@cache
def shuffle_batches(start: int) -> tuple[list[Harvest], list[Harvest]]:
    """The batch of each step from `start` to the last, and the buffer after it."""
    mix_step = jax.jit(mix_batches, static_argnums=3)
    buffer, got, buffers = fill_buffer(number_tokens, start, AGES, seed=5), [], []
    for step in range(start, SHUFFLED):
        number = step + AGES - 1
        buffer, mix = mix_step(buffer, number_tokens(number), jnp.int32(number), 5)
        got.append(jax.device_get(mix))
        buffers.append(jax.device_get(buffer))
    return got, buffers


def test_shuffling_hands_out_every_token_once_from_several_batches():
    got, _ = shuffle_batches(0)
    counts: dict[tuple[int, ...], int] = {}
    for step, mix in enumerate(got):
        assert mix.reads.shape == (2, 2, POSITIONS, 3)
        np.testing.assert_array_equal(mix.writes, mix.reads + 10)
        np.testing.assert_array_equal(mix.reads[0], mix.reads[1])
        tags = mix.reads[0].reshape(-1, 3).astype(int)
        batches, share = np.unique(tags[:, 0], return_counts=True)
        assert batches.tolist() == [step, step + 1, step + 2] and len(set(share)) == 1
        for tag in map(tuple, tags.tolist()):
            counts[tag] = counts.get(tag, 0) + 1
    assert set(counts.values()) == {1}
    # Batches that came in after the first step and have left before the last one were seen whole.
    for number in range(AGES - 1, SHUFFLED):
        assert sum(tag[0] == number for tag in counts) == 2 * POSITIONS
    orders = [tuple(mix.reads[0, 0, : POSITIONS // AGES, 2].astype(int)) for mix in got]
    assert len(set(orders)) == SHUFFLED and tuple(range(POSITIONS // AGES)) not in orders


@pytest.mark.parametrize("start", mark_others([1, 2, 5], [2]))
def test_a_refilled_buffer_goes_on_bit_for_bit(start):
    got, buffers = shuffle_batches(0)
    again, refilled = shuffle_batches(start)
    for actual, want in zip((*again, *refilled), (*got[start:], *buffers[start:]), strict=True):
        np.testing.assert_array_equal(actual.reads, want.reads)
        np.testing.assert_array_equal(actual.writes, want.writes)


# The loop, when steps are no numbers.


class Counting(NamedTuple):
    step: jax.Array
    weight: jax.Array


def test_the_loop_stops_after_so_many_bad_steps_in_a_row_and_keeps_the_state_from_before(tmp_path):
    bad = {3, 4, 5, *range(8, 20)}  # three in a row pass, the fourth does not
    reached = []

    def advance(step: int, state: Counting, batch: int) -> tuple[Counting, dict[str, jax.Array]]:
        assert step == batch == int(state.step)
        reached.append(step)
        weight = state.weight if step in bad else state.weight + 1.5
        return Counting(state.step + 1, weight), {"loss": jnp.float32(np.nan if step in bad else 1.0)}

    start = Counting(jnp.int32(0), jnp.zeros(()))
    with Checkpoints(str(tmp_path / "checkpoints")) as checkpoints, Log(tmp_path, 0) as metrics:
        with pytest.raises(UserError) as error:
            fit(
                start,
                advance,
                lambda step: step,
                steps=30,
                checkpoints=checkpoints,
                metrics=metrics,
                reporting=Reporting(describe=str, every=1),
                save_every=100,
                skips=3,
            )
    message = "loss is nan at step 12, for the 4th step in a row; the newest checkpoint is of step 13"
    assert str(error.value) == message
    assert max(reached) <= 12  # metrics come one step late
    with Checkpoints(str(tmp_path / "checkpoints")) as checkpoints:
        restored = checkpoints.restore(start)
    assert restored is not None and float(restored.weight) == 1.5 * 5
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 11
