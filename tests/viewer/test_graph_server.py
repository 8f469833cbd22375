"""The requests of a published graph server: each answer beside the library's own functions, called directly."""

import contextlib
import http.client
import json
from typing import Any

import numpy as np
import pytest
from page_server import TOKEN, running

import jclt
from jclt.viewer.library import Library
from jclt.viewer.page_service import Page

PROMPT = "calc: 36+59="
ACTIVE, ABLATED = 443, 1014  # features of layers 1 and 3 that are active at position 6
FEATURE = {"layer": 1, "index": ACTIVE, "token_active_position": 6, "steer_position": 4, "delta": 2.0}


def post(port: int, path: str, content: object, **headers: str) -> tuple[int, Any]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=300)) as connection:
        connection.request("POST", f"/{TOKEN}/{path}", json.dumps(content), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


@pytest.mark.parametrize(
    ("path", "changes", "error"),
    [
        ("generate-graph", {"prompt": ""}, "prompt: empty, expected a text, or messages"),
        ("generate-graph", {"messages": ["hello"]}, "messages: expected a list of objects with role and content"),
        ("generate-graph", {"slug_identifier": 3}, "slug_identifier: expected a text"),
        ("generate-graph", {"signed_url": "http://a.example"}, "signed_url: nothing is sent elsewhere"),
        ("generate-graph", {"enable_qk_tracing": True}, "enable_qk_tracing: attention patterns are not traced"),
        ("generate-graph", {"max_n_logits": True}, "max_n_logits: expected an integer of at least 1"),
        ("generate-graph", {"max_feature_nodes": 0}, "max_feature_nodes: expected an integer of at least 1"),
        ("generate-graph", {"node_threshold": 1.5}, "node_threshold: expected a number from 0 to 1"),
        ("generate-graph", {"edge_threshold": "1"}, "edge_threshold: expected a number from 0 to 1"),
        ("forward-pass", {"desired_logit_prob": -1}, "desired_logit_prob: expected a number from 0 to 1"),
        ("steer", {"features": []}, "features: expected a list of at least one object"),
        ("steer", {"features": [FEATURE | {"ablate": True}]}, "features: expected either ablate or a delta"),
        ("steer", {"features": [FEATURE | {"steer_generated_tokens": True}]}, "features: expected either steer_gen"),
        ("steer", {"features": [FEATURE | {"layer": -1}]}, "layer: expected an integer of at least 0"),
        ("steer", {"features": [FEATURE | {"delta": float("nan")}]}, "delta: expected a number"),
        ("steer", {"n_tokens": 1.5}, "n_tokens: expected an integer of at least 1"),
        ("steer", {"seed": -1}, "seed: expected an integer of at least 0"),
        ("steer", {"temperature": 1, "freq_penalty": 1}, "freq_penalty: not available"),
        ("generate-graph", {}, "there is no model here"),  # only now is the model asked for
        ("forward-pass", {}, "there is no model here"),
        ("steer", {}, "there is no model here"),
    ],
)
def test_a_bad_request_is_refused_in_one_line_before_the_model_is_loaded(port, path, changes, error):
    status, answer = post(port, path, {"prompt": PROMPT, "model_id": "demo", "features": [FEATURE]} | changes)
    assert status == 400 and answer["error"].startswith(error) and set(answer) == {"error"}


@pytest.fixture(scope="module")
def port():
    with running(Page(Library([]))) as port:
        yield port


def test_the_requests_are_guarded_as_all_others_are(port):
    for path in ("generate-graph", "forward-pass", "steer"):
        assert post(port, path, {}, Origin="http://evil.example")[0] == 403
        assert post(port, f"../wrong/{path}", {})[0] == 404
        assert post(port, path, ["prompt"]) == (400, {"error": "request: expected a JSON object"})


@pytest.mark.exhaustive  # compiles; a plain run tests what is refused, and the functions that answer on their own
def test_answers_are_those_of_the_library():
    model = jclt.load_model("demo")
    coder = jclt.load_coder("demo", model=model, check=False)
    with running(Page(Library([]), load_model=lambda: (model, coder))) as port:
        ask = {"prompt": f"<bos>{PROMPT}", "model_id": "any/demo", "request_type": "steer"}
        check_graph(model, coder, post(port, "generate-graph", ask | {"slug_identifier": "sum", "max_n_logits": 1})[1])
        check_likeliest(model, post(port, "forward-pass", ask | {"desired_logit_prob": 0.9})[1])
        new = {"layer": 3, "index": ABLATED, "token_active_position": 6, "steer_generated_tokens": True, "ablate": True}
        request = ask | {"features": [FEATURE, new], "n_tokens": 2, "top_k": 3}
        check_steering(model, coder, post(port, "steer", request)[1])
        for changes, error in (
            ({"model_id": "gpt2"}, "model_id 'gpt2': not here, expected 'demo'"),
            (
                {"features": [FEATURE | {"index": 1024}]},
                "features: layer 1, index 1024, expected a layer of 0, 1, 2, 3",
            ),
            ({"features": [FEATURE | {"steer_position": 99}]}, "features: a position beyond the prompt's 7 tokens"),
        ):
            status, answer = post(port, "steer", request | changes)
            assert status == 400 and answer["error"].startswith(error)


def check_graph(model, coder, answer) -> None:
    tops = np.asarray(jclt.run(model, PROMPT)[0][-1]).argmax()
    want = jclt.export_json(jclt.attribute(model, coder, PROMPT, targets=[int(tops)]).prune(), slug="sum")
    assert answer["metadata"]["slug"] == "sum" and answer["metadata"]["scan"] == "demo"
    assert [node["node_id"] for node in answer["nodes"]] == [node["node_id"] for node in want["nodes"]]
    assert answer["links"] == json.loads(json.dumps(want["links"]))


def check_likeliest(model, answer) -> None:
    logits = np.asarray(jclt.run(model, PROMPT)[0][-1], np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    assert answer["input_tokens"][:2] == ["<bos>", "calc"] and answer["prompt"] == f"<bos>{PROMPT}"
    assert answer["salient_logits"][0]["token"] == "95" and answer["total_salient_tokens"] == 1
    assert answer["cumulative_probability"] == pytest.approx(probabilities.max())


def check_steering(model, coder, answer) -> None:
    """Logits of one pass over all tokens with the same edits, and without any."""
    default, steered = answer["DEFAULT_LOGITS_BY_TOKEN"], answer["STEERED_LOGITS_BY_TOKEN"]
    length = len(model.encode(PROMPT))
    assert (
        "".join(row["token"] for row in default) == answer["DEFAULT_GENERATION"] == f"<bos>{PROMPT}95"
    )  # then a new line, which ends it
    assert "".join(row["token"] for row in steered) == answer["STEERED_GENERATION"]
    assert [len(row["top_logits"]) for row in default] == [0] * (length - 1) + [3] * 2
    graph = jclt.attribute(model, coder, PROMPT)
    places = map(tuple, graph.features.tolist())
    active = dict(zip(places, graph.activations.tolist(), strict=True))[1, 6, ACTIVE]
    edits = [
        jclt.Set(active + 2, layer=1, position=4, feature=ACTIVE),
        jclt.Set(0.0, layer=3, position=slice(length, None), feature=ABLATED),
    ]
    for rows, of in ((default, []), (steered, edits)):
        tokens = model.encode("".join(row["token"] for row in rows).removeprefix("<bos>"))
        free = {"reference": "current", "attention": "free", "norms": "free"}
        logits = np.asarray(jclt.intervene(model, coder, tokens, of, **free).logits, np.float64)
        chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        for at in range(length - 1, len(rows)):
            got = [top["prob"] for top in rows[at]["top_logits"]]
            np.testing.assert_allclose(got, np.sort(chances[at])[::-1][:3], atol=1e-5)
    assert rows[-1]["top_logits"] != default[-1]["top_logits"]
