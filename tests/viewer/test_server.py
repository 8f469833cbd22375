"""The server answers its own page alone, on a real socket; whatever else is asked gets a refusal in one line."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from features_of_random_coders import SIZES, make_coder, make_model
from graph_lists import hand_graph
from page_server import TOKEN, running

import jclt
from jclt.attribution.targets import decode_token
from jclt.cli.main import main
from jclt.coders import read_fingerprint
from jclt.errors import UserError
from jclt.features import Label, save_labels
from jclt.features.weights import describe_weights
from jclt.files import read_json, write_json
from jclt.graphs import export_json, import_json
from jclt.graphs.export_nodes import cantor, make_node_ids
from jclt.viewer import library, server
from jclt.viewer.feature_panels import read_densities, read_description
from jclt.viewer.library import Library, find_graph_files
from jclt.viewer.page_files import FOLDER, export_html, join_modules, read_page_files
from jclt.viewer.page_service import Page
from jclt.viewer.server import MOST_JSON


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    hand_graph().save(folder / "hand.npz")
    export_json(hand_graph(), folder / "hand.json")  # the same graph for viewers: shown once
    export_json(replace(hand_graph(), supernodes={"two": (0, 1)}), folder / "other.json.gz")
    (folder / "secret.txt").write_text("secret")
    (folder / "broken.json").write_text("{")
    return folder


@pytest.fixture(scope="module")
def port(folder) -> Iterator[int]:
    with running(Page(Library([folder]))) as port:
        yield port


def ask(port: int, path: str, method="GET", body: bytes | None = None, **headers: str):
    """Status, headers and content of an answer. Paths are sent as they are."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.putrequest(method, path, skip_host=True)
        headers = {"Host": f"127.0.0.1:{port}"} | headers
        if body is not None:
            headers.setdefault("Content-Length", str(len(body)))
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        content = answer.read()
        return (
            answer.status,
            answer.headers,
            json.loads(content) if "json" in answer.headers["content-type"] else content,
        )


def post(port: int, path: str, content: object):
    return ask(port, f"/{TOKEN}/{path}", "POST", json.dumps(content).encode())


def test_the_page_and_its_files_are_small_and_fast_and_ask_for_nothing_elsewhere(port):
    start = time.monotonic()
    status, headers, content = ask(port, f"/{TOKEN}/")
    assert status == 200 and b"main.js" in content and time.monotonic() - start < 0.2
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    for name in read_page_files():
        assert ask(port, f"/{TOKEN}/{name}")[0] == 200
        text = (FOLDER / name).read_text().replace("http://www.w3.org/", "")
        assert "//" not in re.sub(r"(^|\s)//.*", "", text) or "http" not in text, name
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 400_000


def test_graphs_are_listed_once_and_read(port):
    status, _, content = ask(port, f"/{TOKEN}/api/graphs")
    assert status == 200 and [graph["name"] for graph in content["graphs"]] == ["broken", "hand", "other"]
    assert not content["model"]
    status, _, data = ask(port, f"/{TOKEN}/api/graphs/hand")
    assert status == 200 and data["tokens"] == [" South", " Creek"] and data["name"] == "hand"
    status, _, data = ask(port, f"/{TOKEN}/api/graphs/broken")
    assert status == 400 and "not valid JSON" in data["error"]


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", {}, 404),
        ("/wrong-token/", {}, 404),
        (f"/{TOKEN}", {}, 404),
        (f"/{TOKEN}x/", {}, 404),
        (f"/{TOKEN}/", {"Host": "evil.example"}, 403),
        (f"/{TOKEN}/", {"Host": "127.0.0.1"}, 403),
        (f"/{TOKEN}/api/graphs", {"Origin": "http://evil.example"}, 403),
        (f"/{TOKEN}/api/graphs", {"Origin": "null"}, 403),
        (f"/{TOKEN}/../secret.txt", {}, 404),
        (f"/{TOKEN}/..%2Fsecret.txt", {}, 404),
        (f"/{TOKEN}/%2e%2e/%2e%2e/etc/passwd", {}, 404),
        (f"/{TOKEN}/page_data.py", {}, 404),
        (f"/{TOKEN}/api/graphs/..%2F..%2Fsecret", {}, 404),
        (f"/{TOKEN}/api/graphs/secret", {}, 400),
        (f"/{TOKEN}/api/graphs/hand/features/0/99", {}, 200),
        (f"/{TOKEN}/api/graphs/hand/features/0/x", {}, 404),
        (f"/{TOKEN}/api/graphs/hand/page.html", {}, 200),
        (f"/{TOKEN}/api/graphs/hand/export.json?nodes=x", {}, 400),
        (f"/{TOKEN}/api/graphs/hand/export.json?nodes=nan", {}, 400),
        (f"/{TOKEN}/api/graphs/hand/view", {}, 405),
        (f"/{TOKEN}/api/graphs/%3Cb%3E%E2%80%AE", {}, 400),
    ],
)
def test_only_the_page_itself_gets_answers(port, path, headers, status):
    got, answered, content = ask(port, path, **headers)
    assert got == status and "content-security-policy" in answered
    assert b"secret" not in (content if isinstance(content, bytes) else b"") and (
        status == 200 or set(content) == {"error"}
    )


def test_bodies_that_are_too_large_or_damaged_are_refused(port):
    assert ask(port, f"/{TOKEN}/api/attribute", "POST", b" " * (MOST_JSON + 1))[0] == 413
    for body in (b"", b"{", b"[]", b"\xff", b'{"a":' * 100_000):
        status, _, content = ask(port, f"/{TOKEN}/api/graphs/hand/view", "POST", body)
        assert status == 400 and content["error"].startswith("request:")
    for view in (
        {"pinnedIds": "E"},
        {"supernodes": [[1]]},
        {"places": {"a": [0, 2]}},
        {"labels": {"0/17": 3}},
        {"labels": {"../17": "a"}},
        {"labels": {"0/17": "a" * 201}},
        {"path": "x"},
    ):
        status, _, content = post(port, "api/graphs/hand/view", view)
        assert status == 400 and content["error"].startswith("view:")
    status, _, content = post(port, "api/attribute", {"prompt": "Once"})
    assert status == 400 and content["error"].startswith("there is no model here")


def test_a_body_in_parts_without_a_length_is_refused_as_soon_as_it_is_too_large(port, monkeypatch):
    monkeypatch.setattr(server, "MOST_UPLOAD", 1000)
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        parts = (b"x" * 600 for _ in range(2))
        connection.request("POST", f"/{TOKEN}/api/upload", parts, encode_chunked=True)
        answer = connection.getresponse()
        assert answer.status == 413 and json.loads(answer.read()) == {"error": "request of more than 1000 bytes"}


def test_labels_that_arrive_at_the_same_time_are_all_kept(tmp_path):
    hand_graph().save(tmp_path / "hand.npz")
    with running(Page(Library([tmp_path]))) as port, ThreadPoolExecutor(8) as pool:
        for status, _, _ in pool.map(
            lambda n: post(port, "api/graphs/hand/view", {"labels": {f"0/{n}": str(n)}}), range(24)
        ):
            assert status == 200
        labels = ask(port, f"/{TOKEN}/api/graphs/hand")[2]["view"]["labels"]
        assert labels == {f"0/{n}": str(n) for n in range(24)}
        (tmp_path / "hand.view.json").write_text('{"labels": 3}')  # damaged by hand
        status, _, answer = post(port, "api/graphs/hand/view", {"labels": {"0/1": "a"}})
        assert status == 400 and "hand.view.json: field 'labels' is unknown or damaged" in answer["error"]
    assert (tmp_path / "hand.view.json").read_text() == '{"labels": 3}'


def test_what_cannot_be_written_is_said_and_kept_until_it_can(tmp_path, monkeypatch):
    hand_graph().save(tmp_path / "hand.npz")

    def fail(path, _):
        raise UserError(f"{path.name}: cannot be written (Read-only file system)")

    with running(Page(Library([tmp_path]))) as port:
        with monkeypatch.context() as patched:
            patched.setattr(library, "write_json", fail)
            status, _, answer = post(port, "api/graphs/hand/view", {"labels": {"0/17": "one"}})
        assert status == 400 and answer["error"].endswith("(Read-only file system); kept until the server ends")
        assert ask(port, f"/{TOKEN}/api/graphs/hand")[2]["view"]["labels"] == {"0/17": "one"}
        assert post(port, "api/graphs/hand/view", {"labels": {"2/40": "two"}})[0] == 200
    assert read_json(tmp_path / "hand.view.json") == {"labels": {"0/17": "one", "2/40": "two"}}


def test_an_intervention_is_checked_before_the_model_is_loaded(tmp_path):
    hand_graph().save(tmp_path / "hand.npz")
    feature, output = make_node_ids(hand_graph())[0], make_node_ids(hand_graph())[-1]
    with running(Page(Library([tmp_path]))) as port:
        for request, error in (
            ({}, "intervention: nodes are unknown"),
            ({"nodes": ["9_9_9"], "factor": 0}, "intervention: nodes are unknown"),
            ({"nodes": [feature]}, "intervention: expected a number as factor, or a prompt"),
            ({"nodes": [feature], "factor": float("nan")}, "intervention: expected a number as factor"),
            ({"nodes": [feature], "prompt": ""}, "intervention: the other prompt is empty"),
            ({"nodes": [output], "prompt": "x"}, "intervention: another prompt has other features"),
            ({"nodes": [feature, output], "factor": 0}, "intervention: a node is of the kind output"),
            ({"nodes": [feature], "factor": 0}, "there is no model here"),
        ):
            status, _, answer = post(port, "api/graphs/hand/intervene", request)
            assert status == 400 and answer["error"].startswith(error)


def test_a_dropped_file_opens_and_its_name_is_only_a_name(port, folder):
    for name, file in (("../../x.npz", "hand.npz"), ("<b>.json", "hand.json"), ("y.json.gz", "other.json.gz")):
        path = f"/{TOKEN}/api/upload?name={urllib.parse.quote(name)}"
        status, _, data = ask(port, path, "POST", (folder / file).read_bytes())
        assert status == 200 and data["name"].startswith("south-creek") and len(data["ids"]) == 6
    for name, content in (("x.npz", b"PK"), ("x.exe", b""), ("x.json", b"{}")):
        status, _, data = ask(port, f"/{TOKEN}/api/upload?name={name}", "POST", content)
        assert status == 400 and name in data["error"] and "/tmp" not in data["error"]


def test_what_is_pinned_grouped_and_labelled_is_kept_beside_the_graph_and_written_for_viewers(tmp_path):
    hand_graph().save(tmp_path / "hand.npz")
    with running(Page(Library([tmp_path]))) as port:
        view = {"pinnedIds": ["0_17_0", "2_40_1", "E_5_0"], "supernodes": [["<b>two</b>", "0_17_0", "2_40_1"]]}
        assert post(port, "api/graphs/hand/view", view)[0] == 200
        post(port, "api/graphs/hand/view", {"labels": {"0/17": "one"}})
        status, _, saved = post(port, "api/graphs/hand/view", {"labels": {"2/40": "two"}})  # another tab's
        assert status == 200 and saved["labels"] == {"0/17": "one", "2/40": "two"}
        _, headers, content = ask(port, f"/{TOKEN}/api/graphs/hand/export.json?nodes=1&edges=1")
    assert "attachment" in headers["content-disposition"]
    assert content["qParams"]["pinnedIds"] == view["pinnedIds"]
    assert content["qParams"]["supernodes"] == view["supernodes"]
    assert [node["clerp"] for node in content["nodes"][:2]] == ["one", "two"]
    with running(Page(Library([tmp_path / "hand.npz"]))) as port:
        data = ask(port, f"/{TOKEN}/api/graphs/hand")[2]["view"]
    assert data == view | {"labels": {"0/17": "one", "2/40": "two"}}


def test_without_examples_the_weights_say_what_a_feature_does():
    model = make_model()
    coder = make_coder(model)
    page = Page(Library([]), load_model=lambda: (model, coder))
    graph = hand_graph()
    for made_by in (None, read_fingerprint(coder), "another"):
        name = page.library.add("hand", replace(graph, provenance={"coder_fingerprint": made_by}))
        got = page.describe(name, 1, 2)
        if made_by == "another":
            assert got is None
            continue
        columns = describe_weights(model, coder, 1, SIZES)
        assert got is not None and got["checked"] == (made_by is not None)
        ids = columns["raised_ids"][2][:10].tolist()
        assert got["top_logits"][: len(ids)] == [decode_token(model, token) for token in ids]
        np.testing.assert_allclose(got["jclt"]["decoder_norms"], columns["decoder_norms"][2], rtol=1e-6)
        assert page.describe(name, 1, 10**6) is None and page.describe(name, 99, 2) is None


def test_labels_and_densities_of_another_coder_are_left_out(tmp_path):
    graph = hand_graph()
    folder = tmp_path / "features"
    save_labels(folder / "labels.json", {(0, 17): Label("south", "yours")}, "a")
    for coder, label in (("a", "south"), ("b", ""), (None, "south")):  # a graph that does not say may be of this coder
        other = replace(graph, provenance=graph.provenance | ({"coder_fingerprint": coder} if coder else {}))
        page = Page(Library([]), features=folder)
        assert page.add("one", other)["labels"][0] == label
    write_json(folder / f"{cantor(1, 2)}.json", {"index": 2})  # a file of other software
    assert read_description(folder, 1, 2, "a") == {"index": 2, "checked": False}
    assert read_densities(folder, graph) is None


def test_files_of_graphs_are_found_and_others_left_out(tmp_path, folder):
    assert {name: path.name for name, path in find_graph_files([folder, folder / "hand.json"]).items()} == {
        "broken": "broken.json",
        "hand": "hand.npz",
        "other": "other.json.gz",
        "hand-2": "hand.json",
    }
    with pytest.raises(UserError, match="nothing.npz: not found, expected a graph's file, or a folder of them"):
        Library([tmp_path / "nothing.npz"])


def test_a_page_in_one_file_needs_nothing_else(tmp_path):
    graph = replace(hand_graph(), token_texts=("</script><script>alert(1)</script>", "<!--"))
    export_html(graph, tmp_path / "graph.html")
    text = (tmp_path / "graph.html").read_text()
    assert "import " not in re.sub(r"(?m)^\s*//.*$", "", join_modules()) and "unsafe" not in text
    assert text.count("</script>") == 2 and "alert(1)</script" not in text
    assert len(join_modules()) < 400_000


def test_the_command_writes_a_graph_with_its_view_as_one_file(folder, tmp_path, capsys):
    graph = tmp_path / "hand.npz"
    hand_graph().save(graph)
    (tmp_path / "hand.view.json").write_text('{"labels": {"0/17": "my label"}}')
    assert main(["export-html", str(graph), "--out", str(tmp_path / "hand.html")]) == 0
    assert "my label" in (tmp_path / "hand.html").read_text()
    assert main(["export-html", str(folder), "--out", str(tmp_path / "no.html")]) == 2
    assert "3 graphs, expected the file of one" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_the_command_serves_a_file_until_ctrl_c_ends_it(tmp_path):
    export_json(hand_graph(), tmp_path / "hand.json")
    command = [sys.executable, "-m", "jclt", "serve", str(tmp_path / "hand.json"), "--no-browser"]
    environment = os.environ | {"PYTHONPATH": str(Path(jclt.__file__).parents[1])}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout and process.stderr
        try:
            line = process.stdout.readline()
            found = re.fullmatch(r"The page is at http://127.0.0.1:(\d+)/([\w-]{32})/\n", line)
            assert found, line
            status, _, data = ask(int(found[1]), f"/{found[2]}/api/graphs/hand")
            assert status == 200 and len(data["ids"]) == len(import_json(tmp_path / "hand.json"))
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", int(found[1]))) as unfinished:
                unfinished.putrequest("POST", f"/{found[2]}/api/upload")  # it runs when the server ends
                unfinished.putheader("Content-Length", "10")
                unfinished.endheaders(b"half")
                process.send_signal(signal.SIGINT)
                assert process.wait(10) == 0 and process.stderr.read() == ""
        finally:
            process.kill()
