"""The measures of a coder: closed forms, neurons, which make no error, a coder that writes nothing, and meshes."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import FOLDER

import jclt
from jclt.coders import AXES, CoderConfig, Neurons, SparseCoder, declare_coder, neurons
from jclt.data.load_tokens import load_shards, tokenize_file
from jclt.data.tokenize import tokenize
from jclt.errors import UserError
from jclt.evaluation import (
    Reconstruction,
    check_replaceable,
    compute_replaced_logits,
    evaluate_reconstruction,
    evaluate_replacement,
    exchange_states,
    measure_mean_writes,
    measure_world_agreement,
)
from jclt.evaluation.batches import LARGEST_BATCH as BATCHES
from jclt.evaluation.batches import choose_batch_size
from jclt.evaluation.evaluate import evaluate, find_evaluation_rows
from jclt.evaluation.exchange import score_features, select_largest
from jclt.evaluation.features import run_with_features
from jclt.evaluation.reconstruction import Moments, measure_moments, merge_moments
from jclt.evaluation.world import (
    measure_accuracy,
    measure_agreement,
    measure_mean_prompt_writes,
    measure_task_agreement,
)
from jclt.mesh import make_sharding
from jclt.models import Model, Replace, declare
from jclt.world import TASKS, make_corpus
from jclt.world.facts import STATES
from jclt.world.handmade import PROMPTS, build_two_hop
from jclt.world.measure import pad_prompts

BATCH = 16
MEASURES = (evaluate_reconstruction, evaluate_replacement)


@pytest.fixture(scope="module")
def model() -> Model:
    return jclt.load_model("demo")


@pytest.fixture(scope="module")
def prompts(model) -> tuple[np.ndarray, np.ndarray]:
    """Token rows and a mask that leaves out the padding."""
    examples = [example.prompt for task in TASKS.values() for example in task.examples("choose", 2, seed=0)]
    tokens, ends = pad_prompts(model, examples)
    return tokens, np.arange(tokens.shape[1])[None] <= ends[:, None]


@pytest.fixture(scope="module")
def small() -> tuple[Model, np.ndarray, np.ndarray]:
    """A model of two layers, a few tokens and three positions; its prompts, and a mask that leaves out some tokens."""
    tokens = np.asarray(PROMPTS, np.int32)
    mask = np.ones(tokens.shape, bool)
    mask[::3, 2], mask[4, 1:] = False, False
    return build_two_hop(), tokens, mask


@pytest.fixture
def few_at_once(monkeypatch):
    """Small batches of prompts, all of one length, so that a program with little work serves all tasks."""
    monkeypatch.setattr("jclt.evaluation.world.PROMPTS_AT_ONCE", 8)
    monkeypatch.setattr("jclt.evaluation.world.LENGTH_MULTIPLE", 32)


def random_coder(model: Model, mesh=None, **settings) -> SparseCoder:
    config = CoderConfig(**({"features": 64} | settings)).fit_to_model(model.config, "demo")
    random = np.random.default_rng(0)

    def leaf(name: str, shape: tuple[int, ...]) -> jax.Array:
        where = make_sharding(mesh, shape, AXES[name]) if mesh else None
        return jax.device_put(random.normal(size=shape).astype(np.float32) / 10, where)

    return declare_coder(config, leaf)


def constant_coder(model: Model, writes: np.ndarray) -> SparseCoder:
    """A coder whose features never fire, with these vectors as decoder biases."""
    config = CoderConfig(features=4).fit_to_model(model.config, "demo")
    biases = iter(writes)
    return declare_coder(
        config, lambda name, shape: jnp.asarray(next(biases)) if name == "decoder_bias" else jnp.zeros(shape)
    )


# ---------------------------------------------------------------- reconstruction


def test_moments_of_parts_join_to_those_of_the_whole():
    x = np.random.default_rng(0).normal(100, 1, (2, 6, 5, 3)).astype(np.float32)
    mask = np.random.default_rng(1).random((6, 5)) < 0.7
    measure = jax.jit(measure_moments)
    parts = [measure(x[:, part], mask[part]) for part in (slice(0, 1), slice(1, 6))]
    merged = merge_moments(*(Moments(*(np.asarray(leaf, np.float64) for leaf in part)) for part in parts))
    unmasked = x[:, mask].astype(np.float64)
    assert merged.number == mask.sum()
    np.testing.assert_allclose(merged.mean, unmasked.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(merged.spread, unmasked.var(axis=1).sum(axis=-1) * mask.sum(), rtol=1e-4)


def test_figures_follow_from_the_sums():
    figures = Reconstruction(
        layers=(1, 3),
        tokens=10,
        error=np.array([1.0, 3.0]),
        centred_error=np.array([0.5, 3.0]),
        spread=np.array([2.0, 30.0]),
        density=np.array([[0.0, 0.1, 1.0], [0.0, 0.0, 0.2]]),
        mean_activation=np.zeros((2, 3)),
    )
    np.testing.assert_allclose(figures.nmse, [0.5, 0.1])
    np.testing.assert_allclose(figures.explained_variance, [0.75, 0.9])
    np.testing.assert_array_equal(figures.histogram, [[1, 0, 0, 0, 0, 1, 1], [2, 0, 0, 0, 0, 0, 1]])
    summary = figures.summary()
    assert summary["nmse"] == pytest.approx(0.3) and summary["explained_variance"] == pytest.approx(0.825)
    assert summary["l0"] == pytest.approx(1.3) and summary["dead"] == pytest.approx(0.5)
    assert summary["nmse_3"] == pytest.approx(0.1) and summary["dead_1"] == pytest.approx(1 / 3)
    assert len(figures.table().splitlines()) == 4


def test_a_constant_offset_costs_error_but_no_explained_variance(small):
    model, tokens, mask = small
    basis = neurons(model)
    shifted = Neurons({**basis.params, "down_bias": basis.params["down_bias"] + 1.0}, basis.model, basis.config)
    figures = evaluate_reconstruction(model, shifted, tokens, mask=mask)
    np.testing.assert_allclose(figures.error, figures.tokens * model.config.width, rtol=1e-4)
    np.testing.assert_allclose(figures.explained_variance, 1, atol=1e-6)


def test_planted_densities_are_found_whatever_the_batches_and_the_padding(small):
    model, tokens, mask = small
    bias = jnp.asarray(np.repeat([-1e4, 1e4, 0], [16, 16, 32]), jnp.float32)
    config = CoderConfig(features=64).fit_to_model(model.config, "demo")
    coder = declare_coder(
        config, lambda name, shape: bias if name == "encoder_bias" else jnp.asarray(np.full(shape, 0.1, np.float32))
    )
    figures = evaluate_reconstruction(model, coder, tokens, mask=mask, batch=8)
    assert figures.tokens == mask.sum()
    assert (figures.density[:, :16] == 0).all() and (figures.density[:, 16:32] == 1).all()
    assert (figures.dead >= 0.25).all()
    np.testing.assert_allclose(figures.mean_activation[:, 16:32], 1e4, rtol=0.01)
    junk = np.where(mask, tokens, 0)
    again = evaluate_reconstruction(model, coder, junk, mask=mask, batch=5)
    np.testing.assert_allclose(again.density, figures.density)
    np.testing.assert_allclose(again.nmse, figures.nmse, rtol=1e-5)


# ---------------------------------------------------------------- the replacement model


def test_neurons_make_no_error(model, prompts):
    tokens, mask = prompts
    basis = neurons(model)
    assert (evaluate_reconstruction(model, basis, tokens, mask=mask, batch=BATCH).nmse < 1e-9).all()
    figures = evaluate_replacement(model, basis, tokens, mask=mask, batch=BATCH)
    assert figures.agreement == 1 and abs(figures.kl) < 1e-9 and figures.recovered == pytest.approx(1, abs=1e-6)
    assert figures.ablated_agreement < 0.6 and figures.ablated_kl > 1 and figures.tokens == mask.sum()
    assert "recovered" in figures.table()


def test_replacement_figures_are_those_of_the_logits(small):
    model, tokens, mask = small
    coder = random_coder(model, kind="transcoder", activation="topk", k=4)
    figures = evaluate_replacement(model, coder, tokens, mask=mask, batch=8)
    assert 0 < figures.agreement < 1
    logits = np.asarray(jclt.run(model, tokens)[0], np.float64)
    replaced = np.asarray(
        jax.jit(lambda t: compute_replaced_logits(model.config, model.params, coder, t))(tokens), np.float64
    )
    logs = [x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (logits, replaced)]
    assert figures.agreement == pytest.approx(np.mean((logits.argmax(-1) == replaced.argmax(-1))[mask]))
    assert figures.kl == pytest.approx(np.mean((np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)[mask]), rel=1e-4)
    followed = mask[:, 1:]
    for log, loss in zip(logs, (figures.loss, figures.replaced_loss), strict=True):
        chosen_log = np.take_along_axis(log[:, :-1], tokens[:, 1:, None].astype(int), axis=-1)[..., 0]
        assert loss == pytest.approx(-chosen_log[followed].mean(), rel=1e-4)


def test_a_coder_that_writes_the_mean_is_the_control(small):
    model, tokens, mask = small
    means = measure_mean_writes(model, neurons(model).config, tokens, mask=mask, batch=8)
    figures = evaluate_replacement(model, constant_coder(model, means), tokens, mask=mask, batch=8)
    assert figures.agreement == figures.ablated_agreement and figures.recovered == pytest.approx(0, abs=1e-5)
    silent = constant_coder(model, np.zeros_like(means))
    zeros = evaluate_replacement(model, silent, tokens, mask=mask, means=np.zeros_like(means), batch=8)
    assert zeros.agreement == zeros.ablated_agreement and zeros.replaced_loss == pytest.approx(zeros.ablated_loss)


def test_mesh_gives_the_figures_of_one_device(small):
    model, tokens, mask = small
    mesh = jclt.make_mesh(data=2)
    axes = {name: weight.axes for name, weight in declare(model.config).items()}
    split = {name: jax.device_put(x, make_sharding(mesh, x.shape, axes[name])) for name, x in model.params.items()}
    for measure in (evaluate_reconstruction, evaluate_replacement):
        single = measure(model, random_coder(model, features=16, skip=True), tokens, mask=mask, batch=5).summary()
        coder = random_coder(model, mesh, features=16, skip=True)
        assert "features" in str(coder.layers[0].encoder.sharding.spec)
        summary = measure(replace(model, params=split), coder, tokens, mask=mask, batch=5).summary()
        for name, figure in summary.items():
            assert figure == pytest.approx(single[name], rel=1e-4, abs=1e-6), name


def test_unusable_rows_are_named(model):
    rows = np.zeros((2, 4), np.int32)
    with pytest.raises(UserError, match=r"expected rows of token ids \[N, T\]"):
        evaluate_reconstruction(model, neurons(model), rows[0])
    with pytest.raises(UserError, match=r"mask: shape \(2, 3\), expected \(2, 4\)"):
        evaluate_replacement(model, neurons(model), rows, mask=np.ones((2, 3)))
    with pytest.raises(UserError, match="expected at least one"):
        evaluate_replacement(model, neurons(model), rows, mask=np.zeros((2, 4)))


# ---------------------------------------------------------------- what cannot be measured


def with_nan(model: Model, name: str) -> Model:
    return replace(model, params=model.params | {name: model.params[name].at[0].set(jnp.nan)})


def test_what_is_not_finite_is_named(small, model, few_at_once):
    small, rows, _ = small
    broken = with_nan(small, "token_embedding")
    with pytest.raises(
        UserError, match="^model handmade two-hop: what its layers write at 'mlp_raw_out' is not finite"
    ):
        evaluate_reconstruction(broken, neurons(small), rows)
    with pytest.raises(
        UserError, match="^model handmade two-hop: what its layers write at 'mlp_raw_out' is not finite"
    ):
        evaluate_replacement(broken, neurons(small), rows)
    with pytest.raises(UserError, match="^model handmade two-hop: its logits are not finite"):
        evaluate_replacement(broken, neurons(small), rows, means=np.zeros((2, small.config.width)))
    with pytest.raises(UserError, match="^coder: what it reconstructs is not finite"):
        evaluate_reconstruction(small, neurons(with_nan(small, "down")), rows)
    with pytest.raises(UserError, match="^coder: the logits of its replacement model are not finite"):
        evaluate_replacement(small, neurons(with_nan(small, "down")), rows)
    with pytest.raises(UserError, match="^model .*: its logits are not finite"):
        examples = TASKS["closing"].examples("report", 2, seed=0)
        measure_task_agreement(
            with_nan(model, "final_norm_gain"), neurons(model), np.zeros((4, model.config.width), np.float32), examples
        )


def test_fewer_rows_at_once_give_the_same_figures(small, monkeypatch):
    small, rows, _ = small
    coder = random_coder(small, features=16, skip=True)
    assert choose_batch_size(small, coder.config, rows, None) == BATCHES
    measured = [(f(small, coder, rows).summary(), f(small, coder, rows, batch=1).summary()) for f in MEASURES]
    a_row = 4 * rows.shape[1] * (2 * 16 + 3 * small.config.vocabulary)
    monkeypatch.setattr("jclt.evaluation.batches.BATCH_BYTES", 5 * a_row + 3)
    assert choose_batch_size(small, coder.config, rows, None) == 5
    monkeypatch.setattr("jclt.evaluation.batches.BATCH_BYTES", 1)
    assert choose_batch_size(small, coder.config, rows, None) == 1
    for measure, (all_at_once, row_by_row) in zip(MEASURES, measured, strict=True):
        fewer = measure(small, coder, rows).summary()
        assert fewer == row_by_row and fewer == pytest.approx(all_at_once, rel=1e-4, abs=1e-5)


def test_rows_of_one_token_have_no_loss_to_recover(small):
    small, rows, _ = small
    figures = evaluate_replacement(small, neurons(small), rows[:, :1])
    assert np.isnan(figures.recovered) and "recovered" not in figures.summary()
    assert figures.table().endswith("cross-entropy recovered: the control loses none")


def test_a_coder_that_reads_after_it_writes_has_no_replacement_model(small):
    small, rows, _ = small
    coder = random_coder(small, reads="resid_post", features=8)
    line = "^coder: reads 'resid_post', which comes after 'mlp_out', expected a coder that reads before it writes"
    for measure in (evaluate_replacement, lambda model, coder, rows: measure_world_agreement(model, coder)):
        with pytest.raises(UserError, match=line):
            measure(small, coder, rows)
    for sites in ({"reads": "resid_post", "writes": "resid_post", "kind": "sae"}, {}, {"reads": "resid_mid"}):
        check_replaceable(random_coder(small, features=8, **sites).config)


def test_a_layer_that_writes_nothing_has_no_ratios(small):
    small, rows, _ = small
    silent = replace(small, params=small.params | {n: small.params[n].at[1].set(0.0) for n in ("down", "down_bias")})
    figures = evaluate_reconstruction(silent, neurons(silent), rows)
    assert np.isnan(figures.nmse[1]) and figures.nmse[0] < 1e-9
    assert "nmse_1" not in figures.summary() and figures.summary()["nmse"] == figures.nmse[0]
    assert not np.isnan(list(figures.summary().values())).any()
    assert figures.table().splitlines()[2].split()[:3] == ["1", "-", "-"]


def test_the_densities_stand_below_their_names():
    figures = Reconstruction(
        layers=(0, 11),
        tokens=10,
        error=np.array([1.0, 3.0]),
        centred_error=np.array([0.5, 3.0]),
        spread=np.array([2.0, 30.0]),
        density=np.repeat([[0.0, 1e-6, 5e-5, 0.02], [0.0, 0.0, 1e-6, 0.5]], 5000, axis=1),
        mean_activation=np.zeros((2, 20_000)),
    )
    lines = figures.table().splitlines()
    assert len({len(line) for line in lines}) == 1
    for name, count in (("0", "15000"), ("<=1e-05", "10000"), ("<=0.0001", "5000"), ("<=1", "5000")):
        end = lines[0].rindex(f" {name} " if name == "0" else name) + len(name) + (name == "0")
        assert lines[-1][:end].endswith(f" {count}")


# ---------------------------------------------------------------- the rows of `jclt eval`


def test_no_seed_of_training_draws_the_rows_of_an_evaluation(model):
    rows = {seed: find_evaluation_rows(model, "world", 40, 64, seed) for seed in (0, 1)}
    vocabulary = model.tokenizer.backend.get_vocab()
    for seed in (0, 1):
        trained = {row.tobytes() for row in make_corpus(200, 64, seed, vocabulary).tokens}
        assert not any(row.tobytes() in trained for group in rows.values() for row in group)
        assert np.array_equal(rows[seed], find_evaluation_rows(model, "world", 40, 64, seed))
    assert not np.array_equal(rows[0], rows[1])


def test_of_texts_and_folders_only_what_training_leaves_out_is_measured_on(tmp_path):
    reader = jclt.load_model(FOLDER / "llama3")
    (tmp_path / "a.txt").write_text(" ".join(f"word{10 + n % 80}" for n in range(3000)))
    tokenize([str(tmp_path / "a.txt")], FOLDER / "llama3", str(tmp_path / "tokens"), shard_tokens=1000)
    end = reader.config.stop_tokens[:1]
    for data, tokens in (
        (tmp_path / "tokens", np.concatenate(load_shards(tmp_path / "tokens")[0])),
        (tmp_path / "a.txt", tokenize_file(tmp_path / "a.txt", reader.tokenizer, end)),
    ):
        reserved = tokens[len(tokens) - len(tokens) // 16 :]
        allowed = {reserved[at : at + 16].astype(np.int32).tobytes() for at in range(len(reserved))}
        evaluation_rows = find_evaluation_rows(reader, str(data), 128, 16, seed=1)
        assert len(evaluation_rows) == len(reserved) // 16 and all(row.tobytes() in allowed for row in evaluation_rows)
        assert len(find_evaluation_rows(reader, str(data), 3, 16, seed=1)) == 3
        with pytest.raises(UserError) as error:
            find_evaluation_rows(reader, str(data), 128, 200, seed=1)
        message = f"data '{data}': training leaves out the last {len(reserved)} of {len(tokens)} tokens"
        assert str(error.value) == f"{message}, expected 200 of them together (one row)"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"rows": 0}, "rows 0: expected at least 1"),
        ({"rows": -1}, "rows -1: expected at least 1"),
        ({"length": 0}, "length 0: expected at least 2"),
        ({"length": 1}, "length 1: expected at least 2"),
        ({"seed": -1}, "seed -1: expected at least 0"),
        ({"length": 65}, "length 65: expected at most 64, the model's context"),
    ],
)
def test_rows_that_cannot_be_are_refused_before_anything_is_measured(model, change, line):
    with pytest.raises(UserError) as error:
        evaluate(model, neurons(model), **change)
    assert str(error.value) == line


# ---------------------------------------------------------------- the small world


def test_neurons_keep_all_of_the_world_and_means_nothing(model, few_at_once):
    figures = measure_world_agreement(model, neurons(model), count=6)
    assert set(figures.tasks) == set(TASKS)
    assert all(task.agreement == 1 and task.accuracy == task.model_accuracy for task in figures.tasks.values())
    assert figures.overall.ablated_agreement < 0.2 and figures.overall.count == sum(
        t.count for t in figures.tasks.values()
    )
    assert figures.summary()["weakest_agreement"] == 1 and "two_hop" in figures.table()


def test_means_keep_as_much_of_a_task_as_the_control(model, few_at_once):
    examples = TASKS["closing"].examples("report", 20, seed=0)
    means = measure_mean_prompt_writes(model, neurons(model), [example.prompt for example in examples])
    figures = measure_task_agreement(model, constant_coder(model, means), means, examples)
    assert figures.agreement == figures.ablated_agreement < 1 == figures.model_accuracy


def test_two_right_answers_agree():
    answers, others = np.array([1, 1, 1, 4]), np.array([1, 2, 3, 5])
    assert measure_agreement(answers, others, [{1}, {1, 2}, {1, 2}, {5}]) == 0.5
    assert measure_accuracy(others, [{1}, {1, 2}, {1, 2}, {5}]) == 0.75


def test_set_features_move_what_layers_write(model):
    """A feature of layer 0 is set to 3: its rows for both frozen layers are added three times, and no others."""
    coder = random_coder(model)
    tokens = np.asarray([model.encode("calc: 36+59=")], np.int32)
    where = np.zeros((2, 1, tokens.shape[1], 64), bool)
    values = np.full(where.shape, 3.0, np.float32)
    plain, seen = jax.device_get(jclt.run(model, tokens, capture=("mlp_in", "mlp_out")))
    activations, rows = jax.device_get(
        eqx.filter_jit(lambda x: (coder.encode(0, x), coder.decoder_rows(0)))(seen["mlp_in"][0])
    )
    writes = seen["mlp_out"].copy()
    writes[:2, 0, -1] += (3.0 - activations[0, -1, 5]) * rows[5, :2]
    expected, _ = jclt.run(model, tokens, edit=Replace({"mlp_out": writes}, layer=slice(0, 2)))
    result = eqx.filter_jit(run_with_features)
    untouched = result(model.config, model.params, coder, (0, 1), tokens, values, where)
    np.testing.assert_allclose(untouched, plain, atol=1e-4)
    where[0, 0, -1, 5] = True
    moved = result(model.config, model.params, coder, (0, 1), tokens, values, where)
    np.testing.assert_allclose(moved, expected, atol=1e-4)
    assert np.abs(moved - plain).max() > 0.01


def test_at_most_so_many_features_a_state_and_only_telling_ones():
    scores = np.array([[[3.0, 2.0], [2.0, -1.0]], [[0.0, -1.0], [-2.0, 5.0]]])
    selected = select_largest(scores, 2)
    assert selected.sum(axis=(1, 2)).tolist() == [2, 1] and selected[0, 0, 0] and selected[1, 1, 1]


def test_exchange_of_all_neurons_moves_the_state_and_of_drawn_ones_does_not(model, one_form, monkeypatch):
    computed = []

    def score_once(*arguments):
        if not computed:
            computed.append(score_features(*arguments))
        return computed[0]

    monkeypatch.setattr("jclt.evaluation.exchange.score_features", score_once)
    exchange = exchange_states(model, neurons(model), split="choose")
    assert exchange.unmoved == 1 and exchange.control < 0.1 and 0.1 < exchange.moved
    assert list(exchange.features) == list(STATES)
    assert all(0 < len(group) <= 16 and {layer for layer, _ in group} <= {0, 1} for group in exchange.features.values())
    every = exchange_states(model, neurons(model), split="choose", size=10_000)
    assert every.moved > exchange.moved


@pytest.mark.exhaustive  # the other figures are the same on a mesh in a plain run, too
def test_exchange_is_the_same_on_a_mesh(model, one_form):
    mesh = jclt.make_mesh(data=2)
    split = jclt.load_model("demo", mesh=mesh)
    exchanges = [exchange_states(*pair) for pair in ((model, random_coder(model)), (split, random_coder(model, mesh)))]
    assert exchanges[0].features == exchanges[1].features
    assert exchanges[0].summary() == pytest.approx(exchanges[1].summary(), abs=0.01)
