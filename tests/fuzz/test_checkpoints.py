"""A run whose checkpoints are damaged, or that is killed at any moment, ends with the same bits or says why not."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from numpy.random import Generator
from short_run import IGNORE_ABANDONED_LOADS, list_array_files

from fuzz.limits import Fault, check_line, describe_error, format_faults, limit_resources
from fuzz.mutations import BYTES, empty, flip_bit, pick
from fuzz.samples import GPT2, random_model
from jclt.coders import CoderConfig, load_coder
from jclt.errors import UserError
from jclt.files import read_json
from jclt.mesh import make_mesh
from jclt.models import load_model, save_model
from jclt.training.checkpoints import Checkpoints, name_leaves
from jclt.training.coder.abstract import abstract_state
from jclt.training.coder.prepare import complete_config
from jclt.training.coder.train import train_coder
from jclt.training.config import TrainConfig
from jclt.training.metrics import read_metrics

pytestmark = [pytest.mark.fuzz, IGNORE_ABANDONED_LOADS]

STEPS, EVERY = 12, 4
SETTINGS = {"steps": STEPS, "batch": 8, "length": 8, "warmup": 2, "save_every": EVERY, "log_every": 1}
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
VOLATILE = ("seconds", "tokens_per_second", "matmul_fraction")


@dataclass(frozen=True)
class Run:
    """A run that was never disturbed."""

    config: TrainConfig
    folder: Path
    coder: list[np.ndarray]
    metrics: list[dict[str, Any]]
    states: dict[int, dict[str, np.ndarray]]
    """The arrays in each of its checkpoints."""


@pytest.fixture(scope="module")
def undisturbed_run(tmp_path_factory: pytest.TempPathFactory, draw) -> Run:
    """A run that nothing disturbs. Model and data are minimal, since compilation takes most of the time. There are so
    many features that a checkpoint's arrays have separate chunk files, which no checksum of the format protects."""
    if not draw.large:
        pytest.skip("only -m fuzz trains a run for this; tests/training/test_run_folder.py damages small checkpoints")
    home = tmp_path_factory.mktemp("undisturbed")
    save_model(random_model(GPT2), home / "model")
    (home / "text.txt").write_text("ab a b ab b ab ab a\n" * 200)
    places = {"model": str(home / "model"), "data": str(home / "text.txt")}
    config = TrainConfig(CoderConfig(features=1024, layers=(1,)), **places, **SETTINGS)
    train_coder(config, home / "run")
    states = {}
    for step, other_step in ((STEPS, STEPS - EVERY), (STEPS - EVERY, STEPS)):
        shutil.copytree(home / "run", home / f"step {step}")
        shutil.rmtree(home / f"step {step}" / "checkpoints" / str(other_step))
        state = restore_state(config, home / f"step {step}")
        assert state is not None and int(state["step"]) == step
        states[step] = state
    assert any((states[STEPS][name] != x).any() for name, x in states[STEPS - EVERY].items())
    return Run(config, home / "run", read_coder(home / "run"), read_run_metrics(home / "run"), states)


def read_coder(folder: Path) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(load_coder(folder / "coder", check=False))]


def read_run_metrics(folder: Path) -> list[dict[str, Any]]:
    entries = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in entry.items() if name not in VOLATILE} for entry in entries]


def restore_state(config: TrainConfig, folder: Path) -> dict[str, np.ndarray] | None:
    """The state from which a run in this folder would continue."""
    mesh = make_mesh()
    complete = complete_config(config, load_model(config.model).config, mesh)
    with jax.set_mesh(mesh), Checkpoints(str((folder / "checkpoints").absolute())) as checkpoints:
        state = checkpoints.restore(abstract_state(complete, mesh))
    return None if state is None else {name: np.asarray(x) for name, x in name_leaves(state).items()}


def are_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(x.dtype == b[name].dtype and (x == b[name]).all() for name, x in a.items())


# Damage.


def damage(rng: Generator, newest: Path, bits_alone: bool) -> str:
    files = list_array_files(newest) if bits_alone else sorted(path for path in newest.rglob("*") if path.is_file())
    path = pick(rng, files)
    name, content = path.relative_to(newest), path.read_bytes()
    kind = rng.random()
    if bits_alone:
        path.write_bytes(flip_bit(rng, content))
        return f"bit of {name}"
    if kind < 0.1:
        shutil.rmtree(path.parent)
        return f"{name.parent} gone"
    if kind < 0.2:
        path.unlink()
        return f"{name} gone"
    change = pick(rng, (*BYTES, empty)) if len(content) > 1 else empty
    path.write_bytes(change(rng, content))
    return f"{name} {change.__name__}"


def examine(run: Run, folder: Path) -> list[Fault]:
    faults: list[Fault] = []
    try:
        with limit_resources() as faults:
            found = restore_state(run.config, folder)
    except UserError as error:
        fault = check_line(str(error))
        return [fault] if fault else []
    except Exception as error:  # it is what is looked for
        return [*faults, describe_error(error)]
    if found is None:
        faults.append(Fault("begun anew", "though there is a sound checkpoint"))
    elif not are_equal(found, run.states.get(int(found["step"]), {})):
        unlike = [name for name, x in run.states[STEPS].items() if not np.array_equal(found.get(name), x)]
        faults.append(Fault("resumed with other numbers", f"step {int(found['step'])}, {unlike[:3]}"))
    return faults


@pytest.mark.parametrize("bits_alone", [True, False], ids=["a flipped bit", "any damage"])
def test_a_damaged_checkpoint_is_passed_over_or_harmless(bits_alone, undisturbed_run, draw, tmp_path):
    faults: dict[str, list[str]] = {}
    for number in range(max(1, draw.inputs // 50)) if draw.only is None else [draw.only]:
        rng = np.random.default_rng([draw.seed, bits_alone, number])
        folder = tmp_path / f"run{number}"
        shutil.copytree(undisturbed_run.folder, folder)
        how = damage(rng, folder / "checkpoints" / str(STEPS), bits_alone)
        for fault in examine(undisturbed_run, folder):
            faults.setdefault(fault.cause, []).append(f"number {number}, {how}: {fault.detail}")
        shutil.rmtree(folder)
    assert not faults, f"\n{format_faults(faults)}"


def test_a_run_none_of_whose_checkpoints_can_be_read_does_not_begin_anew(undisturbed_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed_run.folder, folder)
    for path in (folder / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError) as error:
        train_coder(undisturbed_run.config, folder)
    assert check_line(str(error.value)) is None
    assert (folder / "metrics.jsonl").read_bytes() == before


# Kills.


@contextlib.contextmanager
def training(run: Run, folder: Path) -> Iterator[subprocess.Popen]:
    """`jclt train` in a separate process, with as many devices as here."""
    recipe = folder.parent / "recipe.py"
    settings = "from jclt.coders import CoderConfig\nfrom jclt.training.config import TrainConfig\n"
    recipe.write_text(f"{settings}config = {run.config!r}\n")
    command = [sys.executable, "-m", "jclt", "train", str(recipe), "--out", str(folder)]
    environment = {**os.environ, **ENVIRONMENT}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def count_logged_steps(folder: Path) -> int:
    """The number of steps logged so far; -1 if there is no log."""
    path = folder / "metrics.jsonl"
    return len(re.findall(rb"\n", path.read_bytes())) if path.exists() else -1


def kill_somewhere(rng: Generator, run: Run, folder: Path) -> str | None:
    """Ends the run at a random moment: while it starts, at any step, or at its end. Returns None if it had finished."""
    goal, patience = int(rng.integers(-1, STEPS + 1)), float(rng.random() ** 2)
    number = pick(rng, (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
    with training(run, folder) as process:
        if goal < 0:
            time.sleep(4 * patience)
        else:
            while process.poll() is None and count_logged_steps(folder) < goal:
                time.sleep(0.002)
            time.sleep(0.5 * patience)
        if process.poll() is None:
            process.send_signal(number)
        _, err = process.communicate(timeout=300)
    if process.returncode == 0:
        return None
    allowed = {-number, 130, os.EX_TEMPFAIL}
    assert process.returncode in allowed, (process.returncode, err[-2000:].decode(errors="replace"))
    return f"{number.name} at step {count_logged_steps(folder)}"


def finish(run: Run, folder: Path) -> None:
    with training(run, folder) as process:
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err[-2000:].decode(errors="replace")


def test_a_run_that_is_killed_ends_in_the_same_bits(undisturbed_run, draw, tmp_path):
    """Kills each run several times before it may finish."""
    kills, most, number = [], max(1, draw.inputs // 50), 0
    while len(kills) < most:
        rng = np.random.default_rng([draw.seed, number])
        folder, number = tmp_path / f"run{number}", number + 1
        for _ in range(5):
            how = kill_somewhere(rng, undisturbed_run, folder)
            if how is None or len(kills) >= most:
                break
            kills.append(how)
        finish(undisturbed_run, folder)
        assert read_json(folder / "config.json") == read_json(undisturbed_run.folder / "config.json"), kills
        assert all(map(np.array_equal, read_coder(folder), undisturbed_run.coder)), kills
        assert read_run_metrics(folder) == undisturbed_run.metrics, kills
        assert not [path for path in folder.rglob("*.partial*")], kills
        shutil.rmtree(folder)
    print(f"{len(kills)} kills: {', '.join(kills)}")
