"""Labels by a language model: a stub server that answers well, late, with failures, with nonsense or with markup."""

import threading

import numpy as np
import pytest
from stub_endpoint import connect, serve

from jclt.errors import UserError
from jclt.features import endpoint as asking
from jclt.features.endpoint import NoAnswer, ask, find_endpoint
from jclt.features.endpoint_labels import (
    clean_answer,
    label_by_endpoint,
    parse_judgement,
    write_explain_prompt,
    write_window,
)
from jclt.features.labels import LONGEST_LABEL
from jclt.features.windows import WindowPair, Windows

VOCABULARY = [" zero", " one", " two", " three", " {label}", "\n"]


def make_pair(token: int, rows: int = 12) -> WindowPair:
    """Fires at one token, which is in every second window."""
    tokens = np.zeros((rows, 6), int)
    tokens[::2, 3] = token
    activations = (tokens == token).astype(np.float32)
    windows = Windows(
        np.pad(tokens, ((0, 0), (1, 1)), constant_values=-1), activations, tokens >= 0, np.zeros(rows, int)
    )
    return WindowPair(windows, windows)


WINDOWS = {(0, token): make_pair(token) for token in (1, 2, 3)}


def answer_well(prompt: str) -> str:
    """Names what is marked, and finds the pieces with the word of the label."""
    pieces = [line.partition(". ")[2] for line in prompt.splitlines() if line[:1].isdigit()]
    if "described so" not in prompt:
        return pieces[0].split("<<")[1].split(">>")[0].strip()
    word = prompt.split("described so: ")[1].split("\n")[0]
    wanted = f"<< {word}>>" if "stand between" in prompt else word
    return str([int(wanted in piece) for piece in pieces])


def test_a_good_answer_is_a_label_with_scores_beside_a_shuffled_one():
    saved = []
    with serve(answer_well) as server:
        run = label_by_endpoint(
            connect(server), WINDOWS, VOCABULARY, save=lambda place, label: saved.append((place, label))
        )
    assert {place: label.text for place, label in run.labels.items()} == {(0, 1): "one", (0, 2): "two", (0, 3): "three"}
    for label in run.labels.values():
        assert label.source == "endpoint" and label.scores == {"detection": 1, "fuzzing": 1, "shuffled": 0.5}
    assert not run.failed
    assert [label.scores for _, label in saved[:3]] == [{}] * 3 and dict(
        saved
    ) == run.labels  # at once, then with scores
    assert {h["path"] for h in server.headers} == {"/v1/chat/completions"} and server.asked[0]["model"] == "stub"


def test_failures_are_tried_again_and_cost_nothing():
    failing = iter([500, 429, 503] + [None] * 99)
    with serve(lambda prompt: next(failing) or answer_well(prompt)) as server:
        run = label_by_endpoint(connect(server, tries=5), WINDOWS, VOCABULARY, judge=False)
    assert len(run.labels) == 3 and not run.failed and len(server.asked) == 6


def test_what_one_feature_lacks_the_others_have():
    def answer(prompt: str):
        return 500 if "<< two>>" in prompt and "described" not in prompt else answer_well(prompt)

    with serve(answer) as server:
        run = label_by_endpoint(connect(server), WINDOWS, VOCABULARY)
    assert set(run.labels) == {(0, 1), (0, 3)} and run.labels[0, 1].scores["detection"] == 1
    assert run.failed == {(0, 2): "status 500: <html>busy</html> (after 3 tries)"}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"nonsense", "no answer to a chat but b'nonsense'"),
        (b'{"choices": []}', "no answer to a chat"),
        (b'{"choices": [{"message": {"content": null}}]}', "without a text"),
        (b"[" * 5000, "no answer to a chat"),
        (b"x" * (asking.MOST_BYTES + 5), "too long"),
        ("<b></b> ** \n ```", "an answer without a label"),
    ],
)
def test_nonsense_is_reported(body, reason):
    with serve(lambda prompt: body) as server:
        run = label_by_endpoint(connect(server, tries=1), WINDOWS, VOCABULARY)
    assert not run.labels and len(run.failed) == 3
    assert all(reason in given for given in run.failed.values()), run.failed


def test_a_judgement_that_is_nonsense_leaves_the_label():
    with serve(lambda prompt: "[1, 0]" if "described so" in prompt else answer_well(prompt)) as server:
        run = label_by_endpoint(connect(server), WINDOWS, VOCABULARY)
    assert [label.text for label in run.labels.values()].count("one") == 1 and len(run.labels) == 3
    assert all(label.scores == {} for label in run.labels.values())
    assert all("is missing: an answer that is no list of 10 numbers" in reason for reason in run.failed.values())


def test_slow_answers_end_at_the_limit():
    over = threading.Event()
    with serve(lambda prompt: over.wait(5) and "late") as server:
        with pytest.raises(NoAnswer, match="timed out.*after 2 tries"):
            ask(connect(server, timeout=0.1, tries=2), "hello", 5)
        over.set()


def test_waits_grow_and_follow_what_the_server_asks_for(monkeypatch):
    waits = []
    with serve(lambda prompt: 503) as server, pytest.raises(NoAnswer):
        ask(connect(server, tries=4, first_wait=1.0), "hello", 5, wait=waits.append)
    assert waits == [1, 2, 4]


def test_after_many_failures_in_a_row_no_more_are_asked():
    windows = {(0, n): make_pair(1 + n % 3) for n in range(40)}
    with serve(lambda prompt: 500) as server:
        run = label_by_endpoint(connect(server, tries=1), windows, VOCABULARY)
    assert len(run.failed) == 40 and len(server.asked) < 20
    assert sum("not asked" in reason for reason in run.failed.values()) == 40 - len(server.asked)


@pytest.mark.parametrize("status", [401, 404, 302])
def test_a_refusal_ends_at_once(status):
    with serve(lambda prompt: status) as server, pytest.raises(UserError, match=f"endpoint .*: status {status}"):
        label_by_endpoint(connect(server), WINDOWS, VOCABULARY)
    assert len(server.asked) <= 4


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("JCLT_API_KEY", "secret")
    with serve(lambda prompt: "yes") as server:
        assert ask(connect(server), "hello", 5) == "yes"
    assert server.headers[0]["Authorization"] == "Bearer secret"
    monkeypatch.setenv("JCLT_API_KEY", "two\nlines")
    with pytest.raises(UserError, match="the key in JCLT_API_KEY"):
        find_endpoint("http://localhost:1", "stub")


@pytest.mark.parametrize("url", ["localhost:8000", "file:///etc/passwd", "http://", ""])
def test_an_address_that_is_none_is_one_line(url):
    with pytest.raises(UserError, match="expected an address such as"):
        find_endpoint(url, "stub")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("  Names of rivers.\nBecause ...", "Names of rivers."),
        ("<think>It is 'a'\n</think>\n\n**Label:** `digits` after plus", "digits after plus"),
        ("# <b>Cities</b> of <a href='x'>Ohio</a>", "Cities of Ohio"),
        ("<script>alert(1)</script>say Denver", "say Denver"),
        ('"say \x1b[31mred\u202e"', "say [31mred"),
        ("x < y and y > z", "x < y and y > z"),
        ("a" * 500, "a" * (LONGEST_LABEL - 3) + "..."),
        ("", None),
        ("...\n***", None),
    ],
)
def test_answers_become_plain_text_of_limited_length(answer, text):
    assert clean_answer(answer) == text


def test_judgements_are_read_from_the_last_list():
    assert parse_judgement("First [1, 1] no: [0,1]", 2) == [False, True]
    assert parse_judgement("[0, 2]", 2) is None and parse_judgement("yes", 1) is None


def test_the_prompt_shows_marked_examples_as_they_are():
    windows = make_pair(4).explaining
    prompt = write_explain_prompt(windows, VOCABULARY, [" Denver"])
    assert prompt.count("<< {label}>>") == 6 and "come next: ' Denver'" in prompt
    windows = windows._replace(tokens=np.full_like(windows.tokens, 5))
    assert write_window(windows, 0, VOCABULARY) == "\\n" * 6
