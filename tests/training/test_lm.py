"""Training a language model: it learns, resumes to the bit, and computes the same on any mesh."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import FOLDER
from more_cases import mark_others
from short_run import ONE, ONE_DEVICE, read_losses

import jclt
from jclt.data.batches import choose_batch_rows
from jclt.data.load_tokens import read_text_rows
from jclt.errors import UserError
from jclt.mesh import make_mesh, make_sharding
from jclt.models import ModelConfig, forward
from jclt.training.config import LmConfig
from jclt.training.lm import init_state, next_token_loss, train_lm, train_step
from jclt.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
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


def test_every_epoch_is_a_permutation_and_the_batch_a_function_of_the_step():
    numbers = np.concatenate([choose_batch_rows(10, 3, step, 4) for step in range(5)])
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10))
    assert numbers[:10].tolist() != numbers[10:].tolist()
    np.testing.assert_array_equal(choose_batch_rows(10, 3, 2, 4), numbers[8:12])
    assert choose_batch_rows(10, 4, 0, 4).tolist() != numbers[:4].tolist()


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
    model = train_lm(replace(config, steps=150, save_every=150, learning_rate=1e-2), tmp_path / "run", ONE)
    assert jclt.generate(model, "word10 word11 word12", 3) == "word10 word11 word12 word13 word14 word15"
    again = jclt.load_model(tmp_path / "run" / "model")
    assert jclt.generate(again, "word28 word29", 2) == "word28 word29 word10 word11"
    losses = read_losses(tmp_path / "run")
    assert losses[0] > 3.5 and losses[-1] < 1.0
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000


@pytest.mark.parametrize(("data", "features"), mark_others([(1, 4), (2, 2)], [(2, 2)]))
def test_the_same_steps_on_any_mesh_give_the_same_losses(config, data, features):
    rows = read_text_rows(Path(config.data), jclt.load_model(FOLDER / "llama3").tokenizer, config.length, ())[0]

    config = replace(config, optimizer="muon" if data == 2 else "adamw")

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

    single = losses(ONE)
    np.testing.assert_allclose(losses(make_mesh(data, features)), single, rtol=1e-5)


def command(config: LmConfig, folder: Path, *extra: str) -> list[str]:
    file = folder.parent / "tiny.py"
    source = f"from jclt.models import ModelConfig\nfrom jclt.training.config import LmConfig\nconfig = {config!r}\n"
    file.write_text(source)
    return [sys.executable, "-m", "jclt", "train-lm", str(file), "--out", str(folder), *extra]


ENVIRONMENT = os.environ | ONE_DEVICE | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def start(config: LmConfig, folder: Path, **environment: str) -> subprocess.Popen:
    variables = ENVIRONMENT | environment
    return subprocess.Popen(command(config, folder), env=variables, stderr=subprocess.PIPE, text=True)


def start_two(config: LmConfig, folder: Path) -> list[subprocess.Popen]:
    """Starts two processes of one run, with two devices each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    place = {"JCLT_COORDINATOR": f"localhost:{port}", "JCLT_PROCESSES": "2", "JAX_NUM_CPU_DEVICES": "2"}
    # The first alone finds programs in the cache, and the other one must not come to a collective half a minute later.
    place["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    return [start(config, folder, **place, JCLT_PROCESS=str(process)) for process in range(2)]


def final_params(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in jclt.load_model(folder / "model").params.items()}


def read_curve(folder: Path) -> list[tuple[int, float]]:
    return [(entry["step"], entry["loss"]) for entry in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.exhaustive  # the coder's test of a signal runs the same loop
def test_a_signal_saves_and_the_same_command_goes_on_from_there(config, tmp_path, caplog):
    """Here on another number of devices; the test of a damaged checkpoint compares bits."""
    caplog.set_level("INFO")
    config = replace(config, steps=400, save_every=400)
    process = start(config, tmp_path / "run")
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


def test_two_processes_train_a_model_as_one_does(config, tmp_path):
    config = replace(config, save_every=config.steps)
    for process in start_two(config, tmp_path / "run"):
        _, output = process.communicate(timeout=300)
        assert process.returncode == 0, output
    single = train_lm(config, tmp_path / "alone", ONE).params
    for name, value in final_params(tmp_path / "run").items():
        np.testing.assert_allclose(value, single[name], atol=1e-5)


@pytest.mark.exhaustive  # a step for two processes is agreed on in the same way, which the test above runs
def test_two_processes_agree_on_what_fails_on_one(config, tmp_path):
    """Only the first looks at the folder, and the other one learns of it."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for process in start_two(config, tmp_path / "full"):
        _, output = process.communicate(timeout=300)
        assert process.returncode == 2 and "exists and is not a run of jclt, expected" in output, output
        assert "Traceback" not in output


def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_in_the_same_bits(config, tmp_path, caplog):
    uninterrupted = train_lm(config, tmp_path / "whole", ONE)
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    newest = tmp_path / "damaged" / "checkpoints" / "24"
    for path in newest.rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    shutil.rmtree(tmp_path / "damaged" / "model")
    again = train_lm(config, tmp_path / "damaged", ONE)
    assert "checkpoint of step 24 cannot be read, passing over it" in caplog.text
    for name in uninterrupted.params:
        np.testing.assert_array_equal(again.params[name], uninterrupted.params[name])
    assert read_curve(tmp_path / "damaged") == read_curve(tmp_path / "whole")


def test_a_loss_that_is_no_number_stops_the_run(config, tmp_path):
    with pytest.raises(
        UserError, match=r"(loss|gradient_norm) is (nan|inf) at step \d+; no checkpoint has been saved yet"
    ):
        train_lm(replace(config, steps=60, learning_rate=1e38, clip=1e38, warmup=12), tmp_path / "run", ONE)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"length": 33}, "setting 'length': 33, expected at most 32, the model's context"),
        ({"steps": 0}, "setting 'steps': 0, expected at least 1"),
        ({"warmup": -1}, "setting 'warmup': -1, expected at least 0"),
        ({"data": "none.txt"}, "data 'none.txt': not found, expected 'world', a text file or JSON lines"),
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
    train_lm(config, tmp_path / "run", ONE)
    with pytest.raises(UserError, match="holds a run with seed=0, expected seed=1"):
        train_lm(replace(config, seed=1), tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(UserError, match="exists and is not a run of jclt"):
        train_lm(config, tmp_path / "other")


def test_json_lines_and_their_faults(config, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "word10 word11 word12"}\n' * 40)
    rows, weights = read_text_rows(file, jclt.load_model(FOLDER / "llama3").tokenizer, 16, ())
    assert rows.shape == (10, 16) == weights.shape
    assert rows[0, :4].tolist() == [1, 10, 11, 12]
    file.write_text('{"text": "word10"}\n{"txt": 1}\n')
    with pytest.raises(UserError, match="data.jsonl:2: expected a JSON object with 'text'"):
        read_text_rows(file, jclt.load_model(FOLDER / "llama3").tokenizer, 16, ())
    file.write_text('{"text": "word10"}\n')
    with pytest.raises(UserError, match="2 tokens, expected at least 16"):
        read_text_rows(file, jclt.load_model(FOLDER / "llama3").tokenizer, 16, ())


def test_text_keeps_its_blank_lines_and_json_lines_their_numbers(tmp_path):
    from jclt.data.load_tokens import _read_documents

    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("one\n\ntwo\n")
    assert _read_documents(plain) == ["one\n\ntwo\n"]
    lines.write_text('{"text": "one"}\n\n{"text": "t\u2028wo"}\n', encoding="utf-8")
    assert _read_documents(lines) == ["one", "t\u2028wo"]
    lines.write_text('{"text": "one"}\n\n{}\n')
    with pytest.raises(UserError, match="a.jsonl:3: expected a JSON object with 'text'"):
        _read_documents(lines)
