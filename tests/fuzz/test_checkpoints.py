"""A run whose checkpoints are damaged or that is killed at any moment: it goes on to the same bits, or says why not."""

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

from fuzz.limits import Fault, check_line, fault_of, limited, told
from fuzz.mutations import BYTES, empty, flip_bit, pick
from fuzz.samples import GPT2, random_model
from jclt.coders import CoderConfig, load_coder
from jclt.errors import UserError
from jclt.files import read_json
from jclt.models import load_model, save_model
from jclt.sharding import make_mesh
from jclt.training.abstract import abstract_state
from jclt.training.checkpoints import Checkpoints, leaves
from jclt.training.coder import fitted, train_coder
from jclt.training.config import TrainConfig
from jclt.training.metrics import read_metrics

pytestmark = [
    pytest.mark.fuzz,
    # Orbax leaves what else it had begun to read when one of the reads fails.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

STEPS, EVERY = 12, 4
SETTINGS = {"steps": STEPS, "batch": 8, "length": 8, "warmup": 2, "save_every": EVERY, "log_every": 1}
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
TRAIN = """
import sys
import jclt.training.coder
from jclt.cli import main

jclt.training.coder.machine_rate = lambda *_: 1e12
sys.exit(main(["train", *sys.argv[1:]]))
"""
VOLATILE = ("seconds", "tokens_per_second", "matmul_fraction")


@dataclass(frozen=True)
class Run:
    """One that was never disturbed."""

    config: TrainConfig
    folder: Path
    coder: list[np.ndarray]
    metrics: list[dict[str, Any]]
    states: dict[int, dict[str, np.ndarray]]
    """What each of its checkpoints holds."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, draw) -> Run:
    """Of a model and data as small as can be, since what takes time is to compile; of so many features that a
    checkpoint's arrays lie in chunks of their own, which no checksum of the format protects."""
    if not draw.large:
        pytest.skip("a run is trained for -m fuzz alone; tests/test_runs.py flips bits and cuts checkpoints by default")
    home = tmp_path_factory.mktemp("undisturbed")
    save_model(random_model(GPT2), home / "model")
    (home / "text.txt").write_text("ab a b ab b ab ab a\n" * 200)
    places = {"model": str(home / "model"), "data": str(home / "text.txt")}
    config = TrainConfig(CoderConfig(features=1024, layers=(1,)), **places, **SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jclt.training.coder.machine_rate", no_rate)
        train_coder(config, home / "run")
    states = {}
    for step, other in ((STEPS, STEPS - EVERY), (STEPS - EVERY, STEPS)):
        shutil.copytree(home / "run", home / f"step {step}")
        shutil.rmtree(home / f"step {step}" / "checkpoints" / str(other))
        found = restored(config, home / f"step {step}")
        assert found is not None and int(found["step"]) == step
        states[step] = found
    assert any((states[STEPS][name] != x).any() for name, x in states[STEPS - EVERY].items())
    return Run(config, home / "run", coder_of(home / "run"), metrics_of(home / "run"), states)


def no_rate(*_: Any) -> float:
    """In place of measuring how fast the machine multiplies, which takes most of a tiny run's time."""
    return 1e12


def coder_of(folder: Path) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(load_coder(folder / "coder", check=False))]


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    entries = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in entry.items() if name not in VOLATILE} for entry in entries]


def restored(config: TrainConfig, folder: Path) -> dict[str, np.ndarray] | None:
    """What a run in this folder would go on from."""
    mesh = make_mesh()
    whole = fitted(config, load_model(config.model).config, mesh)
    with jax.set_mesh(mesh), Checkpoints(str((folder / "checkpoints").absolute())) as checkpoints:
        found = checkpoints.restore(abstract_state(whole, mesh))
    return None if found is None else {name: np.asarray(x) for name, x in leaves(found).items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(x.dtype == b[name].dtype and (x == b[name]).all() for name, x in a.items())


# Damage.


def number_files(folder: Path) -> list[Path]:
    """Those that hold the arrays of a checkpoint."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.parent.name == "d")


def damage(rng: Generator, newest: Path, bits_alone: bool) -> str:
    files = number_files(newest) if bits_alone else sorted(path for path in newest.rglob("*") if path.is_file())
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
        with limited() as faults:
            found = restored(run.config, folder)
    except UserError as error:
        fault = check_line(str(error))
        return [fault] if fault else []
    except Exception as error:  # it is what is looked for
        return [*faults, fault_of(error)]
    if found is None:
        faults.append(Fault("begun anew", "though there is a sound checkpoint"))
    elif not same(found, run.states.get(int(found["step"]), {})):
        unlike = [name for name, x in run.states[STEPS].items() if not np.array_equal(found.get(name), x)]
        faults.append(Fault("resumed with other numbers", f"step {int(found['step'])}, {unlike[:3]}"))
    return faults


@pytest.mark.parametrize("bits_alone", [True, False], ids=["a flipped bit", "any damage"])
def test_a_damaged_checkpoint_is_passed_over_or_harmless(bits_alone, undisturbed, draw, tmp_path):
    faults: dict[str, list[str]] = {}
    for number in range(max(1, draw.inputs // 50)) if draw.only is None else [draw.only]:
        rng = np.random.default_rng([draw.seed, bits_alone, number])
        folder = tmp_path / f"run{number}"
        shutil.copytree(undisturbed.folder, folder)
        how = damage(rng, folder / "checkpoints" / str(STEPS), bits_alone)
        for fault in examine(undisturbed, folder):
            faults.setdefault(fault.cause, []).append(f"number {number}, {how}: {fault.detail}")
        shutil.rmtree(folder)
    assert not faults, f"\n{told(faults)}"


def test_a_run_none_of_whose_checkpoints_can_be_read_does_not_begin_anew(undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed.folder, folder)
    for path in (folder / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError) as error:
        train_coder(undisturbed.config, folder)
    assert check_line(str(error.value)) is None
    assert (folder / "metrics.jsonl").read_bytes() == before


# Kills.


@contextlib.contextmanager
def training(run: Run, folder: Path) -> Iterator[subprocess.Popen]:
    """`jclt train` in a process of its own, with as many devices as here."""
    recipe = folder.parent / "recipe.py"
    settings = "from jclt.coders import CoderConfig\nfrom jclt.training.config import TrainConfig\n"
    recipe.write_text(f"{settings}config = {run.config!r}\n")
    command = [sys.executable, "-c", TRAIN, str(recipe), "--out", str(folder)]
    environment = {**os.environ, **ENVIRONMENT}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def progress(folder: Path) -> int:
    """Steps logged so far."""
    path = folder / "metrics.jsonl"
    return len(re.findall(rb"\n", path.read_bytes())) if path.exists() else -1


def kill_somewhere(rng: Generator, run: Run, folder: Path) -> str | None:
    """Ends the run at a random moment: while it starts, at any of its steps, or at its end; None if it was done."""
    goal, patience = int(rng.integers(-1, STEPS + 1)), float(rng.random() ** 2)
    number = pick(rng, (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
    with training(run, folder) as process:
        if goal < 0:
            time.sleep(4 * patience)
        else:
            while process.poll() is None and progress(folder) < goal:
                time.sleep(0.002)
            time.sleep(0.5 * patience)
        if process.poll() is None:
            process.send_signal(number)
        _, err = process.communicate(timeout=300)
    if process.returncode == 0:
        return None
    allowed = {-number, 130, os.EX_TEMPFAIL}
    assert process.returncode in allowed, (process.returncode, err[-2000:].decode(errors="replace"))
    return f"{number.name} at step {progress(folder)}"


def finish(run: Run, folder: Path) -> None:
    with training(run, folder) as process:
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err[-2000:].decode(errors="replace")


def test_a_run_that_is_killed_ends_in_the_same_bits(undisturbed, draw, tmp_path):
    """Again and again, until it is done; then another one."""
    kills, most, number = [], max(1, draw.inputs // 50), 0
    while len(kills) < most:
        rng = np.random.default_rng([draw.seed, number])
        folder, number = tmp_path / f"run{number}", number + 1
        for _ in range(5):
            how = kill_somewhere(rng, undisturbed, folder)
            if how is None or len(kills) >= most:
                break
            kills.append(how)
        finish(undisturbed, folder)
        assert read_json(folder / "config.json") == read_json(undisturbed.folder / "config.json"), kills
        assert all(map(np.array_equal, coder_of(folder), undisturbed.coder)), kills
        assert metrics_of(folder) == undisturbed.metrics, kills
        assert not [path for path in folder.rglob("*.partial*")], kills
        shutil.rmtree(folder)
    print(f"{len(kills)} kills: {', '.join(kills)}")
