"""The command line, given arguments as wrong as they come: it does what it is told or refuses in one line."""

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
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.random import Generator

from fuzz.limits import Fault, check_line, fault_of, limited, told, tree
from fuzz.mutations import pick
from fuzz.samples import SAMPLES
from jclt.cli import main, parser
from jclt.errors import Interrupted

pytestmark = pytest.mark.fuzz

REACHED = os.EX_TEMPFAIL
"""The arguments were sound, and the work would begin."""
WORK = {
    "jclt.attribution.attribute": ("trace_prompts",),
    "jclt.training.coder": ("run_rows",),
    "jclt.training.lm": ("find_rows",),
    "jclt.training.evaluate": ("evaluation_rows",),
    "jclt.viewer.demo": ("attribute_batch", "answers"),
    "jclt.pods": ("plan_run", "plan_sweep"),
}
"""What takes long, by module: it is not done here."""

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
    *("density_decay", "headroom", "micro_batches", "data_shards", "path", "sparsity", "model.family", "tokenizer"),
    *("end_to_end_steps", "clip", "nonsense", "steps.steps", "coder.", ".", "model.model.model"),
)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a little of everything that an argument can name."""
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
def without_work() -> Iterator[None]:
    def reached(*_: Any, **__: Any) -> None:
        raise Interrupted("reached")

    with pytest.MonkeyPatch.context() as patch:
        for module, names in WORK.items():
            for name in names:
                patch.setattr(importlib.import_module(module), name, reached)
        patch.setattr("jclt.cli._keep_compiled_programs", lambda: None)  # the tests have their own cache
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (choices,) = [action.choices for action in parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(choices)


SOUND = {"out": "new", "dest": "new", "json": "new.json", "set": "steps=200", "to": "jclt", "tokenizer": "model"}
SOUND |= {"prompt": "the capital of", "prompts": "prompts.txt", "inputs": "file.txt", "coder": "demo", "model": "demo"}
SOUND |= {"config": "tiny", "source": "coder", "run": "run", "end": "5", "field": "text", "data": "world"}


def drawn(rng: Generator) -> list[str]:
    """A command with some of its own flags, each with a sound value, an odd one or none."""
    name = pick(rng, sorted(subcommands()))
    command, argv = subcommands()[name], [name]
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
    """The exit status, stdout and stderr of a command in this process, and what was wrong with how it ended."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
    status, faults, before = None, [], logging.getLogger("jclt").level
    with contextlib.chdir(root / "work"), pytest.MonkeyPatch.context() as patch:
        for name in ("HOME", "XDG_CACHE_HOME"):
            patch.setenv(name, str(root / "home"))
        patch.setenv("COLUMNS", "200")
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), without_work(), limited() as faults:
                status = main(argv)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            faults.append(fault_of(error))
        finally:
            logging.getLogger("jclt").setLevel(before)
    said = [stream.buffer.getvalue().decode("utf-8") for stream in (out, err)]  # type: ignore[attr-defined]
    return status, said[0], said[1], faults


def own_line(err: str) -> str:
    """What a refusal says, without the usage that argparse puts before it and bars of progress."""
    text = "\n".join(line for line in re.split(r"[\r\n]", err) if line and "%|" not in line)
    usage, mark, rest = text.partition("\njclt")
    return "jclt" + rest if mark and usage.startswith("usage:") else text


def judged(argv: list[str], root: Path) -> list[Fault]:
    before = tree(root)
    status, _, err, faults = run(argv, root)
    new = sorted(path for path in tree(root) - before if not path.startswith("home"))
    try:
        if status is not None and status not in (0, 2, REACHED):
            faults.append(Fault(f"exit status {status}", err[-200:]))
        if status == 2:
            line = own_line(err)
            fault = check_line(line) if line.startswith("jclt") else Fault("no line that begins with jclt", err[-300:])
            faults += [fault] if fault else []
        # A folder that turns out to be of no use is empty.
        files = [path for path in new if not (root / path).is_dir()]
        half = [path for path in files if ".partial" in path and not path.endswith("manifest.partial.json")]
        # A folder of tokens is begun before the first text is read, and says so in its own manifest.
        begun = argv[:1] == ["tokenize"] and any(path.endswith("manifest.partial.json") for path in files)
        if half or (status == 2 and files and not begun):
            faults.append(Fault(f"{argv[0]} leaves something behind", f"{files[:3]} {err[-100:]}"))
    finally:
        for path in sorted(new, key=len, reverse=True):
            target = root / path
            target.rmdir() if target.is_dir() and not target.is_symlink() else target.unlink(missing_ok=True)
    return faults


def test_hostile_arguments_are_refused_in_one_line(room, draw):
    faults: dict[str, list[str]] = {}
    for number in range(max(1, draw.inputs // 10)) if draw.only is None else [draw.only]:
        argv = drawn(np.random.default_rng([draw.seed, number]))
        for fault in judged(argv, room):
            faults.setdefault(fault.cause, []).append(f"number {number}, {ascii(argv)[:300]}: {fault.detail}")
    assert not faults, f"\n{told(faults)}"


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
    ["train", "tiny", "--set", "density_decay=2"],
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
def test_what_was_found_once_is_refused_before_any_work(argv, room):
    assert not judged(argv, room)
    before = tree(room)
    assert run(argv, room)[0] == 2
    assert not [path for path in tree(room) - before if not path.startswith("home")]


@pytest.mark.parametrize("number", range(10))
def test_so_it_is_in_a_process_of_its_own(number, draw, room):
    """Where the locale knows no such letters, stderr is closed, or a signal comes."""
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
    command = [sys.executable, "-m", "jclt.start", *argv]
    given = {**os.environ, "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path.cwd()), **environment}
    before = tree(room)
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *command]
    done = subprocess.run(shell, cwd=room / "work", env=given, capture_output=True, timeout=120)
    err = done.stderr.decode()
    assert done.returncode == 2, err
    if not closed.startswith("2"):
        line = own_line(err)
        assert line.startswith("jclt") and check_line(line) is None, err
    assert tree(room) == before
