"""The measures of a coder: closed forms, the neurons that make no error, a coder that writes nothing, and any mesh."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jclt
from jclt.coders import AXES, CoderConfig, Neurons, SparseCoder, declare, neurons
from jclt.errors import UserError
from jclt.evaluation import (
    Reconstruction,
    evaluate_reconstruction,
    evaluate_replacement,
    mean_writes,
    replaced_logits,
    state_exchange,
    world_agreement,
)
from jclt.evaluation.exchange import largest
from jclt.evaluation.features import with_features
from jclt.evaluation.reconstruction import Moments, joined, moments
from jclt.evaluation.world import accuracy, agreement, mean_prompt_writes, task_agreement
from jclt.models import Model, Replace
from jclt.sharding import sharding
from jclt.world import TASKS
from jclt.world.facts import STATES
from jclt.world.measure import padded

BATCH = 16


@pytest.fixture(scope="module")
def model() -> Model:
    return jclt.load_model("demo")


@pytest.fixture(scope="module")
def prompts(model) -> tuple[np.ndarray, np.ndarray]:
    """Token rows and a mask that leaves out the padding."""
    examples = [example.prompt for task in TASKS.values() for example in task.examples("choose", 2, seed=0)]
    tokens, ends = padded(model, examples)
    return tokens, np.arange(tokens.shape[1])[None] <= ends[:, None]


def random_coder(model: Model, mesh=None, **settings) -> SparseCoder:
    config = CoderConfig(**({"features": 64} | settings)).fitted(model.config, "demo")
    random = np.random.default_rng(0)

    def leaf(name: str, shape: tuple[int, ...]) -> jax.Array:
        where = sharding(mesh, shape, AXES[name]) if mesh else None
        return jax.device_put(random.normal(size=shape).astype(np.float32) / 10, where)

    return declare(config, leaf)


def constant_coder(model: Model, writes: np.ndarray) -> SparseCoder:
    """Features that never fire, and these vectors as biases."""
    config = CoderConfig(features=4).fitted(model.config, "demo")
    biases = iter(writes)
    return declare(
        config, lambda name, shape: jnp.asarray(next(biases)) if name == "decoder_bias" else jnp.zeros(shape)
    )


# ---------------------------------------------------------------- reconstruction


def test_moments_of_parts_join_to_those_of_the_whole():
    x = np.random.default_rng(0).normal(100, 1, (2, 6, 5, 3)).astype(np.float32)
    mask = np.random.default_rng(1).random((6, 5)) < 0.7
    parts = [moments(jnp.asarray(x[:, part]), jnp.asarray(mask[part])) for part in (slice(0, 1), slice(1, 6))]
    found = joined(*(Moments(*(np.asarray(leaf, np.float64) for leaf in part)) for part in parts))
    kept = x[:, mask].astype(np.float64)
    assert found.number == mask.sum()
    np.testing.assert_allclose(found.mean, kept.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(found.spread, kept.var(axis=1).sum(axis=-1) * mask.sum(), rtol=1e-4)


def test_figures_follow_from_the_sums():
    found = Reconstruction(
        layers=(1, 3),
        tokens=10,
        error=np.array([1.0, 3.0]),
        centred_error=np.array([0.5, 3.0]),
        spread=np.array([2.0, 30.0]),
        density=np.array([[0.0, 0.1, 1.0], [0.0, 0.0, 0.2]]),
        mean_activation=np.zeros((2, 3)),
    )
    np.testing.assert_allclose(found.nmse, [0.5, 0.1])
    np.testing.assert_allclose(found.explained_variance, [0.75, 0.9])
    np.testing.assert_array_equal(found.histogram, [[1, 0, 0, 0, 0, 1, 1], [2, 0, 0, 0, 0, 0, 1]])
    summary = found.summary()
    assert summary["nmse"] == pytest.approx(0.3) and summary["explained_variance"] == pytest.approx(0.825)
    assert summary["l0"] == pytest.approx(1.3) and summary["dead"] == pytest.approx(0.5)
    assert summary["nmse_3"] == pytest.approx(0.1) and summary["dead_1"] == pytest.approx(1 / 3)
    assert len(found.table().splitlines()) == 4


def test_a_constant_offset_costs_error_but_no_explained_variance(model, prompts):
    own = neurons(model)
    shifted = Neurons({**own.params, "down_bias": own.params["down_bias"] + 1.0}, own.model, own.config)
    found = evaluate_reconstruction(model, shifted, *prompts[:1], mask=prompts[1], batch=BATCH)
    np.testing.assert_allclose(found.error, found.tokens * model.config.width, rtol=1e-4)
    np.testing.assert_allclose(found.explained_variance, 1, atol=1e-6)


def test_planted_densities_are_found_whatever_the_batches_and_the_padding(model, prompts):
    coder = random_coder(model)
    bias = jnp.concatenate([jnp.full(16, -1e4), jnp.full(16, 1e4), jnp.zeros(32)])
    coder = declare(coder.config, lambda name, shape: {"encoder_bias": bias}.get(name, jnp.full(shape, 0.1)))
    tokens, mask = prompts
    found = evaluate_reconstruction(model, coder, tokens, mask=mask, batch=BATCH)
    assert found.tokens == mask.sum()
    assert (found.density[:, :16] == 0).all() and (found.density[:, 16:32] == 1).all()
    assert (found.dead >= 0.25).all()
    np.testing.assert_allclose(found.mean_activation[:, 16:32], 1e4, rtol=0.01)
    junk = np.where(mask, tokens, 7)
    again = evaluate_reconstruction(model, coder, junk, mask=mask, batch=5)
    np.testing.assert_allclose(again.density, found.density)
    np.testing.assert_allclose(again.nmse, found.nmse, rtol=1e-5)


# ---------------------------------------------------------------- the replacement model


def test_neurons_make_no_error(model, prompts):
    tokens, mask = prompts
    basis = neurons(model)
    assert (evaluate_reconstruction(model, basis, tokens, mask=mask, batch=BATCH).nmse < 1e-9).all()
    found = evaluate_replacement(model, basis, tokens, mask=mask, batch=BATCH)
    assert found.agreement == 1 and abs(found.kl) < 1e-9 and found.recovered == pytest.approx(1, abs=1e-6)
    assert found.ablated_agreement < 0.6 and found.ablated_kl > 1 and found.tokens == mask.sum()
    assert "recovered" in found.table()


def test_replacement_figures_are_those_of_the_logits(model, prompts):
    tokens, mask = prompts
    coder = random_coder(model, kind="transcoder", activation="topk", k=4)
    found = evaluate_replacement(model, coder, tokens, mask=mask, batch=BATCH)
    own = np.asarray(jclt.run(model, tokens)[0], np.float64)
    replaced = np.asarray(jax.jit(lambda t: replaced_logits(model.config, model.params, coder, t))(tokens), np.float64)
    logs = [x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (own, replaced)]
    assert found.agreement == pytest.approx(np.mean((own.argmax(-1) == replaced.argmax(-1))[mask]))
    assert found.kl == pytest.approx(np.mean((np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)[mask]), rel=1e-4)
    followed = mask[:, 1:]
    for log, loss in zip(logs, (found.loss, found.replaced_loss), strict=True):
        chosen = np.take_along_axis(log[:, :-1], tokens[:, 1:, None].astype(int), axis=-1)[..., 0]
        assert loss == pytest.approx(-chosen[followed].mean(), rel=1e-4)


def test_a_coder_that_writes_the_mean_is_the_control(model, prompts):
    tokens, mask = prompts
    means = mean_writes(model, neurons(model).config, tokens, mask=mask, batch=BATCH)
    found = evaluate_replacement(model, constant_coder(model, means), tokens, mask=mask, batch=BATCH)
    assert found.agreement == found.ablated_agreement and found.recovered == pytest.approx(0, abs=1e-5)
    silent = constant_coder(model, np.zeros_like(means))
    given = evaluate_replacement(model, silent, tokens, mask=mask, means=np.zeros_like(means), batch=BATCH)
    assert given.agreement == given.ablated_agreement and given.replaced_loss == pytest.approx(given.ablated_loss)


def test_mesh_gives_the_figures_of_one_device(model, prompts):
    tokens, mask = prompts
    mesh = jclt.make_mesh(data=2)
    split = jclt.load_model("demo", mesh=mesh)
    for measure in (evaluate_reconstruction, evaluate_replacement):
        alone = measure(model, random_coder(model, skip=True), tokens, mask=mask, batch=24).summary()
        coder = random_coder(model, mesh, skip=True)
        assert "features" in str(coder.layers[0].encoder.sharding.spec)
        for name, figure in measure(split, coder, tokens, mask=mask, batch=24).summary().items():
            assert figure == pytest.approx(alone[name], rel=1e-4, abs=1e-6), name


def test_unusable_rows_are_named(model):
    rows = np.zeros((2, 4), np.int32)
    with pytest.raises(UserError, match=r"expected rows of token ids \[N, T\]"):
        evaluate_reconstruction(model, neurons(model), rows[0])
    with pytest.raises(UserError, match=r"mask: shape \(2, 3\), expected \(2, 4\)"):
        evaluate_replacement(model, neurons(model), rows, mask=np.ones((2, 3)))
    with pytest.raises(UserError, match="expected at least one"):
        evaluate_replacement(model, neurons(model), rows, mask=np.zeros((2, 4)))


# ---------------------------------------------------------------- the small world


def test_neurons_keep_all_of_the_world_and_means_nothing(model):
    found = world_agreement(model, neurons(model), count=6)
    assert set(found.tasks) == set(TASKS)
    assert all(task.agreement == 1 and task.accuracy == task.model_accuracy for task in found.tasks.values())
    assert found.overall.ablated_agreement < 0.2 and found.overall.count == sum(t.count for t in found.tasks.values())
    assert found.summary()["weakest_agreement"] == 1 and "two_hop" in found.table()


def test_means_keep_as_much_of_a_task_as_the_control(model):
    examples = TASKS["closing"].examples("report", 20, seed=0)
    means = mean_prompt_writes(model, neurons(model), [example.prompt for example in examples])
    found = task_agreement(model, constant_coder(model, means), means, examples)
    assert found.agreement == found.ablated_agreement < 1 == found.model_accuracy


def test_two_right_answers_agree():
    own, other = np.array([1, 1, 1, 4]), np.array([1, 2, 3, 5])
    assert agreement(own, other, [{1}, {1, 2}, {1, 2}, {5}]) == 0.5
    assert accuracy(other, [{1}, {1, 2}, {1, 2}, {5}]) == 0.75


def test_set_features_move_what_layers_write(model):
    """A feature of layer 0 set to 3: its rows to both held layers are added three times, and to no later one."""
    coder = random_coder(model)
    tokens = jnp.asarray([model.encode("calc: 36+59=")], jnp.int32)
    where = np.zeros((2, 1, tokens.shape[1], 64), bool)
    values = np.full(where.shape, 3.0, np.float32)
    plain, seen = jclt.run(model, tokens, capture=("mlp_in", "mlp_out"))
    change = 3.0 - coder.encode(0, seen["mlp_in"][0])[0, -1, 5]
    writes = seen["mlp_out"].at[:2, 0, -1].add(change * coder.rows(0)[5, :2])
    held = jnp.arange(4)[:, None, None, None] < 2
    expected, _ = jclt.run(model, tokens, edit=Replace({"mlp_out": writes}, {"mlp_out": held}))
    found = eqx.filter_jit(with_features)
    untouched = found(model.config, model.params, coder, (0, 1), tokens, jnp.asarray(values), jnp.asarray(where))
    np.testing.assert_allclose(untouched, plain, atol=1e-4)
    where[0, 0, -1, 5] = True
    moved = found(model.config, model.params, coder, (0, 1), tokens, jnp.asarray(values), jnp.asarray(where))
    np.testing.assert_allclose(moved, expected, atol=1e-4)
    assert np.abs(moved - plain).max() > 0.01


def test_at_most_so_many_features_a_state_and_only_telling_ones():
    scores = np.array([[[3.0, 2.0], [2.0, -1.0]], [[0.0, -1.0], [-2.0, 5.0]]])
    chosen = largest(scores, 2)
    assert chosen.sum(axis=(1, 2)).tolist() == [2, 1] and chosen[0, 0, 0] and chosen[1, 1, 1]


def test_exchange_of_all_neurons_moves_the_state_and_of_drawn_ones_does_not(model):
    few = state_exchange(model, neurons(model), split="choose")
    assert few.unmoved == 1 and few.control < 0.1 and 0.1 < few.moved
    assert list(few.features) == list(STATES)
    assert all(0 < len(found) <= 16 and {layer for layer, _ in found} <= {0, 1} for found in few.features.values())
    every = state_exchange(model, neurons(model), split="choose", size=10_000)
    assert every.moved > few.moved


def test_exchange_is_the_same_on_a_mesh(model):
    mesh = jclt.make_mesh(data=2)
    split = jclt.load_model("demo", mesh=mesh)
    found = [state_exchange(*pair) for pair in ((model, random_coder(model)), (split, random_coder(model, mesh)))]
    assert found[0].features == found[1].features
    assert found[0].summary() == pytest.approx(found[1].summary(), abs=0.01)
