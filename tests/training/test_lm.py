"""Training a language model: it learns, resumes to the bit, and computes the same on any mesh."""

import os
import shutil
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import FOLDER
from run_processes import start_run, start_two_processes
from short_run import ONE_DEVICE_MESH, read_losses

import jclt
from jclt.data.load_tokens import read_text_rows
from jclt.errors import UserError
from jclt.mesh import make_mesh, make_sharding
from jclt.models import ModelConfig, forward
from jclt.training.config import LmConfig
from jclt.training.lm import init_state, next_token_loss, train_lm, train_step
from jclt.training.metrics import read_metrics

MODEL = ModelConfig("llama", 96, 16, 2, 2, 32, 32, qkv_bias=True, attn_out_bias=True, mlp_bias=True)
TINY = LmConfig(
    MODEL, data="text.txt", tokenizer=str(FOLDER / "llama3"), steps=24, batch=8, length=16, warmup=4, save_every=7
)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A text with a rule: after every word comes the next one of a cycle of twenty."""
    words = [f"word{i}" for i in range(10, 30)]
    rng = np.random.default_rng(0)
    lines = []
    for start in rng.integers(0, 20, 300):
        lines.append(" ".join(words[(start + i) % 20] for i in range(12)))
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(lines))
    return path


@pytest.fixture
def config(text) -> LmConfig:
    return replace(TINY, data=str(text))


def test_the_loss_is_the_weighted_mean_of_cross_entropies():
    config = replace(MODEL, vocabulary=7)
    params = {k: w.init(jax.random.key(1), jnp.float32) for k, w in jclt.models.declare(config).items()}
    tokens = jax.random.randint(jax.random.key(2), (2, 6), 0, 7, jnp.int32)
    weights = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (2, 6)), jnp.float32)
    logits = np.asarray(jax.jit(partial(forward, config))(params, tokens)[0], np.float64)
    total = weight = 0.0
    for row in range(2):
        for t in range(1, 6):
            z = logits[row, t - 1]
            total += float(weights[row, t]) * (np.log(np.exp(z).sum()) - z[int(tokens[row, t])])
            weight += float(weights[row, t])
    loss = jax.jit(next_token_loss, static_argnums=(0, 1))(config, False, params, tokens, weights)
    assert float(loss) == pytest.approx(total / weight, rel=1e-5)


def test_rematerialisation_changes_no_gradient():
    params = {k: w.init(jax.random.key(1), jnp.float32) for k, w in jclt.models.declare(MODEL).items()}
    tokens = jax.random.randint(jax.random.key(2), (2, 9), 0, 96, jnp.int32)
    grads = [
        jax.jit(jax.grad(partial(next_token_loss, MODEL, remat)))(params, tokens, jnp.ones((2, 9)))
        for remat in (False, True)
    ]
    for name in params:
        np.testing.assert_allclose(grads[0][name], grads[1][name], atol=1e-6)


def test_it_learns_the_rule_of_its_text(config, tmp_path):
    model = train_lm(replace(config, steps=100, save_every=100, learning_rate=1e-2), tmp_path / "run", ONE_DEVICE_MESH)
    assert jclt.generate(model, "word10 word11 word12", 3) == "word10 word11 word12 word13 word14 word15"
    again = jclt.load_model(tmp_path / "run" / "model")
    assert jclt.generate(again, "word28 word29", 2) == "word28 word29 word10 word11"
    losses = read_losses(tmp_path / "run")
    assert losses[0] > 3.5 and losses[-1] < 1.0
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000


@pytest.mark.exhaustive  # slow; test_train.py trains a coder on a mesh in a plain run, by the same loop
@pytest.mark.parametrize(("data", "features", "optimizer"), [(1, 4, "adamw"), (2, 2, "muon")])
def test_the_same_steps_on_any_mesh_give_the_same_losses(config, data, features, optimizer):
    rows = read_text_rows(Path(config.data), jclt.load_model(FOLDER / "llama3").tokenizer, config.length, ())[0]

    config = replace(config, optimizer=optimizer)

    def losses(mesh) -> list[float]:
        placed = make_sharding(mesh, (8, 16), ("batch", None))
        with jax.set_mesh(mesh):
            state, seen = init_state(config, mesh), []
            for step in range(5):
                tokens = jax.device_put(np.asarray(rows[8 * step : 8 * step + 8], np.int32), placed)
                weights = jax.device_put(np.ones((8, 16), np.float32), placed)
                state, metrics = train_step(config, state, tokens, weights)
                seen.append(float(metrics["loss"]))
            if mesh.size > 1:
                assert not state.params["query"].sharding.is_fully_replicated
                placements = {x.sharding for x in jax.tree.leaves(state.optimizer) if x.shape == (2, 16, 2, 8)}
                assert placements == {state.params["query"].sharding}
        return seen

    single = losses(ONE_DEVICE_MESH)
    np.testing.assert_allclose(losses(make_mesh(data, features)), single, rtol=1e-5)


def final_params(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in jclt.load_model(folder / "model").params.items()}


def read_curve(folder: Path) -> list[tuple[int, float]]:
    return [(entry["step"], entry["loss"]) for entry in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.exhaustive  # slow; the coder's test of a signal, in test_train.py, runs the same loop
def test_a_signal_saves_and_the_same_command_goes_on_from_there(config, tmp_path, caplog):
    """Here on another number of devices; the test of a damaged checkpoint compares bits."""
    caplog.set_level("INFO")
    config = replace(config, steps=400, save_every=400)
    process = start_run(config, tmp_path / "run")
    deadline = time.time() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, output = process.communicate(timeout=60)
    assert process.returncode == os.EX_TEMPFAIL and "the same command goes on from there" in output, output
    assert not (tmp_path / "run" / "model").exists()
    train_lm(config, tmp_path / "run")
    assert "resuming at step" in caplog.text and (tmp_path / "run" / "model").exists()
    assert [step for step, _ in read_curve(tmp_path / "run")] == [1, *range(10, 401, 10)]


@pytest.mark.exhaustive  # slow: two processes that compile everything for themselves; `.ci/run` runs it every time
def test_two_processes_train_a_model_as_one_does(config, tmp_path):
    config = replace(config, steps=8, save_every=8)
    for process in start_two_processes(config, tmp_path / "run"):
        _, output = process.communicate(timeout=300)
        assert process.returncode == 0, output
    single = train_lm(config, tmp_path / "alone", ONE_DEVICE_MESH).params
    for name, value in final_params(tmp_path / "run").items():
        np.testing.assert_allclose(value, single[name], atol=1e-5)


@pytest.mark.exhaustive  # slow; test_hosts.py tests it with two threads in place of two processes
def test_two_processes_agree_on_what_fails_on_one(config, tmp_path):
    """Only the first looks at the folder, and the other one learns of it."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for process in start_two_processes(config, tmp_path / "full"):
        _, output = process.communicate(timeout=300)
        assert process.returncode == 2 and "exists and is not a run of jclt, expected" in output, output
        assert "Traceback" not in output


def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_in_the_same_bits(config, tmp_path, caplog):
    uninterrupted = train_lm(config, tmp_path / "whole", ONE_DEVICE_MESH)
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    newest = tmp_path / "damaged" / "checkpoints" / "24"
    for path in newest.rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    shutil.rmtree(tmp_path / "damaged" / "model")
    again = train_lm(config, tmp_path / "damaged", ONE_DEVICE_MESH)
    assert "checkpoint of step 24 cannot be read, passing over it" in caplog.text
    for name in uninterrupted.params:
        np.testing.assert_array_equal(again.params[name], uninterrupted.params[name])
    assert read_curve(tmp_path / "damaged") == read_curve(tmp_path / "whole")


def test_a_loss_that_is_no_number_stops_the_run(config, tmp_path):
    with pytest.raises(
        UserError, match=r"(loss|gradient_norm) is (nan|inf) at step \d+; no checkpoint has been saved yet"
    ):
        train_lm(replace(config, steps=60, learning_rate=1e38, clip=1e38, warmup=12), tmp_path / "run", ONE_DEVICE_MESH)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"length": 33}, "setting 'length': 33, expected at most 32, the model's context"),
        ({"steps": 0}, "setting 'steps': 0, expected at least 1"),
        ({"warmup": -1}, "setting 'warmup': -1, expected at least 0"),
        (
            {"data": "none.txt"},
            "data 'none.txt': not found, expected a folder made by `jclt tokenize`, a text file, JSON lines or 'world'",
        ),
        (
            {"tokenizer": None},
            "setting 'tokenizer': missing, expected a folder with tokenizer.json for data that are text",
        ),
        ({"batch": 10}, "setting 'batch': 10, expected a multiple of 4, the number of devices"),
        (
            {"model": replace(MODEL, attn_softcap=3.0)},
            "family llama: attn_softcap=3.0 cannot be written in its layout, expected None",
        ),
        ({"model": replace(MODEL, family="lama")}, "family 'lama' is unknown; did you mean 'llama'?"),
        ({"model": replace(MODEL, vocabulary=50)}, "setting 'model.vocabulary': 50, expected at least 96"),
    ],
)
def test_what_cannot_work_is_refused(config, tmp_path, change, line):
    with pytest.raises(UserError) as error:
        train_lm(replace(config, **change), tmp_path / "run")
    assert str(error.value) == line
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_run_is_refused(config, tmp_path):
    train_lm(config, tmp_path / "run", ONE_DEVICE_MESH)
    with pytest.raises(UserError, match="holds a run with seed=0, expected seed=1"):
        train_lm(replace(config, seed=1), tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(UserError, match="exists and is not a run of jclt"):
        train_lm(config, tmp_path / "other")
