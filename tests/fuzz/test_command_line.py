"""Hostile arguments of the command line: each command runs, or refuses them in one line."""

import argparse
import contextlib
import importlib
import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.random import Generator

from fuzz.limits import Fault, check_line, describe_error, format_faults, limit_resources, list_tree
from fuzz.mutations import pick
from fuzz.samples import SAMPLES
from jclt.cli.main import build_parser, main
from jclt.errors import Interrupted

pytestmark = pytest.mark.fuzz

REACHED = os.EX_TEMPFAIL
"""The exit status if the arguments were valid, and the work would begin."""
WORK = {
    "jclt.attribution.attribute": ("trace_prompts",),
    "jclt.training.coder.train": ("find_run_rows",),
    "jclt.training.lm": ("find_rows",),
    "jclt.evaluation.evaluate": ("find_evaluation_rows",),
    "jclt.cli.circuit": ("draw_pairs",),
    "jclt.cli.demo": ("explain_examples",),
    "jclt.pods": ("plan_run", "plan_sweep"),
}
"""Functions that take long, by module. The tests replace them."""

ODD = (
    *("", " ", "-", "--", "=", "~", "a~b~c", "-1", "0", "1", "3", "1e9", "nan", "inf", "-inf", "1_0", "0x10", "١"),
    *("99999999999999999999", "9" * 5_000, "1.5", "true", "none", "[1, 2]", "(", "()", "{'a': 1}", "'"),
    *("\x1b[31mred", "two\nlines", "\r", "\u202eright to left", "\udcff", "\ud800", "Grüße", "日本", "🙂", "a" * 300),
    *("missing", "missing/file.txt", "a/b/c", ".", "..", "~nobody", "$HOME", "*", "[", "file.txt", "file.txt/x"),
    *("folder", "empty", "damaged.json", "loop", "no/../file.txt", "x.py", "x.npz", "x.json", "odd.py", "cut.py"),
    *("nothing://x", "file:///etc", "http://127.0.0.1:9/x", "gs://", "://", "memory://a", "s3://b/c", "hf://x"),
    *("demo", "tiny", "small-world", "world", "model", "coder", "tokens", "run", "prompts.txt", "circuit-tracer"),
)
SETTINGS = (
    *("steps", "batch", "length", "seed", "model", "data", "coder", "coder.features", "coder.k", "coder.layers"),
    *("coder.kind", "coder.reads", "coder.writes", "coder.activation", "coder.width", "model.width", "model.layers"),
    *("learning_rate", "warmup", "beta1", "beta2", "weight_decay", "save_every", "optimizer", "store", "shuffle"),
    *("dead_density", "headroom", "micro_batches", "data_shards", "path", "sparsity", "model.family", "tokenizer"),
    *("end_to_end_steps", "clip", "nonsense", "steps.steps", "coder.", ".", "model.model.model"),
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one file or folder of each kind that an argument can name."""
    root = tmp_path_factory.mktemp("command line")
    work = root / "work"
    for name in ("folder", "empty"):
        (work / name).mkdir(parents=True)
    for name, sample in (("model", "model-gpt2"), ("coder", "coder-jclt-clt"), ("tokens", "tokens"), ("run", "run")):
        SAMPLES[sample].make(work / name)
    (work / "folder" / "text.txt").write_text("ab ab")
    (work / "file.txt").write_text("one prompt\nanother\n")
    (work / "prompts.txt").write_text("one prompt\nanother\n")
    (work / "damaged.json").write_text("[" * 100_000)
    (work / "odd.py").write_text("config = 3\npod = 'none'\n")
    (work / "cut.py").write_text("import jclt\nconfig = (\n")
    (work / "x.json").write_text(json.dumps({"text": 3}))
    (work / "loop").symlink_to("loop")
    return root


@contextlib.contextmanager
def patch_work() -> Iterator[None]:
    def reached(*_: Any, **__: Any) -> None:
        raise Interrupted("reached")

    with pytest.MonkeyPatch.context() as patch:
        for module, names in WORK.items():
            for name in names:
                patch.setattr(importlib.import_module(module), name, reached)
        patch.setattr("jclt.cli.main._keep_compiled_programs", lambda: None)  # the tests set another cache
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


def list_subcommands() -> dict[str, argparse.ArgumentParser]:
    (choices,) = [
        action.choices for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)
    ]
    return dict(choices)


SOUND = {"out": "new", "dest": "new", "json": "new.json", "set": "steps=200", "to": "jclt", "tokenizer": "model"}
SOUND |= {"prompt": "the capital of", "prompts": "prompts.txt", "inputs": "file.txt", "coder": "demo", "model": "demo"}
SOUND |= {"task": "ioi", "nodes": "heads"}
SOUND |= {"config": "tiny", "source": "coder", "run": "run", "end": "5", "field": "text", "data": "world"}


def draw_command(rng: Generator) -> list[str]:
    """A command with some of its flags, each with a valid value, an odd one or none."""
    name = pick(rng, sorted(list_subcommands()))
    command, argv = list_subcommands()[name], [name]
    actions = [action for action in command._actions if action.dest != "help"]
    odd_at = int(rng.integers(len(actions)))
    for number, action in enumerate(actions):
        is_odd = number == odd_at or rng.random() < 0.1
        needed = action.required or not action.option_strings
        if not (is_odd or needed and action.nargs != "?" or rng.random() < 0.2):
            continue
        value = str(SOUND.get(action.dest, 1))
        if is_odd and action.dest == "set":
            value = f"{pick(rng, SETTINGS)}{pick(rng, ('=', '=', '=', '==', ''))}{pick(rng, ODD)}"
        elif is_odd:
            value = pick(rng, ODD)
        values = [] if action.nargs == 0 else [value] * int(rng.integers(1, 3)) if action.nargs == "+" else [value]
        flag = action.option_strings[-1:]
        argv += [f"{flag[0]}={values[0]}"] if flag and values and rng.random() < 0.5 else [*flag, *values]
    if rng.random() < 0.05:
        argv.insert(int(rng.integers(len(argv) + 1)), pick(rng, (*ODD, "--nonsense", "--help", "-v")))
    return [text for text in argv if "\0" not in text]


def run(argv: list[str], root: Path) -> tuple[int | None, str, str, list[Fault]]:
    """Runs a command in this process. Returns its exit status, stdout and stderr, and the faults in how it ended."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
    status, faults, log_level = None, [], logging.getLogger("jclt").level
    with contextlib.chdir(root / "work"), pytest.MonkeyPatch.context() as patch:
        for name in ("HOME", "XDG_CACHE_HOME"):
            patch.setenv(name, str(root / "home"))
        patch.setenv("COLUMNS", "200")
        try:
            with redirect_stdout(out), redirect_stderr(err), patch_work(), limit_resources() as faults:
                status = main(argv)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            faults.append(describe_error(error))
        finally:
            logging.getLogger("jclt").setLevel(log_level)
    texts = [stream.buffer.getvalue().decode("utf-8") for stream in (out, err)]  # type: ignore[attr-defined]
    return status, texts[0], texts[1], faults


def remove_usage(err: str) -> str:
    """The line of a refusal, without argparse's usage before it and without progress bars."""
    text = "\n".join(line for line in re.split(r"[\r\n]", err) if line and "%|" not in line)
    usage, mark, message = text.partition("\njclt")
    return "jclt" + message if mark and usage.startswith("usage:") else text


def run_and_check(argv: list[str], root: Path) -> list[Fault]:
    earlier = list_tree(root)
    status, _, err, faults = run(argv, root)
    new = sorted(path for path in list_tree(root) - earlier if not path.startswith("home"))
    try:
        if status is not None and status not in (0, 2, REACHED):
            faults.append(Fault(f"exit status {status}", err[-200:]))
        if status == 2:
            line = remove_usage(err)
            fault = check_line(line) if line.startswith("jclt") else Fault("no line that begins with jclt", err[-300:])
            faults += [fault] if fault else []
        # A command that ends with an error may leave empty folders.
        files = [path for path in new if not (root / path).is_dir()]
        half = [path for path in files if ".partial" in path and not path.endswith("manifest.partial.json")]
        # A folder of tokens is created before the first text is read, and its manifest says that it is unfinished.
        is_unfinished = argv[:1] == ["tokenize"] and any(path.endswith("manifest.partial.json") for path in files)
        if half or (status == 2 and files and not is_unfinished):
            faults.append(Fault(f"{argv[0]} leaves something behind", f"{files[:3]} {err[-100:]}"))
    finally:
        for path in sorted(new, key=len, reverse=True):
            target = root / path
            target.rmdir() if target.is_dir() and not target.is_symlink() else target.unlink(missing_ok=True)
    return faults


def test_hostile_arguments_are_refused_in_one_line(workplace, draw):
    faults: dict[str, list[str]] = {}
    for number in range(max(1, draw.inputs // 10)) if draw.only is None else [draw.only]:
        argv = draw_command(np.random.default_rng([draw.seed, number]))
        for fault in run_and_check(argv, workplace):
            faults.setdefault(fault.cause, []).append(f"number {number}, {ascii(argv)[:300]}: {fault.detail}")
    assert not faults, f"\n{format_faults(faults)}"


EXAMPLES = [
    ["attribute", "the", "--target", "a~b~c"],
    ["attribute", "\udcff"],
    ["attribute", "--prompts", "missing", "--out", "new"],
    ["attribute", "--prompts", "prompts.txt", "--out", "file.txt"],
    ["attribute", "the", "--out", "file.txt"],
    ["attribute", "the", "--tolerance", "nan"],
    ["attribute", "the", "--max-features", "-1"],
    ["eval", "demo", "--length", "0"],
    ["eval", "demo", "--length", "1"],
    ["eval", "demo", "--rows", "-1"],
    ["eval", "demo", "--rows", "0"],
    ["eval", "demo", "--seed", "-1"],
    ["train", "tiny", "--set", "seed=-1"],
    ["train", "tiny", "--set", "coder.reads=queries"],
    ["train", "tiny", "--set", "coder.reads=mlp_neurons"],
    ["train", "tiny", "--set", "coder.writes=mlp_denominator"],
    ["train", "tiny", "--set", "coder.reads=resid_post"],
    ["train", "tiny", "--set", "length=1"],
    ["train", "tiny", "--set", "beta1=1.0"],
    ["train", "tiny", "--set", "dead_density=2"],
    ["train", "tiny", "--set", "headroom=-1"],
    ["train", "tiny", "--set", "learning_rate=-1"],
    ["train", "tiny", "--set", "weight_decay=0.5"],
    ["train", "tiny", "--set", "coder.features=1000000000000"],
    ["train", "tiny", "--set", "steps=" + "9" * 5_000],
    ["train", "tiny", "--set", "coder.layers=((((((("],
    ["train", "tiny", "--out", "nothing://x"],
    ["train", "cut.py"],
    ["train-lm", "a\nb"],
    ["tokenize", "\x1b[31mred", "--tokenizer", "model", "--out", "new"],
    ["tokenize", "file.txt", "--tokenizer", "missing", "--out", "new"],
    ["convert", "demo", ".", "--to", "jclt"],
    ["convert", "coder", "file.txt/x", "--to", "jclt"],
    ["inspect", "file.txt"],
    ["inspect", "\x1b[31mred"],
    ["nonsense\x1b[31m"],
    ["eval", "demo", "--rows", "9" * 5_000],
    ["eval", "demo", "\x1b[31munknown"],
]


@pytest.mark.parametrize("argv", EXAMPLES, ids=lambda argv: ascii(" ".join(argv))[1:50])
def test_what_was_found_once_is_refused_before_any_work(argv, workplace):
    assert not run_and_check(argv, workplace)
    before = list_tree(workplace)
    assert run(argv, workplace)[0] == 2
    assert not [path for path in list_tree(workplace) - before if not path.startswith("home")]


@pytest.mark.parametrize("number", range(10))
def test_hostile_arguments_are_refused_in_a_separate_process_too(number, draw, workplace):
    """Where the locale lacks the letters, stdout or stderr is closed, or the environment is wrong."""
    if number >= (10 if draw.large else 2):
        pytest.skip("with -m fuzz")
    cases: list[tuple[list[str], dict[str, str], str]] = [
        (["tokenize", "\x1b[31mred\nGrüße", "--tokenizer", "model", "--out", "new"], {}, ""),
        (["attribute", "Grüße", "--model", "missing model"], {"LC_ALL": "C", "PYTHONUTF8": "0"}, ""),
        (["attribute", "\udcff", "--model", "missing model"], {}, ""),
        (["train", "tiny", "--set", "seed=-1"], {}, "2>&-"),
        (["train", "nonsense"], {}, "2>&-"),
        (["train", "tiny", "--set", "steps=1"], {"JCLT_COORDINATOR": "nonsense"}, ""),
        (["train", "tiny", "--set", "steps=1"], {"JCLT_COORDINATOR": "127.0.0.1:1", "JCLT_PROCESS": "7"}, ""),
        (["eval", "missing"], {"XDG_CACHE_HOME": "/dev/null", "HOME": "/dev/null"}, ""),
        (["inspect", "file.txt"], {"PYTHONIOENCODING": "ascii"}, ">&-"),
        (["train", "tiny", "--out", "\udcff", "--set", "seed=-1"], {}, ""),
    ]
    argv, environment, closed = cases[number]
    command = [sys.executable, "-m", "jclt", *argv]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path.cwd()), **environment}
    earlier = list_tree(workplace)
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *command]
    process = subprocess.run(shell, cwd=workplace / "work", env=env, capture_output=True, timeout=120)
    err = process.stderr.decode()
    assert process.returncode == 2, err
    if not closed.startswith("2"):
        line = remove_usage(err)
        assert line.startswith("jclt") and check_line(line) is None, err
    assert list_tree(workplace) == earlier
