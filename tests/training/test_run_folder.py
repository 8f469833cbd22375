"""A run's folder: its checkpoints, rows, settings, metrics and lock."""

import hashlib
import json
import logging
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from short_run import CONFIG, IGNORE_ABANDONED_LOADS, ONE_DEVICE_MESH, list_array_files

import jclt.training.coder.train as training
from jclt.coders import CoderConfig
from jclt.data.token_rows import TokenRows
from jclt.errors import Interrupted, UserError
from jclt.files import read_json, write_json
from jclt.mesh import make_mesh, make_sharding
from jclt.models import ModelConfig, load_model
from jclt.shapes import Array
from jclt.training.checkpoints import Checkpoints
from jclt.training.coder.batches import make_store_reader
from jclt.training.coder.conclusions import describe_step, list_conclusions
from jclt.training.coder.prepare import check_state_memory, complete_config
from jclt.training.config import LmConfig
from jclt.training.extension import explain_why_not_longer
from jclt.training.inspect import inspect_run
from jclt.training.loop import Progress, Reporting, catch_stop_signals, fit
from jclt.training.metrics import Log, draw_curves, read_metrics
from jclt.training.run_folder import LOCK, Place, find_place, is_begun, lock_place, replace_folder
from jclt.training.run_rows import find_rows

MODEL = ModelConfig("llama", 96, 16, 4, 2, 32, 32)
RUN = replace(CONFIG, coder=CoderConfig(features=64).fit_to_model(MODEL, "demo", "a" * 16))


# Checkpoints.


def weights(seed: float, mesh: jax.sharding.Mesh | None = None) -> dict[str, Array]:
    x = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32) * np.float32(seed)
    placed = make_sharding(mesh, x.shape, ("features", None)) if mesh else None
    return {"w": jax.device_put(x, placed), "low": jnp.asarray(x[0], jnp.bfloat16), "n": jnp.int32(seed)}


def save_steps(path: Path, *seeds: int, mesh: jax.sharding.Mesh | None = None) -> None:
    with Checkpoints(str(path)) as checkpoints:
        for seed in seeds:
            checkpoints.save(seed, weights(seed, mesh))


def are_equal(a: dict[str, Array], b: dict[str, Array]) -> bool:
    return all(np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes() for name in b)


@IGNORE_ABANDONED_LOADS
def test_no_flipped_bit_is_resumed_with_other_numbers(tmp_path, caplog):
    save_steps(tmp_path / "whole", 1, 2)
    rng, passed_over = random.Random(0), 0
    for number in range(20):
        damaged = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", damaged)
        file = rng.choice(list_array_files(damaged / "2"))
        content = bytearray(file.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        with Checkpoints(str(damaged)) as checkpoints:
            restored = checkpoints.restore(weights(0))
        assert restored is not None and (are_equal(restored, weights(1)) or are_equal(restored, weights(2))), file
        passed_over += are_equal(restored, weights(1))
        shutil.rmtree(damaged)
    assert passed_over > 2
    assert "checkpoint of step 2 cannot be read, passing over it" in caplog.text
    assert "are not those that were saved" in caplog.text


def test_sums_are_the_same_on_any_mesh_and_what_was_saved_without_them_is_said(tmp_path, caplog):
    two, four = make_mesh(1, 2), make_mesh(1, 4)
    with jax.set_mesh(two):
        save_steps(tmp_path / "run", 3, mesh=two)
    with jax.set_mesh(four), Checkpoints(str(tmp_path / "run")) as checkpoints:
        restored = checkpoints.restore(weights(0, four))
    assert restored is not None and are_equal(restored, weights(3)) and len(restored["w"].sharding.device_set) == 4
    ours = [record for record in caplog.records if record.name.startswith("jclt")]  # loads of others may end meanwhile
    assert not [record for record in ours if record.levelno >= logging.WARNING]
    with ocp.training.Checkpointer(str(tmp_path / "old")) as checkpointer:
        checkpointer.save(4, {"state": weights(4)}, force=True)
    with Checkpoints(str(tmp_path / "old")) as checkpoints:
        restored = checkpoints.restore(weights(0))
    assert restored is not None and are_equal(restored, weights(4))
    assert "checkpoint of step 4 was saved without sums: nothing can tell whether it is damaged" in caplog.text


@IGNORE_ABANDONED_LOADS
def test_a_run_whose_checkpoints_cannot_be_read_is_not_begun_anew(tmp_path, monkeypatch):
    save_steps(tmp_path / "run", 1, 2)
    before = sorted(path for path in (tmp_path / "run").rglob("*"))
    other = weights(0) | {"more": jnp.zeros(3)}
    with Checkpoints(str(tmp_path / "run")) as checkpoints, pytest.raises(UserError) as error:
        checkpoints.restore(other)
    assert "none of the checkpoints can be read, of step 2 for this reason: holds no array 'more'" in str(error.value)
    for step in ("1", "2"):
        for file in list_array_files(tmp_path / "run" / step):
            file.write_bytes(file.read_bytes()[:10])
    with Checkpoints(str(tmp_path / "run")) as checkpoints, pytest.raises(UserError, match="none of the checkpoints"):
        checkpoints.restore(weights(0))
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before
    with Checkpoints(str(tmp_path / "new")) as checkpoints:
        assert checkpoints.restore(weights(0)) is None
    monkeypatch.setattr(ocp.training, "Checkpointer", lambda *_, **__: (_ for _ in ()).throw(OSError("no answer")))
    with pytest.raises(UserError, match=r"checkpoints cannot be listed \(no answer\)"):
        Checkpoints(str(tmp_path / "run"))


def test_a_full_disk_is_said_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError) as error, Checkpoints(str(tmp_path / "run")) as checkpoints:
        checkpoints.save(1, weights(1))
        checkpoints.wait()

        def full(*_: object, **__: object) -> None:
            raise ValueError("RESOURCE_EXHAUSTED: Failed writing:\n  No space left on device [os_error_code='28']")

        monkeypatch.setattr(checkpoints.checkpointer, "save_async", full)
        checkpoints.save(2, weights(2))
    message = "a checkpoint cannot be written (No space left on device); the newest checkpoint is of step 1"
    assert str(error.value) == f"{tmp_path / 'run'}: {message}"
    with Checkpoints(str(tmp_path / "run")) as checkpoints:
        restored = checkpoints.restore(weights(0))
    assert restored is not None and are_equal(restored, weights(1))


# The loop.


class Counting(NamedTuple):
    step: Array


def count_steps(tmp_path: Path, steps: int = 4, **options):
    """Runs a loop whose state only counts steps. Returns the entries of its log."""

    def advance(step: int, state: Counting, _: int) -> tuple[Counting, dict[str, Array]]:
        return Counting(state.step + 1), {"loss": jnp.float32(step), **options.get("metrics", {})}

    with Checkpoints(str(tmp_path / "checkpoints")) as checkpoints:
        state = checkpoints.restore(Counting(jnp.int32(0))) or Counting(jnp.int32(0))
        with Log(tmp_path, int(state.step)) as log:
            fit(
                state,
                advance,
                lambda step: step,
                steps,
                checkpoints,
                log,
                Reporting(
                    describe=str,
                    every=1,
                    evaluate=options.get("evaluate"),
                    evaluate_every=options.get("evaluate_every", 0),
                ),
                save_every=options.get("save_every", 100),
            )
    return read_metrics(tmp_path / "metrics.jsonl")


def test_an_evaluation_comes_after_the_checkpoint_and_may_fail(tmp_path, caplog):
    seen: list[tuple[int, bool]] = []

    def evaluate(state: Counting) -> dict[str, float]:
        step = int(state.step)
        seen.append((step, (tmp_path / "checkpoints").exists() and any((tmp_path / "checkpoints").glob(f"{step}*"))))
        if step == 2:
            raise ZeroDivisionError("division\nby zero")
        return {"agreement": 0.5}

    entries = count_steps(tmp_path, 8, evaluate=evaluate, evaluate_every=2, save_every=2)
    assert seen == [(2, True), (4, True), (6, True)]
    assert [entry["step"] for entry in entries if "agreement" in entry] == [4, 6]
    assert "step 2 could not be evaluated, the run goes on without (division)" in caplog.text
    assert len([entry for entry in entries if "loss" in entry]) == 8

    def stop(state: Counting) -> dict[str, float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        count_steps(tmp_path / "other", 8, evaluate=stop, evaluate_every=2, save_every=2)
    # What ended between its checkpoint and the evaluation is evaluated when it goes on.
    entries = count_steps(
        tmp_path / "other", 8, evaluate=lambda state: {"agreement": 1.0}, evaluate_every=2, save_every=2
    )
    assert [entry["step"] for entry in entries if "agreement" in entry] == [2, 4, 6]


def test_only_the_loss_and_the_gradient_stop_a_run(tmp_path):
    entries = count_steps(tmp_path, metrics={"nmse": jnp.float32(np.nan), "layers_nmse": jnp.array([1.0, np.inf])})
    assert [entry["nmse"] for entry in entries] == [None] * 4 and entries[0]["layers_nmse"] == [1.0, None]
    with pytest.raises(UserError, match="gradient_norm is inf at step 1; no checkpoint has been saved yet"):
        count_steps(tmp_path / "other", metrics={"gradient_norm": jnp.float32(np.inf)})


def test_metrics_on_a_full_disk_say_which_checkpoint_there_is(tmp_path, monkeypatch):
    count_steps(tmp_path, 2)
    open_file = Path.open
    full = lambda path, mode="r", *a, **k: open_file(Path("/dev/full") if mode == "a" else path, mode, *a, **k)  # noqa: E731
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError) as error:
        count_steps(tmp_path, 4)
    message = "metrics.jsonl: cannot be written (No space left on device); the newest checkpoint is of step 2"
    assert str(error.value) == f"{tmp_path}/{message}"


def send_two() -> None:
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)  # the system passes on one of two that nobody has taken yet


def test_a_signal_is_noted_and_a_second_one_obeyed():
    handler = signal.getsignal(signal.SIGINT)  # none in what a shell runs in the background
    with pytest.raises(KeyboardInterrupt), catch_stop_signals() as should_stop:
        assert not should_stop(0)
        signal.raise_signal(signal.SIGINT)
        assert should_stop(1)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second one has no effect")
    # Two that come while no handler runs are two all the same.
    with pytest.raises(KeyboardInterrupt), catch_stop_signals() as should_stop:
        thread = threading.Thread(target=send_two)
        thread.start()
        hashlib.sha256(bytes(300 << 20))  # during which Python runs no handler
        thread.join()
        pytest.fail("the second one has no effect")
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_thread_has_no_signals_of_its_own():
    answers: list[bool] = []

    def work() -> None:
        with catch_stop_signals() as should_stop:
            answers.append(should_stop(0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [False]


def test_a_file_of_logs_gets_lines_and_no_bar(capsys, caplog):
    caplog.set_level(logging.INFO)
    with Progress(0, 100) as progress:
        for step in range(1, 101):
            progress.show(step, "nmse 0.5", 1000.0)
            progress.update(step)
    lines = [record.message for record in caplog.records]
    assert lines[0] == "step 1 of 100: compiling" and len(lines) == 11
    assert lines[1].startswith("step 10 of 100: nmse 0.5 1,000 tokens/s") and lines[1].endswith("B")
    assert "it/s" not in capsys.readouterr().err


# Metrics.


def test_metrics_are_json_and_damaged_lines_are_passed_over(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1, "loss": NaN}\n\xff{"step": 2}\n[3]\n{"loss": 4}\n{"step": 3, "loss": 2.0}\n{"st')
    with Log(tmp_path, 3) as log:
        log.write({"step": 4, "loss": float("inf"), "layers": [1.0, float("nan")], "dead": None})
        log.write({"step": 4, "agreement": 0.5})
        assert log.has_evaluation(4) and not log.has_evaluation(3)

    def refuse(name: str) -> None:
        pytest.fail(f"{name} is no JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3, 4, 4]
    assert lines[0]["loss"] is None and lines[2] == {"step": 4, "loss": None, "layers": [1.0, None], "dead": None}
    draw_curves(read_metrics(file), ("loss", "dead"), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_what_a_run_shows_and_says_at_its_end():
    values = {"nmse": 0.5, "l0": 12.0, "dead": float("nan"), "skipped": 0}
    assert describe_step(values) == "nmse 0.5000 L0 12.0 dead -" == describe_step(values | {"dead": None})
    assert describe_step(values | {"dead": 0.25}) == "nmse 0.5000 L0 12.0 dead 25%"
    last = {
        "step": {"step": 9, "loss": 1.0, "dead": 0.62, "layers_l0": [20.6, 10.7, 6.1, 0.04]},
        "evaluation": {"step": 9, "agreement": 0.5, "kl_replaced": 1.25, "recovered": None},
    }
    coder = replace(RUN.coder, activation="jumprelu")
    evaluated, dead, starved, *_ = list_conclusions(coder, last)
    assert evaluated.endswith("agrees with the model on 50.0% of the tokens, KL 1.250, recovered - of the loss")
    assert dead.startswith("62% of the features are dead")
    assert starved == "hardly a feature is active in layer 3"
    fine = {"step": {"step": 9, "loss": 1.0, "dead": None, "layers_l0": [20.6, 10.7, 6.1, 4.0]}}
    assert not any("dead" in line or "hardly" in line for line in list_conclusions(coder, fine))


def test_weights_and_biases_knows_a_run_by_its_place(tmp_path, monkeypatch):
    ids: list[str] = []

    class Run:
        def log(self, numbers: dict[str, float], step: int) -> None:
            assert numbers == {"loss": 1.0} and step == 1

        def finish(self) -> None:
            pass

    def init(**options) -> Run:
        ids.append(options["id"])
        return Run()

    monkeypatch.setenv("WANDB_PROJECT", "p")
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for folder in ("a/run", "b/run", "a/run"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        with Log(tmp_path / folder, 0) as log:
            log.write({"step": 1, "loss": 1.0, "dead": float("nan")})
    assert ids[0] == ids[2] != ids[1] and all(name.startswith("run-") for name in ids)


# The folder.


def test_a_second_run_in_a_folder_is_refused(tmp_path):
    with lock_place(tmp_path / "run") as home:
        assert [path.name for path in home.folder.iterdir()] == [LOCK]
        assert not is_begun(home.folder, RUN)  # the lock is nobody's work
        with pytest.raises(UserError) as error, lock_place(tmp_path / "run"):
            pass
        message = f"in use by another run (process {os.getpid()} of {socket.gethostname()}), expected it to end first"
        assert str(error.value) == f"{tmp_path / 'run'}: {message}"
    assert not (tmp_path / "run").exists()  # nothing was begun
    with lock_place(tmp_path / "run") as home:
        write_json(home.folder / "config.json", asdict(RUN))
    with lock_place(tmp_path / "run") as home:
        assert is_begun(home.folder, RUN)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="exists and is not a run of jclt"), lock_place(tmp_path / "file"):
        pass
    with pytest.raises(UserError, match=r"a\\udcff': not a UTF-8 name"), lock_place(tmp_path / "a\udcff"):
        pass
    assert find_place(f"file://{tmp_path}/run") == find_place(tmp_path / "run")


def test_a_run_of_other_settings_is_named_by_the_one_that_differs(tmp_path):
    write_json(tmp_path / "config.json", asdict(RUN))
    with pytest.raises(UserError) as error:
        is_begun(tmp_path, replace(RUN, coder=replace(RUN.coder, features=128)))
    message = "holds a run with coder.features=64, expected coder.features=128"
    assert str(error.value) == f"{tmp_path}: {message}"
    with pytest.raises(UserError, match="the weights of model 'demo' are others than when the run began"):
        is_begun(tmp_path, replace(RUN, coder=replace(RUN.coder, model_fingerprint="b" * 16)))
    older = asdict(RUN)
    del older["coder"]["model_fingerprint"]
    write_json(tmp_path / "config.json", older)
    assert is_begun(tmp_path, RUN)


def test_a_run_begun_with_a_setting_that_was_removed_goes_on_if_it_had_its_present_value(tmp_path):
    older = asdict(RUN) | {"density_decay": 0.99, "running_decay": 0.9, "initial_rate": 10_000.0}
    write_json(tmp_path / "config.json", older)
    assert is_begun(tmp_path, RUN)
    assert "density_decay = 0.99" in inspect_run(tmp_path)
    write_json(tmp_path / "config.json", older | {"density_decay": 0.9})
    with pytest.raises(UserError) as error:
        is_begun(tmp_path, RUN)
    message = "holds a run with density_decay=0.9, expected density_decay=0.99, a constant by now"
    assert str(error.value) == f"{tmp_path}: {message}"
    assert "density_decay = 0.9" in inspect_run(tmp_path)
    write_json(tmp_path / "config.json", older | {"initial": "january", "optimizer": "lion"})
    with pytest.raises(UserError, match="holds a run with initial=january, expected initial=transposed$"):
        is_begun(tmp_path, RUN)


def test_a_run_is_made_longer_where_no_step_of_it_would_have_been_another(tmp_path):
    constant = replace(RUN, steps=100, schedule="constant", sparsity="none", warmup=5)
    write_json(tmp_path / "config.json", asdict(constant))
    assert is_begun(tmp_path, replace(constant, steps=200), lambda: 100)
    with pytest.raises(UserError, match="holds a run with steps=100, expected steps=50$"):
        is_begun(tmp_path, replace(constant, steps=50), lambda: 100)
    linear = replace(constant, schedule="linear", decay=0.2)
    assert explain_why_not_longer(replace(linear, steps=200), 100, 80) is None
    write_json(tmp_path / "config.json", asdict(linear))
    with pytest.raises(UserError) as error:
        is_begun(tmp_path, replace(linear, steps=200), lambda: 90)
    reason = "(it cannot be made longer, its learning rate up to step 90 would have been another)"
    assert str(error.value) == f"{tmp_path}: holds a run with steps=100, expected steps=200 {reason}"
    cosine = replace(constant, schedule="cosine")
    assert explain_why_not_longer(replace(cosine, steps=200), 100, 50) is not None
    ramp = replace(constant, sparsity="tanh", sparsity_ramp=0.1)
    assert explain_why_not_longer(replace(ramp, steps=200), 100, 50) == "sparsity_ramp=0.1 is a share of all steps"
    ends = replace(constant, end_to_end_steps=20)
    assert explain_why_not_longer(replace(ends, steps=200), 100, 80) is None
    assert explain_why_not_longer(replace(ends, steps=200), 100, 81) == "its end-to-end steps have begun"
    assert explain_why_not_longer(replace(LmConfig(MODEL), steps=200), 100, 10) is not None
    assert explain_why_not_longer(replace(LmConfig(MODEL), steps=200), 100, 0) is None


def test_rows_are_those_that_the_run_began_with(tmp_path):
    generated = np.arange(640, dtype=np.uint16).reshape(40, 16) % 90, np.ones((40, 16), np.float16)

    def rows(config=RUN):
        return find_rows(Place(tmp_path), config, 96, None, (), lambda: generated)

    assert len(rows()) == len(rows()) == 40
    assert read_json(tmp_path / "data.json")["rows"] == 40
    for name in ("tokens", "weights"):
        file = tmp_path / "data" / f"{name}.npy"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(
            UserError, match=r"data 'world': other tokens than those .* began with; where .* is damaged"
        ):
            rows()
        content[-1] ^= 1
        file.write_bytes(content)
    rows(replace(RUN, steps=100))
    assert read_json(tmp_path / "config.json")["steps"] == 100


def test_nothing_of_a_run_that_is_not_the_one_at_the_url_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url = "memory://bucket/anew"
    with lock_place(url) as home:
        for name in ("config.json", "coder/W", "data/tokens.npy", LOCK, "coder.old/W"):
            (home.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (home.folder / name).write_text(name)
        home.publish()
        system, path = fsspec.url_to_fs(url)
        names = {name.removeprefix(f"{path}/") for name in system.find(path)}
        assert names == {"config.json", "coder/W"}
        with pytest.raises(UserError, match="in use by another run"), lock_place(url):
            pass
    assert (find_place(url).folder / "data" / "tokens.npy").exists()
    (home.folder / "elsewhere").symlink_to(tmp_path)
    system.pipe_file(f"{path}/config.json", b"{}")  # begun anew on another host
    again = find_place(url)
    assert sorted(item.name for item in again.folder.iterdir()) == ["config.json"]
    (again.folder / "data").mkdir()
    system.rm(path, recursive=True)
    assert not list(find_place(url).folder.iterdir()) and tmp_path.exists()


def test_what_was_just_made_takes_an_older_folders_place(tmp_path):
    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "new").write_text("")

    (tmp_path / "coder.new").mkdir()  # of a run that was killed
    for _ in range(2):
        replace_folder(tmp_path / "coder", write)
        assert [path.name for path in tmp_path.iterdir()] == ["coder"]
    (tmp_path / "coder" / "old").write_text("")
    with pytest.raises(Interrupted):
        replace_folder(tmp_path / "coder", lambda folder: (_ for _ in ()).throw(Interrupted()))
    assert (tmp_path / "coder" / "old").exists()


@IGNORE_ABANDONED_LOADS
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_shown(tmp_path, monkeypatch):
    write_json(tmp_path / "config.json", {"steps": 2})
    layers = {f"coder.layers.{n}.encoder": jnp.zeros((4, 2)) for n in range(30)}
    layers |= {f"coder.layers.{n}.decoder": jnp.zeros((4, 30 - n, 2)) for n in range(30)}
    with Checkpoints(str(tmp_path / "checkpoints")) as checkpoints:
        checkpoints.save(1, layers)
        checkpoints.save(2, layers)
    for file in list_array_files(tmp_path / "checkpoints" / "2"):
        file.write_bytes(file.read_bytes()[:10])
    with Log(tmp_path, 0) as log:
        log.write({"step": 2, "loss": 1.0})
        log.write({"step": 2, "agreement": 0.75, "kl_replaced": 0.5, "recovered": 0.25})
    text = inspect_run(tmp_path)
    assert "that of step 2 cannot be read (" in text and "in that of step 1:" in text
    assert "agrees with the model on 75.0% of the tokens, KL 0.500, recovered 25.0% of the loss" in text
    assert "coder.layers.*.encoder             30 x float32   [4, 2]" in text
    assert "coder.layers.*.decoder             30 x float32   [4, 1 to 30, 2]" in text
    assert len(text.splitlines()) < 20

    def read_only(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("jclt.training.inspect.draw_curves", read_only)
    assert "curves could not be drawn" in inspect_run(tmp_path) and "sha256" in inspect_run(tmp_path)


def test_a_store_is_known_by_the_models_weights(tmp_path, monkeypatch):
    def refuse(_: str, description: dict[str, object], *others: object) -> None:
        raise UserError(json.dumps(description))

    monkeypatch.setattr("jclt.training.coder.batches.create_store", refuse)
    model = load_model("demo", mesh=make_mesh(1, 4))
    coder = CONFIG.coder.fit_to_model(model.config, "demo", model.fingerprint)
    config = replace(CONFIG, coder=coder, store=str(tmp_path / "store"))
    rows = TokenRows(np.zeros((8, 16), np.uint16), np.ones((8, 16), np.float16))
    with pytest.raises(UserError) as error:
        make_store_reader(config, model, rows, 8)
    assert json.loads(str(error.value))["model_weights"] == model.fingerprint


# What cannot work.


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"seed": -1}, "setting 'seed': -1, expected 0 to 4294967295"),
        ({"length": 1}, "setting 'length': 1, expected at least 2"),
        ({"learning_rate": 0.0}, "setting 'learning_rate': 0.0, expected more than 0"),
        ({"beta1": 1.0}, "setting 'beta1': 1.0, expected at least 0 and less than 1"),
        ({"headroom": -1.0}, "setting 'headroom': -1.0, expected at least 1"),
        ({"evaluate_every": -2}, "setting 'evaluate_every': -2, expected at least -1"),
        ({"sparsity_ramp": 1.5}, "setting 'sparsity_ramp': 1.5, expected 0 to 1"),
        ({"clip": float("nan")}, "setting 'clip': nan, expected a number"),
        ({"store": "s", "store_rows": 3}, "setting 'store_rows': 3, expected at least batch=8"),
        (
            {"weight_decay": 0.5},
            "setting 'weight_decay': 0.5, expected 0 under optimizer=adam, or optimizer=adamw",
        ),
        ({"reads": "queries"}, "setting 'coder.reads': queries is no vector of the model's width, expected one of: "),
        ({"writes": "mlp_denominator"}, "setting 'coder.writes': mlp_denominator is no vector of the model's width"),
        ({"writes": "logits"}, "setting 'coder.writes': logits is no vector of the model's width"),
        (
            {"reads": "resid_post"},
            "setting 'coder.reads': resid_post comes after mlp_out, which the coder writes, expected a site before it",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(change, line):
    sites = {name: change[name] for name in ("reads", "writes") if name in change}
    others = {name: value for name, value in change.items() if name not in sites}
    config = replace(CONFIG, coder=replace(CONFIG.coder, **sites), **others)
    with pytest.raises(UserError) as error:
        complete_config(config, MODEL, make_mesh(1, 4))
    assert str(error.value).startswith(line)


def test_a_coder_that_no_memory_holds_is_refused():
    config = replace(RUN, coder=replace(RUN.coder, features=8_000_000_000))
    with pytest.raises(UserError) as error:
        check_state_memory(config, make_mesh(1, 4))
    assert "setting 'coder.features': 8000000000 of 4 layers: needs" in str(error.value)
    fits = int(str(error.value).split("; ")[1].split(" ")[0].replace(",", ""))
    assert 1000 < fits < 8_000_000_000
    check_state_memory(replace(config, coder=replace(config.coder, features=512)), make_mesh(1, 4))


def test_a_run_ends_with_its_coder_whatever_its_evaluation_does_and_can_be_made_longer(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    short = replace(CONFIG, steps=3, warmup=0, schedule="constant", sparsity="none", evaluate_every=0)

    def fails(*_: object, **__: object) -> None:
        raise IndexError("list index out of range")

    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate_replacement", fails)
        training.train_coder(short, tmp_path / "run", ONE_DEVICE_MESH)
    assert "step 3 could not be evaluated, the run goes on without (list index out of range)" in caplog.text
    before = (tmp_path / "run" / "coder" / "W_enc_0.safetensors").read_bytes()
    training.train_coder(replace(short, steps=6), tmp_path / "run", ONE_DEVICE_MESH)
    assert "evaluating the replacement model" in caplog.text and "agrees with the model on" in caplog.text
    entries = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6, 6] and "agreement" in entries[-1]
    assert (tmp_path / "run" / "coder" / "W_enc_0.safetensors").read_bytes() != before
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_run_on_a_bucket_keeps_its_small_files_there(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url = "memory://bucket/run/"
    place = find_place(url)
    assert place.url == "memory://bucket/run" and place.checkpoints == "memory://bucket/run/checkpoints"
    (place.folder / "coder").mkdir(parents=True)
    (place.folder / "data").mkdir()
    for name in ("config.json", "metrics.jsonl", "coder/W.safetensors", "data/tokens.npy", "metrics.partial"):
        (place.folder / name).write_text(name)
    place.publish()
    system, path = fsspec.url_to_fs(url)
    names = {name.removeprefix(f"{path.rstrip('/')}/") for name in system.find(path)}
    assert names == {"config.json", "metrics.jsonl", "coder/W.safetensors"}
    # Whatever this host kept, the files in the bucket count: another host can have written them.
    system.pipe_file(f"{path}/config.json", b"newer")
    assert (find_place(url).folder / "config.json").read_text() == "newer"
    system.rm(path, recursive=True)
    assert not (find_place(url).folder / "config.json").exists()


def test_a_folder_is_its_own_place(tmp_path):
    place = find_place(tmp_path / "run")
    assert place.folder == tmp_path / "run" and place.url is None
    assert place.checkpoints == str(tmp_path / "run" / "checkpoints")
    place.publish()
    assert not place.folder.exists()
