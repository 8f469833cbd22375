"""A coder's run from its settings to the saved coder: the same on every mesh, and after any interruption."""

import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from more_cases import mark_others
from run_processes import start_run, start_two_processes, write_config
from short_run import CONFIG, IGNORE_ABANDONED_LOADS, ONE_DEVICE_MESH, read_losses

import jclt
from jclt.cli.main import main
from jclt.coders import CoderConfig, load_coder
from jclt.errors import UserError
from jclt.mesh import make_mesh
from jclt.training.coder import train as training
from jclt.training.coder.train import Trainer, train_coder
from jclt.training.inspect import inspect_run
from jclt.training.metrics import read_metrics


def digest(folder: Path) -> str:
    return inspect_run(folder).rsplit(" ", 1)[-1]


def read_divergences(folder: Path) -> np.ndarray:
    return np.array([entry["kl"] for entry in read_metrics(folder / "metrics.jsonl") if "kl" in entry])


def wait_for(folder: Path, step: int, process: subprocess.Popen[str] | None = None) -> None:
    """Waits until a checkpoint of this step is complete."""
    for _ in range(1200):
        if (folder / "checkpoints" / str(step) / "commit_success.txt").exists():
            return
        if process is not None and process.poll() is not None:
            raise AssertionError(f"no checkpoint of step {step}: {process.communicate()[1]}")
        time.sleep(0.1)
    raise AssertionError(f"no checkpoint of step {step} in time")


@pytest.fixture(scope="module")
def one_device(tmp_path_factory) -> Path:
    """The run on one device, with an evaluation."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train_coder(replace(CONFIG, evaluate_every=0), folder, ONE_DEVICE_MESH, profile=2)
    return folder


@pytest.mark.parametrize(("data", "features"), mark_others([(1, 4), (2, 2)], [(2, 2)]))
def test_losses_are_the_same_on_every_mesh(one_device, tmp_path, data, features):
    train_coder(replace(CONFIG, data_shards=data), tmp_path / "run", make_mesh(data, features))
    np.testing.assert_allclose(read_losses(tmp_path / "run"), read_losses(one_device), rtol=1e-5)


SHARED = replace(CONFIG, data_shards=2, save_every=20)


def finish(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


@pytest.mark.exhaustive  # slow; test_lm.py has two processes of which none dies
def test_a_process_that_dies_ends_the_other_and_the_run_goes_on(one_device, tmp_path):
    """With as many processes or with one, it ends as the run of one device."""
    first, second = start_two_processes(SHARED, tmp_path / "two")
    wait_for(tmp_path / "two", 20, first)
    second.send_signal(signal.SIGKILL)
    second.communicate()
    _, errors = first.communicate(timeout=60)
    assert first.returncode != 0
    assert "cannot go on" in errors or "another task died" in errors, errors[-2000:]
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    finish(start_two_processes(SHARED, tmp_path / "two"))
    train_coder(SHARED, tmp_path / "one", make_mesh(2, 2))
    coder = load_coder(one_device / "coder")
    for folder in (tmp_path / "two", tmp_path / "one"):
        np.testing.assert_allclose(read_losses(folder), read_losses(one_device), rtol=1e-5)
        for a, b in zip(jax.tree.leaves(load_coder(folder / "coder")), jax.tree.leaves(coder), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_training_lowers_the_error_and_leaves_a_coder_of_the_model(one_device):
    entries = [entry for entry in read_metrics(one_device / "metrics.jsonl") if "nmse" in entry]
    assert entries[-1]["nmse"] < 0.8 * entries[0]["nmse"]
    assert len(entries[-1]["layers_l0"]) == 2 and entries[-1]["tokens_per_second"] > 0
    coder = load_coder(one_device / "coder", model=jclt.load_model("demo"), check=False)
    assert coder.config.activation == "jumprelu" and coder.config.covered == (0, 2)
    assert (one_device / "curves.png").exists()
    assert list((one_device / "profile").rglob("*.xplane.pb"))


SHUFFLED = replace(
    CONFIG,
    steps=30,
    save_every=10,
    shuffle=4,
    sparsity="tanh",
    coder=CoderConfig(features=32, activation="batchtopk", k=8),
)


def kill_process(folder: Path) -> None:
    killed = start_run(SHUFFLED, folder)
    wait_for(folder, 20, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()


def copy_running(folder: Path) -> None:
    """The files that a process would leave that is killed at its 25th step."""
    with pytest.MonkeyPatch.context() as patch:
        running, advance = folder.with_name("straight"), Trainer.advance

        def copy_and_advance(self: Trainer, step: int, *inputs: Any) -> Any:
            if step == 25:
                wait_for(running, 20)
                shutil.copytree(running, folder)
            return advance(self, step, *inputs)

        patch.setattr(Trainer, "advance", copy_and_advance)
        train_coder(SHUFFLED, running, ONE_DEVICE_MESH)


@IGNORE_ABANDONED_LOADS
@pytest.mark.exhaustive  # a plain run passes over a damaged checkpoint in test_lm.py, by the same loop
@pytest.mark.parametrize("leave_unfinished", [copy_running, kill_process])
def test_a_run_killed_and_resumed_ends_in_the_same_bits(leave_unfinished, tmp_path, caplog):
    leave_unfinished(tmp_path / "killed")
    # Half of the newest checkpoint is lost as well: the run goes on from the one before.
    complete = [path for path in (tmp_path / "killed" / "checkpoints").iterdir() if path.name.isdigit()]
    newest = max(complete, key=lambda path: int(path.name))
    for file in (newest / "state" / "d").glob("*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    train_coder(SHUFFLED, tmp_path / "killed", ONE_DEVICE_MESH)
    assert f"checkpoint of step {newest.name} cannot be read" in caplog.text
    if not (tmp_path / "straight").exists():
        train_coder(SHUFFLED, tmp_path / "straight", ONE_DEVICE_MESH)
    assert digest(tmp_path / "killed") == digest(tmp_path / "straight")
    assert read_losses(tmp_path / "killed").tolist() == read_losses(tmp_path / "straight").tolist()
    # There is no evaluation, which `evaluate_every=-1` forbids.
    assert not any("agreement" in entry for entry in read_metrics(tmp_path / "killed" / "metrics.jsonl"))


def test_a_signal_saves_and_the_same_command_goes_on_from_there(one_device, tmp_path, capsys, monkeypatch):
    command = ["train", write_config(CONFIG, tmp_path / "run.py"), "--out", str(tmp_path / "run")]
    monkeypatch.setattr(training, "make_mesh", lambda _: ONE_DEVICE_MESH)
    advance = Trainer.advance

    def send_signal(self: Trainer, step: int, *inputs: Any) -> Any:
        if step == 30:
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL  # it would end the tests
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(self, step, *inputs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", send_signal)
        assert main(command) == os.EX_TEMPFAIL
    assert "stopped at step 31, saved; the same command goes on from there" in capsys.readouterr().err
    assert "checkpoints of steps 31" in inspect_run(tmp_path / "run")
    assert main(command) == 0
    assert read_losses(tmp_path / "run").tolist() == read_losses(one_device).tolist()


@pytest.mark.exhaustive  # slow; what a store holds is tested in test_activation_store.py
def test_stored_activations_train_as_harvested_ones_do(one_device, tmp_path):
    config = replace(CONFIG, store=str(tmp_path / "store"), store_rows=400)
    train_coder(config, tmp_path / "run", ONE_DEVICE_MESH)
    losses = read_losses(tmp_path / "run")
    assert losses[0] == pytest.approx(read_losses(one_device)[0], rel=0.3)  # other rows, the same model
    assert losses[-1] < 0.8 * losses[0]
    train_coder(replace(config, save_every=25), tmp_path / "again", ONE_DEVICE_MESH)  # reads what is there already
    assert read_losses(tmp_path / "again").tolist() == losses.tolist()
    with pytest.raises(UserError, match="was made with reads=mlp_in, expected reads=mlp_normalized"):
        other = replace(config.coder, reads="mlp_normalized")
        train_coder(replace(config, coder=other), tmp_path / "other", ONE_DEVICE_MESH)


@pytest.mark.exhaustive  # slow; test_losses.py has its formula, test_contracts.py its types
@pytest.mark.parametrize(("data", "features"), [(1, 1), (2, 2)])
def test_the_end_to_end_phase_lowers_the_divergence(data, features, tmp_path):
    config = replace(CONFIG, steps=40, end_to_end_steps=30, end_to_end_weight=4.0, learning_rate=3e-3)
    train_coder(config, tmp_path / "run", make_mesh(data, features))
    divergences = read_divergences(tmp_path / "run")
    assert len(divergences) == 30 and divergences[-5:].mean() < 0.8 * divergences[:5].mean()


@pytest.mark.exhaustive  # slow: the control of the test above
def test_the_divergence_falls_further_by_its_own_loss(tmp_path):
    last = []
    for weight in (4.0, 0.0):
        folder = tmp_path / f"weight {weight}"
        config = replace(CONFIG, steps=60, end_to_end_steps=40, end_to_end_weight=weight, learning_rate=3e-3)
        train_coder(config, folder, ONE_DEVICE_MESH)
        last.append(read_divergences(folder)[-5:].mean())
    assert last[0] < 0.9 * last[1]


WRONG = {
    "coder.featurs=3": "setting 'coder.featurs': unknown; did you mean 'features'?",
    "steps=many": "setting 'steps': got many, expected a whole number",
    "coder.k=3": "setting 'coder.k': 3, expected none under activation 'jumprelu'",
    "coder.activation=topk": "setting 'coder.k': None, expected a number of active features under activation 'topk'",
    "coder.layers=(0, 9)": "setting 'coder.layers': (0, 9), expected layers from 0 to 3, in order",
    "coder.reads=mlp_inn": "site 'mlp_inn' does not exist; did you mean 'mlp_in'?",
    "coder.features=65": "setting 'coder.features': 65, expected a multiple of 4 shards",
    "coder.tied=true": "setting 'coder.tied': expected false, a clt writes elsewhere than it reads",
    "micro_batches=3": "setting 'micro_batches': 3, expected a divisor of length=16",
    "length=640": "setting 'length': 640, expected at most 64, the model's",
    "batch=7": "setting 'batch': 7, expected a multiple of 4, the number of devices",
    "warmup=-1": "setting 'warmup': -1, expected at least 0",
    "coder.features=8000000000": "setting 'coder.features': 8000000000 of 2 layers: needs",
    "coder.reads=queries": "setting 'coder.reads': queries is no vector of the model's width",
    "model=nowhere/at-all": "model 'nowhere/at-all': no such folder",
    "data=nowhere.txt": "data 'nowhere.txt': not found",
    "optimizer=adm": "setting 'optimizer': got adm, expected one of: adam",
}


@pytest.mark.parametrize("setting", WRONG)
def test_what_cannot_work_is_said_in_one_line_before_anything_is_written(setting, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = write_config(CONFIG, tmp_path / "run.py")
    assert main(["train", file, "--out", str(tmp_path / "out"), "--set", setting]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"jclt: {WRONG[setting]}")
    assert not (tmp_path / "out").exists()


def test_eval_and_inspect_print_what_they_find(one_device, tmp_path, capsys, monkeypatch, one_form):
    monkeypatch.setattr("jclt.evaluation.world.PROMPTS_AT_ONCE", 16)
    monkeypatch.setattr("jclt.evaluation.world.LENGTH_MULTIPLE", 32)  # one program for all tasks
    sizes = ["--rows", "8", "--length", "32", "--tasks", "10"]
    assert main(["eval", str(one_device / "coder"), *sizes, "--json", str(tmp_path / "e.json")]) == 0
    text = capsys.readouterr().out
    assert "replacement" in text and "two_hop" in text
    figures = json.loads((tmp_path / "e.json").read_text())
    assert 0 < figures["reconstruction"]["nmse"] < 2
    assert main(["inspect", str(one_device)]) == 0
    text = capsys.readouterr().out
    assert (
        "step 50 of 50" in text
        and "coder.layers.*.decoder" in text
        and "agrees with the model on" in text
        and "sha256" in text
    )
    assert main(["inspect", str(tmp_path)]) == 2
