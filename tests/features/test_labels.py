"""Labels survive their file, and two editors of the same labels lose nothing."""

import json
from pathlib import Path

import pytest

from jclt.errors import UserError
from jclt.features.labels import LONGEST_LABEL, Label, load_labels, merge_labels, save_labels

OLD = Label("old", "weights", {"detection": 0.7})


def test_labels_survive_their_file(tmp_path: Path):
    labels = {
        (3, 12): Label("state = Colorado", "concepts", {"purity": 0.9}),
        (0, 191): Label("say ' Denver'", "yours"),
    }
    save_labels(tmp_path / "labels.json", labels, "abc")
    assert load_labels(tmp_path) == load_labels(tmp_path / "labels.json", coder="abc") == labels
    with pytest.raises(UserError, match="labels of another coder .abc., expected those of xyz"):
        load_labels(tmp_path, coder="xyz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"format": "other"}, "not labels of version 1"),
        ({"labels": []}, "'labels' is damaged"),
        ({"labels": {"0:1": {}}}, "'0:1', expected LAYER/FEATURE"),
        ({"labels": {"0/1": "word"}}, "0/1: expected an object"),
        ({"labels": {"0/1": {"text": 3, "source": "yours"}}}, "0/1: expected a text"),
        ({"labels": {"0/1": {"text": "a", "source": "yours", "scores": {"x": "y"}}}}, "scores that are numbers"),
        ({"labels": {"0/1": {"text": "a\nb", "source": "yours"}}}, "expected one line of 1 to 200 characters"),
        ({"labels": {"0/1": {"text": "a", "source": "mine"}}}, "source 'mine', expected one of yours"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, content: dict, message: str):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"format": "jclt-labels", "version": 1, "coder": "abc", "labels": {}} | content))
    with pytest.raises(UserError, match=message):
        load_labels(path)


def test_what_cannot_be_shown_is_not_saved(tmp_path: Path):
    for text in ("", " ", "a\x1b[31m", "x" * (LONGEST_LABEL + 1)):
        with pytest.raises(UserError, match="label of 0/1"):
            save_labels(tmp_path / "labels.json", {(0, 1): Label(text, "yours")}, "abc")
    assert not (tmp_path / "labels.json").exists()


@pytest.mark.parametrize(
    ("base", "mine", "theirs", "merged"),
    [
        (None, "a", None, "a"),
        (None, None, "b", "b"),
        ("old", "old", "b", "b"),
        ("old", "a", "old", "a"),
        ("old", None, "old", None),
        ("old", "old", None, None),
        ("old", None, None, None),
        ("old", "a", None, "a"),
        ("old", None, "b", "b"),
        ("old", "a", "a", "a"),
        ("old", "a", "b", "a | b"),
        (None, "a", "b", "a | b"),
        ("old", "c", "a | b", "c | a | b"),
        ("old", "a", "a | b", "a | b"),
    ],
)
def test_two_editors_lose_nothing(base, mine, theirs, merged):
    def write(text: str | None) -> dict:
        return {} if text is None else {(0, 1): OLD if text == "old" else Label(text, "yours")}

    got = merge_labels(write(base), write(mine), write(theirs))
    assert got == write(merged)


def test_a_long_pair_of_texts_can_still_be_saved(tmp_path: Path):
    long = [Label(letter * LONGEST_LABEL, "yours") for letter in "ab"]
    merged = merge_labels({}, {(0, 1): long[0]}, {(0, 1): long[1]})
    save_labels(tmp_path / "labels.json", merged, "abc")
    assert load_labels(tmp_path / "labels.json") == merged
