"""The command line, as a user runs it."""

import errno
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import jax
import numpy as np
import pytest
from graph_lists import build_graph
from transcripts import check_transcript, find_transcript

import jclt
from jclt.cli.main import build_parser, main
from jclt.coders import read_fingerprint
from jclt.errors import UserError
from jclt.features import Label, group_names, load_labels, save_labels
from jclt.files import read_json
from jclt.graphs import label_nodes
from jclt.viewer import find_free_name
from jclt.world.tasks import TASKS

ROOT = Path(__file__).parents[2]


def test_demo_explains_a_prompt_of_each_task_and_most_are_right(capsys, tmp_path, monkeypatch):
    """On one device, with prompts of one length, pictures of few dots and groups named in one task: with few programs
    and little work."""
    drawn = group_names.draw_prompts
    monkeypatch.setattr(
        group_names, "draw_prompts", lambda task, without: drawn(task, without) if task == "two_hop" else ([], [])
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    for module in ("attribute", "prompts"):
        monkeypatch.setattr(import_module(f"jclt.attribution.{module}"), "round_up_length", lambda length: 24)
    monkeypatch.setattr("jclt.viewer.picture_files.DOTS_PER_INCH", 50)
    assert main(["demo"]) == 0
    printed = capsys.readouterr().out
    shown = find_transcript((ROOT / "README.md").read_text(), ["demo"])
    assert len(shown) == 2
    check_transcript(shown, printed)
    *blocks, last = printed.split("\n\n")
    by_task = {block.split(":")[0]: block.splitlines() for block in blocks}
    assert set(by_task) == set(TASKS)
    right = sum(lines[0].endswith(" right") for lines in by_task.values())
    assert right >= len(TASKS) - 1 and last.startswith(f"{right} of {len(TASKS)} right")
    for task, lines in by_task.items():
        assert "active features: completeness" in lines[2] and sum("->" in line for line in lines[3:]) == 3
        for suffix in ("npz", "json", "png"):
            assert (tmp_path / "demo" / f"{task}.{suffix}").stat().st_size > 1000
        content = read_json(tmp_path / "demo" / f"{task}.json")
        influences = [node["influence"] for node in content["nodes"] if node["influence"] is not None]
        assert len(influences) >= 9 and max(influences) <= content["metadata"]["node_threshold"]  # so viewers show all
    index = read_json(tmp_path / "demo" / "graph-metadata.json")["graphs"]
    assert {entry["slug"] for entry in index} == set(TASKS)


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (
            ["train-lm", "small-wrld"],
            "config 'small-wrld': neither a preset nor a .py file; did you mean 'small-world'?",
        ),
        (["train-lm", "small-world", "--set", "stesp=4"], "setting 'stesp': unknown; did you mean 'steps'?"),
        (
            ["train-lm", "small-world", "--set", "model.width=big"],
            "setting 'model.width': got big, expected a whole number",
        ),
    ],
)
def test_mistakes_get_one_line_and_exit_status_2(capsys, command, line):
    assert main(command) == 2
    assert capsys.readouterr().err == f"jclt: {line}\n"


def test_help_names_every_command_and_each_explains_itself(capsys):
    for arguments in (["--help"], ["demo", "--help"], ["train-lm", "--help"], ["attribute", "--help"]):
        with pytest.raises(SystemExit) as stop:
            build_parser().parse_args(arguments)
        assert stop.value.code == 0
        output = capsys.readouterr().out
        assert len(output) > 200
    assert "example: jclt attribute" in output


def test_help_and_mistakes_do_not_wait_for_jax():
    code = (
        "import sys; from jclt.cli.main import build_parser; build_parser();"
        "sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["attribute", "x", "--target", "a~b~c"], "argument --target: 'a~b~c', expected TOKEN, or FIRST~SECOND"),
        (["attribute", "x", "--target", ""], "argument --target: '', expected TOKEN"),
        (["attribute", "x", "--batch", "-1"], "argument --batch: -1, expected at least 1"),
        (["attribute", "x", "--nodes", "all"], "argument --nodes: 'all', expected a number of features or a share"),
        (["attribute", "\udcff"], "argument PROMPT: not UTF-8 text"),
        (["intervene", "x", "--set", "3/17=1"], "argument --set: '3/17=1', expected LAYER/POSITION/FEATURE=NUMBER"),
        (["intervene", "x", "--scale", "1/5-3-2/0=1"], "argument --scale: '1/5-3-2/0=1', expected LAYER"),
        (["intervene", "x", "--layers", "3-1"], "argument --layers: '3-1', expected FIRST-LAST"),
        (["eval", "demo", "--length", "1"], "argument --length: 1, expected at least 2"),
        (["eval", "demo", "--rows", "-1"], "argument --rows: -1, expected at least 1"),
        (["eval", "demo", "--seed", "-1"], "argument --seed: -1, expected at least 0"),
        (["eval", "demo", "--rows", "many"], "argument --rows: 'many', expected a whole number"),
        (["plan", "tiny", "--active", "nan"], "argument --active: nan, expected a number from 0 on"),
        (["plan", "tiny", "--slices", "0"], "argument --slices: 0, expected at least 1"),
    ],
)
def test_what_no_command_can_take_is_one_line_after_the_usage(arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    usage, output = capsys.readouterr().err.rsplit("\njclt ", 1)
    assert stop.value.code == 2 and usage.startswith("usage: ")
    assert output.startswith(f"{arguments[0]}: error: {says}") and output.count("\n") == 1


def test_what_is_typed_reaches_the_terminal_as_escapes(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--out", "x", "\x1b[31m\n"])
    assert capsys.readouterr().err.endswith("jclt: error: unrecognized arguments: \\x1b[31m\\n\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["attribute", "x", "--tolerance", "nan"], "tolerance=nan: expected from 0 to below 1"),
        (
            ["attribute", "x", "--precision", "half"],
            "precision 'half': expected float32, tf32_3x, tf32, bfloat16_3x or ",
        ),
        (["attribute", "x", "--max-features", "0"], "max_features=0: expected at least 1"),
        (["attribute", "x", "--nodes", "0"], "nodes=0: expected a number from 1 on, or a share of the scores"),
        (["attribute", "x", "--nodes", "1.5"], "nodes=1.5: expected a number from 1 on, or a share of the scores"),
        (["attribute", "x", "--chat", "y"], "attribute: both a prompt and --chat, expected one of them"),
        (["intervene", "--set", "1/2/3=1"], "intervene: expected a prompt or --chat TEXT"),
        (["attribute", "x", "--model", "smol"], "model 'smol': expected --coder too"),
        (["attribute", "x", "--out", "{}/file"], "{}/file: cannot be written"),
        (["attribute", "--prompts", "{}/none", "--out", "{}/o"], "{}/none: not found"),
        (["attribute", "x", "--features", "f"], "attribute: --features is for viewers' files, expected --out DIR too"),
        (["attribute", "x", "--json"], "attribute: --json goes with --prompts; of one prompt --out DIR writes"),
        (
            ["attribute", "--prompts", "p", "--out", "o", "--supernodes"],
            "attribute: --supernodes with --prompts is for viewers' files, expected --json too",
        ),
        (
            ["attribute", "x", "--supernodes", "--keep", "disk"],
            "attribute: --supernodes sets groups to zero, expected --keep device, not disk",
        ),
        (
            ["label", "x", "--concepts", "--endpoint", "u"],
            "--concepts: not with --endpoint, expected one of the two",
        ),
        (["intervene", "x"], "intervene: nothing to change, expected --set, --scale, --add or --supernode"),
        (["intervene", "x", "--supernode", "state=0"], "intervene: --supernode needs --graph FILE"),
        (
            ["intervene", "x", "--set", "errors/1/2=0", "--generate", "3"],
            "intervene: --generate with changes of errors",
        ),
        (["intervene", "x", "--set", "1/2/3=1", "--graph", "{}/none"], "{}/none: not found"),
        (["intervene", "x", "--set", "1/2/3=1", "--out", "{}"], "{}: is a folder, expected a file"),
        (["eval", "demo", "--json", "{}"], "{}: is a folder, expected a file"),
        (["train", "tiny", "--out", "file://{}/run"], "--out 'file://{}/run': expected the folder's path"),
        (["train", "tiny", "--out", "{}/\udcff"], "--out '{}/\\udcff': not UTF-8"),
        (["tokenize", "x", "--tokenizer", "{}/file", "--out", "{}/o"], "tokenizer '{}/file': is a file"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_loaded(arguments, says, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("jclt.models.load_model", lambda name, **_: pytest.fail("a model is loaded"))
    assert main([part.replace("{}", str(tmp_path)) for part in arguments]) == 2
    output = capsys.readouterr().err
    assert output.startswith(f"jclt: {says.replace('{}', str(tmp_path))}") and output.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_chat_needs_a_template(capsys):
    assert main(["attribute", "--chat", "x"]) == 2
    assert capsys.readouterr().err.startswith("jclt: model demo: has no chat template, expected text or token ids")


def test_text_is_utf_8_in_any_locale():
    code = (
        "import sys; from jclt.cli.main import build_parser;"
        "print(ascii(build_parser().parse_args(['attribute', sys.argv[1]]).prompt))"
    )
    surroundings = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = subprocess.run(
        [sys.executable, "-c", code, "über".encode()], env=os.environ | surroundings, capture_output=True, text=True
    )
    assert process.stdout == "'\\xfcber'\n", process.stderr


def test_closed_streams_lead_nowhere_and_what_a_terminal_cannot_show_is_escaped(tmp_path):
    code = (
        "from jclt.__main__ import open_streams; open_streams(); import sys; print('gone', file=sys.stderr);"
        f"file = open({str(tmp_path / 'file')!r}, 'w'); print(file.fileno() > 2, '\\xfc')"
    )
    surroundings = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", code]
    process = subprocess.run(["sh", "-c", 'exec "$@" 2>&- <&-', "sh", *command], env=surroundings, capture_output=True)
    assert process.returncode == 0 and process.stdout == b"True \\xfc\n"
    process = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command], env=surroundings)
    assert process.returncode == 0


WAITING = {
    "in C code": ("import ctypes; print(1, flush=True); ctypes.CDLL(None).sleep(60)", 2.0),
    "in a callback": (
        "import weakref, time\nclass A: pass\n"
        "def dies(_): print(1, flush=True); time.sleep(60)\n"
        "a = A(); kept = weakref.ref(a, dies)\nwith interrupts.undo_on_interrupt():\n  del a\n  time.sleep(60)",
        6.0,
    ),
    "while it writes": (
        "import time; from pathlib import Path; from jclt.files import create_file\n"
        "with create_file(Path('whole')) as beside:\n  beside.write_text('half'); print(1, flush=True); time.sleep(60)",
        4.0,
    ),
}


@pytest.mark.parametrize("where", WAITING)
def test_an_interrupt_ends_a_command_in_one_line_wherever_it_is(where, tmp_path):
    code, seconds = WAITING[where]
    program = (
        "import signal, sys; import jclt.cli.main; from jclt import __main__ as start, interrupts\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # whoever runs the tests may ignore it
        f"def run():\n  exec({code!r}, {{'interrupts': interrupts}})\n"
        "jclt.cli.main.main = run\nsys.exit(start.main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(jclt.__file__).parents[1])},
    )
    assert process.stdout is not None and process.stdout.readline() == b"1\n"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, output = process.communicate(timeout=60)
    assert process.returncode == 130 and output == b"jclt: interrupted\n"
    assert time.monotonic() - began < 10 * seconds
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError("Unable to allocate 3 TiB"), "jclt: inspect: memory has ended (Unable to allocate 3 TiB)\n"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.\nmore"),
            "jclt: inspect: memory has ended (RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.)\n",
        ),
        (OSError(errno.ENOSPC, "No space left"), "jclt: inspect: output or a file: No space left\n"),
        (OSError(errno.ENOSPC, "No space left", "a\nb"), "jclt: a\\nb: No space left\n"),
        (KeyboardInterrupt(), ""),
    ],
)
def test_what_runs_out_is_one_line(error, says, monkeypatch, capsys):
    def failing(folder):
        raise error

    monkeypatch.setattr("jclt.training.inspect.inspect_run", failing)
    assert main(["inspect", "x"]) == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert capsys.readouterr().err == says


def test_the_model_is_the_one_that_the_coder_is_of(monkeypatch, capsys):
    loaded, meshes = [], []

    def load_model(name, mesh):
        loaded.append(name)
        meshes.append(mesh)
        raise UserError(f"model '{name}': no such folder")

    monkeypatch.setattr("jclt.models.load_model", load_model)
    monkeypatch.setattr("jclt.coders.coder_model", lambda coder: "" if coder == "mute" else "smol", raising=False)
    assert main(["eval", "runs/x/coder"]) == 2 and loaded == ["smol"]
    assert "the files of coder 'runs/x/coder' name it, --model says another" in capsys.readouterr().err
    assert main(["eval", "mute"]) == 2 and loaded == ["smol"]
    assert "coder 'mute': its files name no model, expected --model" in capsys.readouterr().err
    for arguments in (["eval", "demo"], ["attribute", "x"], ["attribute", "x", "--coder", "runs/y", "--model", "z"]):
        assert main(arguments) == 2
    assert loaded == ["smol", "demo", "demo", "z"]
    assert main(["eval", "neurons"]) == 2 and loaded[-1] == "demo" and not any(meshes)
    assert main(["attribute", "x", "--split-model"]) == 2 and meshes[-1].size == 4


def test_a_check_can_be_left_out_and_eval_warns(monkeypatch, capsys, caplog):
    checked = []

    def load_coder(name, *, check, reads, writes, **rest):
        checked.append((check, reads, writes))
        return Namespace(config=None)

    def check_fit(coder, model, name):
        raise UserError(f"coder '{name}' does not fit")

    monkeypatch.setattr("jclt.models.load_model", lambda name, mesh: None)
    monkeypatch.setattr("jclt.coders.load_coder", load_coder)
    monkeypatch.setattr("jclt.coders.check_fit", check_fit)
    monkeypatch.setattr("jclt.evaluation.evaluate.evaluate", lambda *arguments: ("figures", {}))
    assert main(["eval", "demo"]) == 0 and [record.message for record in caplog.records] == [
        "coder 'demo' does not fit"
    ]
    caplog.clear()
    assert main(["eval", "demo", "--no-check", "--reads", "a", "--writes", "b"]) == 0 and not caplog.records
    assert checked == [(False, None, None), (False, "a", "b")]


def test_another_prompts_graph_is_not_written_over(tmp_path):
    ids = np.arange(2)
    graph = plain_graph(ids)
    assert find_free_name(graph, tmp_path, "a-b") == "a-b"
    graph.save(tmp_path / "a-b.npz")
    assert find_free_name(graph, tmp_path, "a-b") == "a-b"  # made again
    other = plain_graph(ids + 1)
    assert find_free_name(other, tmp_path, "a-b") == "a-b-2"
    other.save(tmp_path / "a-b-2.npz")
    assert find_free_name(other, tmp_path, "a-b") == "a-b-2"
    (tmp_path / "c.npz").write_text("no graph")
    assert find_free_name(graph, tmp_path, "c") == "c-2"


def plain_graph(ids: np.ndarray) -> jclt.Graph:
    """Tokens and one output, nothing else."""
    size = len(ids) + 1
    numbers = np.zeros(size, np.float32)
    return build_graph(
        adjacency=np.zeros((size, size), np.float32),
        bias=numbers,
        rest=numbers,
        rest_mass=numbers,
        values=numbers,
        features=np.zeros((0, 3), np.int64),
        activations=np.zeros(0, np.float32),
        errors=np.zeros((0, 2), np.int64),
        tokens=ids,
        token_texts=tuple(map(str, ids)),
        positions=np.zeros(0, np.int64),
        logit_tokens=np.zeros(1, np.int64),
        logit_names=("a",),
        logit_positions=np.full(1, len(ids) - 1),
        logit_probabilities=np.ones(1, np.float32),
        layers=1,
    )


def test_prompts_that_all_fail_give_status_1(tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("a\n")
    counts = [(0, 1), (2, 1)]
    monkeypatch.setattr("jclt.models.load_model", lambda name, mesh: None)
    monkeypatch.setattr("jclt.coders.load_coder", lambda name, **rest: None)
    monkeypatch.setattr("jclt.attribution.attribute_file", lambda *given, **also: counts.pop(0))
    for name in ("slug_of", "write_viewer_json"):
        monkeypatch.setattr(f"jclt.viewer.{name}", lambda *given: None, raising=False)
    monkeypatch.setattr("jclt.cli.attribute.find_label_texts", lambda arguments, coder: {})
    arguments = ["attribute", "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "o")]
    assert main(arguments) == 1
    assert capsys.readouterr().err == f"jclt: all of 1 prompts failed; {tmp_path}/o/failed.jsonl says why\n"
    assert main(arguments) == 0
    assert capsys.readouterr().out.endswith("1 prompts failed\n")


def test_a_tokenizer_may_be_one_on_the_hub(monkeypatch, tmp_path, capsys):
    names = []

    def find_model(name, files):
        names.append((name, files))
        raise UserError(f"model '{name}': no such folder, not in the local cache")

    monkeypatch.setattr("jclt.models.find_model", find_model)
    assert main(["tokenize", "x.txt", "--tokenizer", "gpt2", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "jclt: tokenizer 'gpt2': no such folder, not in the local cache\n"
    assert names == [("gpt2", ("tokenizer*.json", "vocab.json", "merges.txt"))]


def test_changes_are_applied_in_the_order_given():
    from jclt.cli.intervene import make_edits

    typed = ["intervene", "x", "--add", "1/2/3=1", "--scale", "1/2-/3=2", "--set", "head_out/0/1-4/2=0"]
    add, scale, heads = make_edits(build_parser().parse_args(typed).changes, None)
    assert [type(edit) for edit in (add, scale, heads)] == [jclt.Add, jclt.Scale, jclt.Set]
    assert add.ranges.position.tolist() == [2, 3] and scale.ranges.read("position", 9) == range(2, 9)
    assert heads.ranges.position.tolist() == [1, 5] and heads.ranges.head.tolist() == [2, 3]


def test_attribute_shows_labels_and_supernodes(tmp_path, capsys, monkeypatch):
    """In text and in files; labels of another coder, or none where they were asked for, are refused."""
    monkeypatch.setattr("jclt.interventions.measure_supernodes", lambda *given: [group.name for group in given[-1]])
    labels, out = tmp_path / "labels.json", tmp_path / "out"
    coder = jclt.load_coder("demo", model=jclt.load_model("demo"))
    texts = {(0, feature): Label("poor or", "yours") for feature in range(coder.config.features)}
    save_labels(labels, texts, read_fingerprint(coder))
    options = ["attribute", "English: poor or", "--labels"]
    assert main([*options, str(labels), "--supernodes", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    content, graph = read_json(out / "english-poor-or.json"), jclt.load_graph(out / "english-poor-or.npz")
    assert "-> poor or (0/" in printed and "\nsupernodes: " in printed
    assert printed.endswith("\n".join(f"  {name}" for name in graph.supernodes) + "\n")
    assert {node["clerp"] for node in content["nodes"] if node["layer"] == "0"} == {"poor or", ""}
    assert [name for name, *_ in content["qParams"]["supernodes"]] == list(graph.supernodes)
    assert list(graph.supernodes)[0] == "poor or" and set(graph.labels) == {"poor or", ""}
    save_labels(labels, texts, "other")
    for path, problem in ((labels, "labels of another coder (other)"), (tmp_path / "none", "none")):
        assert main([*options, str(path)]) == 2
        assert problem in capsys.readouterr().err


def test_intervene_prints_draws_and_continues(tmp_path, capsys):
    """A feature and a supernode of a stored graph; the numbers are those of the calls."""
    model, prompt = jclt.load_model("demo"), "calc: 36+59="
    coder = jclt.load_coder("demo", model=model)
    graph = jclt.attribute(model, coder, prompt)
    strongest = graph.influence[: len(graph.features)].argsort()[::-1]
    members = tuple(int(node) for node in strongest[1:4])
    layer, position, feature = graph.features[strongest[0]].tolist()
    graph = label_nodes(replace(graph, supernodes={"the sum": members}), {(layer, feature): "units = 5"})
    graph.save(tmp_path / "sum.npz")
    place = f"{layer}/{position}/{feature}"
    options = ["--scale", f"{place}=0", "--supernode", "the sum=-1", "--graph", str(tmp_path / "sum.npz")]
    picture = tmp_path / "sum.png"
    assert main(["intervene", prompt, *options, "--layers", "0-3", "--out", str(picture), "--generate", "1"]) == 0
    printed = capsys.readouterr().out
    edits = [jclt.Scale(0.0, layer=layer, position=position, feature=feature), *jclt.scale_nodes(graph, members, -1.0)]
    result = jclt.intervene(model, coder, prompt, edits, layers=(0, 3), graph=graph)
    shipped = {place: label.text for place, label in load_labels("demo").items()}
    result = replace(result, labels={**shipped, **result.labels})
    assert result.summarize() in printed and f"units = 5 ({layer}/{feature}) at" in printed
    assert "supernode 'the sum': -100% of its original activation" in printed
    assert "without changes: '95'" in printed and picture.read_bytes().startswith(b"\x89PNG")
