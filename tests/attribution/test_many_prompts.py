"""`attribute_file` and `jclt attribute`: one prompt, many prompts, interruptions, and wrong input."""

import json
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

import jclt
from jclt.attribution import Options, attribute_file
from jclt.attribution import many_prompts as streaming
from jclt.cli.main import main
from jclt.graphs import Graph

attributing = sys.modules["jclt.attribution.attribute"]  # the package has a function of this name

SUM = "calc: 36+59="
PROMPTS = ["Nest: « [ needle ]", SUM, "The city of Lake Grove lies in", "", "List: first third fifth second"]
"""Programs are compiled for numbers of prompts, tokens and active features, rounded up. All tests have the same: these
prompts, or ones much like them, one by one or in batches of three."""


@pytest.fixture(scope="module")
def shipped():
    return jclt.load_model("demo"), jclt.load_coder("demo")


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, "x " * 200]) + "\n")
    return tmp_path / "prompts.txt"


def test_each_line_gets_its_graph_and_bad_ones_are_reported_and_passed_over(shipped, prompts, tmp_path, caplog):
    out = tmp_path / "graphs"
    assert attribute_file(*shipped, prompts, out, Options(), batch=3) == (4, 1)
    loaded = jclt.load_graph(out / "000002.npz")
    single = jclt.attribute(*shipped, PROMPTS[1])
    np.testing.assert_array_equal(loaded.features, single.features)
    np.testing.assert_allclose(loaded.adjacency, single.adjacency, atol=1e-5)
    lines = [json.loads(line) for line in (out / "graphs.jsonl").read_text().splitlines()]
    assert [line["line"] for line in lines] == [1, 2, 3, 5]
    assert lines[1]["outputs"][0] == "95" and 0 < lines[1]["replacement"] < lines[1]["completeness"] < 1
    failed = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    assert [line["line"] for line in failed] == [6]  # the fourth is blank
    assert "at most" in failed[0]["error"] and "line 6: prompt: " in caplog.text


def test_processes_take_shares_of_their_own_and_the_last_lists_all(shipped, prompts, tmp_path):
    out = tmp_path / "graphs"
    assert attribute_file(*shipped, prompts, out, Options(), batch=3, share=(1, 2)) == (1, 1)  # lines 2, 4 and 6
    assert sorted(path.name for path in out.glob("*.npz")) == ["000002.npz"]
    assert attribute_file(*shipped, prompts, out, Options(), batch=3, share=(0, 2)) == (4, 1)
    assert len((out / "graphs.jsonl").read_text().splitlines()) == 4


def test_a_stopped_stream_goes_on_and_writes_no_graph_twice(shipped, prompts, tmp_path, monkeypatch):
    out, saved = tmp_path / "graphs", []
    save = Graph.save

    def stopping(graph, path):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(path.name)
        save(graph, path)

    monkeypatch.setattr(Graph, "save", stopping)
    with pytest.raises(KeyboardInterrupt):
        attribute_file(*shipped, prompts, out, Options(), batch=1)
    assert sorted(path.name for path in out.glob("*.npz")) == sorted(saved)
    monkeypatch.setattr(Graph, "save", lambda graph, path: (saved.append(path.name), save(graph, path)))
    assert attribute_file(*shipped, prompts, out, Options(), batch=1) == (4, 1)
    assert sorted(saved) == ["000001.npz", "000002.npz", "000003.npz", "000005.npz"]


def test_a_folder_of_other_prompts_or_settings_is_refused(shipped, prompts, tmp_path):
    prompts.write_text(SUM + "\n")
    attribute_file(*shipped, prompts, tmp_path / "graphs", Options())
    with pytest.raises(jclt.UserError, match="begun with settings"):
        attribute_file(*shipped, prompts, tmp_path / "graphs", Options(max_features=5))
    prompts.write_text("calc: 1+2=\n")
    with pytest.raises(jclt.UserError, match="begun with prompts"):
        attribute_file(*shipped, prompts, tmp_path / "graphs", Options())
    with pytest.raises(jclt.UserError, match="holds other files"):
        attribute_file(*shipped, prompts, tmp_path, Options())


def test_a_stopped_stream_ends_with_the_same_bytes(shipped, tmp_path, monkeypatch):
    """The remaining prompts share batches with prompts whose graphs are already written."""
    path, save = tmp_path / "prompts.txt", Graph.save
    path.write_text("".join(f"calc: {n}+{n + 17}=\n" for n in range(20, 24)) + PROMPTS[2] + "\n")
    attribute_file(*shipped, path, tmp_path / "whole", Options(), batch=3)
    paths = []

    def stopping(graph, path):
        if len(paths) % 3 == 2:
            paths.append(path)
            raise KeyboardInterrupt
        paths.append(path)
        save(graph, path)

    monkeypatch.setattr(Graph, "save", stopping)
    for _ in range(20):
        try:
            assert attribute_file(*shipped, path, tmp_path / "stopped", Options(), batch=3) == (5, 0)
            break
        except KeyboardInterrupt:
            continue
    assert len(paths) > 5
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "stopped" / file.name).read_bytes(), file.name
    monkeypatch.setattr(Graph, "save", save)
    attribute_file(*shipped, path, tmp_path / "single", Options(), batch=1)
    for file in (tmp_path / "whole").glob("*.npz"):  # what shares a batch changes no more than the last bits
        want, got = jclt.load_graph(file), jclt.load_graph(tmp_path / "single" / file.name)
        np.testing.assert_array_equal(got.features, want.features)
        np.testing.assert_allclose(got.adjacency, want.adjacency, atol=1e-6 * np.abs(want.adjacency).max())


def test_a_folder_of_other_weights_is_refused(shipped, tmp_path):
    path, out, (model, coder) = tmp_path / "prompts.txt", tmp_path / "graphs", shipped
    path.write_text(SUM + "\n")
    attribute_file(model, coder, path, out, Options())
    retrained = jax.tree.map(lambda x: x * 1.5, coder)
    with pytest.raises(jclt.UserError, match=r"begun with another coder \(fingerprint \w{16}, now \w{16}\)$"):
        attribute_file(model, retrained, path, out, Options())
    other = replace(model, params={**model.params, "final_norm_gain": model.params["final_norm_gain"] * 2})
    with pytest.raises(jclt.UserError, match=r"begun with another model \(fingerprint"):
        attribute_file(other, coder, path, out, Options())
    settings = json.loads((out / "settings.json").read_text())
    del settings["coder_fingerprint"]
    (out / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(
        jclt.UserError, match="begun by an older jclt, which did not note its coder's weights; expected"
    ):
        attribute_file(model, coder, path, out, Options())


def test_directions_are_told_apart_by_their_vectors(shipped, tmp_path):
    path, out = tmp_path / "prompts.txt", tmp_path / "graphs"
    path.write_text(SUM + "\n")
    vector = np.ones(shipped[0].config.width)
    attribute_file(*shipped, path, out, Options([jclt.Direction(vector)]))
    with pytest.raises(jclt.UserError, match="begun with settings"):
        attribute_file(*shipped, path, out, Options([jclt.Direction(-vector)]))


def test_lines_bring_their_own_targets_and_token_ids(shipped, tmp_path):
    model, _ = shipped
    path, out = tmp_path / "prompts.jsonl", tmp_path / "graphs"
    ids = model.encode(SUM)
    lines = [
        {"prompt": SUM, "targets": "95"},
        {"prompt": ids, "target": ["95", "94"], "note": "passed over"},
        {"prompt": SUM, "targets": ["94", ["95", "94"]]},
        {"prompt": SUM},
        {"prompt": ids, "targets": [10**6]},
    ]
    path.write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    visited = []
    call = (*shipped, path, out, Options(["93"]))
    assert attribute_file(*call, batch=3, visit=lambda graph, name: visited.append((name, graph.logit_names))) == (4, 1)
    want = [("000001", ("95",)), ("000003", ("95 - 94",)), ("000005", ("94", "95 - 94")), ("000007", ("93",))]
    assert sorted(visited) == want
    loaded = jclt.load_graph(out / "000005.npz")
    assert loaded.provenance["settings"]["targets"] == ["94", ["95", "94"]]
    listed = [json.loads(line) for line in (out / "graphs.jsonl").read_text().splitlines()]
    assert [line["line"] for line in listed] == [1, 3, 5, 7] and listed[1]["prompt"] == ids
    logits = np.asarray(jclt.run(model, ids)[0][-1], np.float64)
    chance = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert listed[0]["probabilities"] == [pytest.approx(chance[model.tokenizer.plain("95")[0]], abs=1e-5)]
    assert listed[1]["probabilities"] == [0]
    failed = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    assert failed[0]["line"] == 9 and "expected a token id" in failed[0]["error"]
    visited.clear()  # those there already are given as well
    attribute_file(*call, batch=3, visit=lambda graph, name: visited.append((name, graph.logit_names)))
    assert sorted(visited) == want
    lines[0]["targets"] = "94"
    path.write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    with pytest.raises(jclt.UserError, match="begun with prompts"):
        attribute_file(*call)


def test_prompts_are_read_whatever_signs_they_hold(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("a\x0cb\u2028c\r\n\n  \nä\n".encode())
    assert streaming.read_prompts(path) == [(0, "a\x0cb\u2028c", None), (3, "ä", None)]
    path.write_bytes(b"\xe4\n")
    with pytest.raises(jclt.UserError, match="not UTF-8"):
        streaming.read_prompts(path)
    path.write_text("\n\n")
    with pytest.raises(jclt.UserError, match="empty, expected a prompt on each line"):
        streaming.read_prompts(path)
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert streaming.read_prompts(path) == [(0, "a\u2028b", None)]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": 5}', "'prompt' is 5, expected text or a list of token ids or of messages"),
        ('{"prompt": [{"role": "user"}]}', "prompt: 'content' of message 0 is None, expected text"),
        ('{"prompt": [1, "a"]}', "'prompt' is .*, expected text or a list of token ids or of messages"),
        ("[" * 5000, "is not JSON with a field 'prompt'"),
        ('{"prompt": "a", "targets": {"b": 1}}', "'targets' is .*, expected a list of tokens"),
        ('{"prompt": "a", "targets": []}', "targets: none given"),
        ('{"prompt": "a", "targets": [["b", "c", "d"]]}', "target .*: expected a token"),
        ('{"prompt": "a", "target": "b", "targets": ["c"]}', "both 'target' and 'targets'"),
    ],
)
def test_a_line_that_makes_no_sense_is_named(tmp_path, line, says):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(jclt.UserError, match=f"line 2:? ?{says}"):
        streaming.read_prompts(path)


def test_lists_are_written_whatever_became_of_the_files(shipped, tmp_path, monkeypatch):
    path, out = tmp_path / "prompts.txt", tmp_path / "graphs"
    path.write_text(f"{SUM}\n{SUM}\n" + "x " * 200 + "\n")
    assert attribute_file(*shipped, path, out, Options(max_features=3), batch=1) == (2, 1)
    (out / "000002.npz").write_bytes(b"damaged")
    (out / "000003.failed").write_bytes(b"\xff")
    lines = streaming.read_prompts(path)
    graph = jclt.load_graph(out / "000001.npz")
    monkeypatch.setattr(
        streaming,
        "load_graph",
        lambda path: (
            replace(graph, logit_probabilities=graph.logit_probabilities * np.nan)
            if path.stem == "000001"
            else jclt.load_graph(path)
        ),
    )
    assert streaming.write_lists(out, lines) == (1, 2)
    failed = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    assert [line["line"] for line in failed] == [2, 3] and failed[1]["error"] == "unknown"
    assert "NaN" not in (out / "graphs.jsonl").read_text()


def test_without_a_terminal_lines_say_how_far_it_is(shipped, tmp_path, monkeypatch, caplog):
    path = tmp_path / "prompts.txt"
    path.write_text(f"{SUM}\n{SUM}\n")
    monkeypatch.setattr(streaming, "LOG_INTERVAL", 0.0)
    caplog.set_level("INFO", "jclt")
    attribute_file(*shipped, path, tmp_path / "graphs", Options(max_features=3), batch=1)
    assert "2 of 2 graphs" in caplog.text


def test_a_batch_with_one_bad_prompt_keeps_the_others(shipped, monkeypatch):
    """The prompt with most tokens in a batch fails whenever it is traced."""
    model, coder = shipped
    tokens = [np.array(model.encode(prompt)) for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[2])]
    trace, longest = attributing.trace_prompts, max(map(len, tokens))

    def fail(setup, prompts, targets):
        if any(len(prompt) == longest for prompt in prompts):
            raise jclt.UserError("prompt: no feature of the coder is active on it")
        return trace(setup, prompts, targets)

    monkeypatch.setattr(attributing, "trace_prompts", fail)
    results = dict(attributing.attribute_each(model, coder, tokens, Options(), 8))
    assert {n for n, graph in results.items() if isinstance(graph, jclt.Graph)} == {
        n for n, ids in enumerate(tokens) if len(ids) < longest
    }
    with pytest.raises(jclt.UserError, match="^prompt 0: no feature"):
        jclt.attribute_batch(model, coder, tokens[2:])
    with pytest.raises(jclt.UserError, match="^batch=0: "):
        jclt.attribute_batch(model, coder, tokens, batch=0)


def test_json_lines_are_read_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b c"}\n')
    assert streaming.read_prompts(path) == [(0, "a", None), (1, "b c", None)]
    path.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(jclt.UserError, match="line 2 is not JSON with a field 'prompt'"):
        streaming.read_prompts(path)


def test_the_command_explains_a_prompt_and_writes_its_graph(tmp_path, capsys):
    out = tmp_path / "sum"
    assert main(["attribute", SUM, "--out", str(out), "--target", "95~94"]) == 0
    output = capsys.readouterr().out
    assert "95 - 94" in output and "completeness" in output and "->" in output
    names = [f"calc-36-59.{suffix}" for suffix in ("json", "npz", "png")]
    assert sorted(path.name for path in out.iterdir()) == [*names, "graph-metadata.json"]
    graph = jclt.load_graph(out / "calc-36-59.npz")
    assert graph.logit_tokens.tolist() == [-1]
    assert jclt.import_json(out / "calc-36-59.json").counts["output"] == 1
    assert main(["attribute", SUM, "--out", str(out), "--target", "95"]) == 0  # another graph
    assert "written: calc-36-59-2.npz, calc-36-59-2.json and calc-36-59-2.png" in capsys.readouterr().out
    assert jclt.load_graph(out / "calc-36-59.npz").logit_tokens.tolist() == [-1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "expected a prompt, --chat TEXT or --prompts FILE"),
        (["calc: 36+59=", "--prompts", "x"], "expected a prompt, --chat TEXT or --prompts FILE"),
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
    output = capsys.readouterr().err
    assert says in output and output.count("\n") == 1
    assert not list(tmp_path.iterdir())
