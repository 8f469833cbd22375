"""`jclt attribute` and `jclt demo` as their users meet them: one prompt, thousands of them, interrupted, and wrong."""

import json
import sys

import numpy as np
import pytest

import jclt
from jclt.attribution import Options, attribute_file
from jclt.attribution import stream as streaming
from jclt.cli import main

attributing = sys.modules["jclt.attribution.attribute"]  # the package has a function of this name

PROMPTS = ["calc: 36+59=", "English: poor or", "Nest: « needle", "", "List: first third fifth"]


@pytest.fixture(scope="module")
def shipped():
    return jclt.load_model("demo"), jclt.load_coder("demo")


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, "x " * 200]) + "\n")
    return tmp_path / "prompts.txt"


def test_each_line_gets_its_graph_and_bad_ones_are_reported_and_passed_over(shipped, prompts, tmp_path, caplog):
    out = tmp_path / "graphs"
    assert attribute_file(*shipped, prompts, out, Options(), batch=3) == (4, 2)
    found = jclt.load_graph(out / "000002.npz")
    alone = jclt.attribute(*shipped, PROMPTS[1])
    np.testing.assert_array_equal(found.features, alone.features)
    np.testing.assert_allclose(found.adjacency, alone.adjacency, atol=1e-5)
    lines = [json.loads(line) for line in (out / "graphs.jsonl").read_text().splitlines()]
    assert [line["line"] for line in lines] == [1, 2, 3, 5]
    assert lines[1]["outputs"][0] == " rich" and 0 < lines[1]["replacement"] < lines[1]["completeness"] < 1
    failed = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    assert [line["line"] for line in failed] == [4, 6]
    assert "at most" in failed[1]["error"] and "line 6: prompt: " in caplog.text


def test_processes_take_shares_of_their_own_and_the_last_lists_all(shipped, prompts, tmp_path):
    out = tmp_path / "graphs"
    assert attribute_file(*shipped, prompts, out, Options(), share=(1, 2)) == (1, 2)  # lines 2, 4 and 6
    assert sorted(path.name for path in out.glob("*.npz")) == ["000002.npz"]
    assert attribute_file(*shipped, prompts, out, Options(), share=(0, 2)) == (4, 2)
    assert len((out / "graphs.jsonl").read_text().splitlines()) == 4


def test_a_stopped_stream_goes_on_and_computes_nothing_twice(shipped, prompts, tmp_path, monkeypatch):
    out, traced = tmp_path / "graphs", []
    save = streaming.save_graph

    def stopping(graph, path):
        if len(traced) == 2:
            raise KeyboardInterrupt
        traced.append(path.name)
        save(graph, path)

    monkeypatch.setattr(streaming, "save_graph", stopping)
    with pytest.raises(KeyboardInterrupt):
        attribute_file(*shipped, prompts, out, Options(), batch=1)
    assert sorted(path.name for path in out.glob("*.npz")) == sorted(traced)
    monkeypatch.setattr(streaming, "save_graph", lambda graph, path: (traced.append(path.name), save(graph, path)))
    assert attribute_file(*shipped, prompts, out, Options(), batch=1) == (4, 2)
    assert sorted(traced) == ["000001.npz", "000002.npz", "000003.npz", "000005.npz"]


def test_a_folder_of_other_prompts_or_settings_is_refused(shipped, prompts, tmp_path):
    attribute_file(*shipped, prompts, tmp_path / "graphs", Options())
    with pytest.raises(jclt.UserError, match="begun with settings"):
        attribute_file(*shipped, prompts, tmp_path / "graphs", Options(max_features=5))
    prompts.write_text("calc: 1+2=\n")
    with pytest.raises(jclt.UserError, match="begun with prompts"):
        attribute_file(*shipped, prompts, tmp_path / "graphs", Options())
    with pytest.raises(jclt.UserError, match="holds other files"):
        attribute_file(*shipped, prompts, tmp_path, Options())


def test_a_batch_with_one_bad_prompt_keeps_the_others(shipped, monkeypatch):
    """Of one batch the prompt with most tokens fails, whenever it is among those traced."""
    model, coder = shipped
    tokens = [np.array(model.encode(prompt)) for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[2])]
    traced, longest = attributing.trace_prompts, max(map(len, tokens))

    def failing(model, through, params, coder, prompts, *others):
        if any(len(prompt) == longest for prompt in prompts):
            raise jclt.UserError("prompt: no feature of the coder is active on it")
        return traced(model, through, params, coder, prompts, *others)

    monkeypatch.setattr(attributing, "trace_prompts", failing)
    found = dict(attributing.attribute_each(model, coder, tokens, Options(), 8))
    assert {n for n, graph in found.items() if isinstance(graph, jclt.Graph)} == {
        n for n, own in enumerate(tokens) if len(own) < longest
    }
    with pytest.raises(jclt.UserError, match="^prompt 0: no feature"):
        jclt.attribute_batch(model, coder, tokens[:1])
    with pytest.raises(jclt.UserError, match="^batch=0: "):
        jclt.attribute_batch(model, coder, tokens, batch=0)


def test_json_lines_are_read_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b c"}\n')
    assert streaming.read_prompts(path) == ["a", "b c"]
    path.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(jclt.UserError, match="line 2 is not JSON with a field 'prompt'"):
        streaming.read_prompts(path)


def test_the_command_explains_a_prompt_and_writes_its_graph(tmp_path, capsys):
    out = tmp_path / "sum"
    assert main(["attribute", "calc: 36+59=", "--out", str(out), "--target", "95~94"]) == 0
    said = capsys.readouterr().out
    assert "95 - 94" in said and "completeness" in said and "->" in said
    names = [f"calc-36-59.{suffix}" for suffix in ("json", "npz", "png")]
    assert sorted(path.name for path in out.iterdir()) == [*names, "graph-metadata.json"]
    graph = jclt.load_graph(out / "calc-36-59.npz")
    assert graph.logit_tokens.tolist() == [-1]
    assert jclt.import_json(out / "calc-36-59.json").counts["output"] == 1
    assert main(["attribute", "calc: 36+59=", "--out", str(out), "--target", "95"]) == 0  # another graph
    assert "written: calc-36-59-2.npz, calc-36-59-2.json and calc-36-59-2.png" in capsys.readouterr().out
    assert jclt.load_graph(out / "calc-36-59.npz").logit_tokens.tolist() == [-1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "expected either a prompt or --prompts FILE"),
        (["calc: 36+59=", "--prompts", "x"], "expected either a prompt or --prompts FILE"),
        (["--prompts", "x"], "needs --out DIR"),
        (["--prompts", "nowhere.txt", "--out", "o"], "nowhere.txt: not found"),
        (["calc: 36+59=", "--target", " Den"], "target ' Den'"),
        (["calc: 36+59=", "--conventions", "theirs"], "conventions 'theirs': expected jclt or circuit-tracer"),
        (["calc: 36+59=", "--tolerance", "1.5"], "tolerance=1.5: expected"),
        ([""], "prompt"),
    ],
)
def test_what_cannot_work_is_one_line(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["attribute", *arguments]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())
