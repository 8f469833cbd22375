"""Pairs of prompts: from ids, text, files of every layout and the small world; what is no pair is listed with its
reason."""

import json

import numpy as np
import pytest

import jclt
from jclt.interventions import make_pairs, make_world_pairs
from jclt.interventions.patching.pair_files import read_greater_than, read_indirect_object
from jclt.world import TASKS


@pytest.fixture(scope="module")
def model():
    return jclt.load_model("demo")


def test_what_is_no_pair_is_counted_and_listed(model):
    rows = [
        ([1, 2, 3], [1, 4, 3], 5, 6),
        ([1, 2, 3], [1, 4], 5, 6),
        ("The capital of", "The capital of the", " a", " b"),
        ([1, 2, 3], [1, 4, 3], [5, 7], [7]),
        ([1, 2, 3], [1, 2, 3], 5, 6),
        ("The capital of", None, " not one", ()),
        ([1, 2, 3], None, (), ()),
        ([1, 2, 3, 4], None, [5, 5, 8], (), (1, 3), "last"),
    ]
    pairs = make_pairs(model, rows)
    assert len(pairs) == 2 and pairs.names == ("pair 0", "last") and pairs.answers == ((5,), (5, 8))
    assert pairs.corrupted[1] is None and pairs.subjects == (None, (1, 3))
    assert [left.name for left in pairs.left_out] == [f"pair {i}" for i in range(1, 7)]
    assert repr(pairs) == (
        "<PromptPairs: 2 pairs of 3 to 4 tokens; left out: 2 with prompts of unequal length, 1 with the same token as "
        "right and wrong answer, 1 with a corrupted prompt that is the clean one, 1 with an answer that is not one "
        "token, 1 with no answer>"
    )
    assert {k: v.tolist() for k, v in pairs.group_by_length().items()} == {3: [0], 4: [1]}
    assert pairs.take([1]).names == ("last",) and not pairs.take([1]).left_out
    for wrong, message in (
        (rows[1:2], "none of 1 rows is left; pair 0: 3 tokens of the clean prompt and 2 of the corrupted one"),
        ([], "none of 0 rows is left"),
        ([([1], [2], 10**6)], "answer: token id 1000000"),
        ([([1, 2], None, 3, (), (1, 3))], "subject at tokens 1 to 3, expected a part of 2 tokens"),
        ([("The capital of", None, " a", (), "Paris")], "subject 'Paris' is not in the clean prompt"),
    ):
        with pytest.raises(jclt.UserError, match=message):
            make_pairs(model, wrong)


def test_pairs_of_one_length_are_those_of_which_both_sets_have_most(model):
    """Alone the most frequent length, of equal ones the shorter; beside others the one that is best in the rarer."""

    def make(*lengths):
        return make_pairs(model, [([1] * n, [2] * n, 5, 6, None, f"{n} {i}") for i, n in enumerate(lengths)])

    first, second = make(3, 4, 4, 5, 4, 5, 5, 6, 6, 6, 6), make(5, 4, 5, 6, 3)
    assert first.keep_one_length().names == ("6 7", "6 8", "6 9", "6 10")
    assert make(7, 4, 7, 4).keep_one_length().names == ("4 1", "4 3")
    assert first.keep_one_length(second).names == ("5 3", "5 5", "5 6")
    assert second.keep_one_length(first).names == ("5 0", "5 2")
    with pytest.raises(
        jclt.UserError, match="pairs: of 3, 4 and of 5 tokens in two sets, expected a length that both have"
    ):
        make(3, 4).keep_one_length(make(5))


def test_text_becomes_tokens_and_a_subject_its_span(model):
    example = TASKS["two_hop"].pairs("report", 40, 0)
    pair = next(p for p in example if len(model.encode(p.clean.prompt)) == len(model.encode(p.corrupted.prompt)))
    words = pair.clean.prompt.split()
    pairs = make_pairs(model, [(pair.clean.prompt, pair.corrupted.prompt, *pair.clean.answers, (), words[2])])
    (start, stop) = pairs.subjects[0]
    assert "".join(pairs.token_texts[0][start:stop]).strip() == words[2]
    assert model.tokenizer.text(pairs.answers[0][0]) == pair.clean.answers[0]
    np.testing.assert_array_equal(pairs.clean[0], model.encode(pair.clean.prompt))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_of_the_small_world_gives_pairs(model, task):
    pairs = make_world_pairs(model, task, 12)
    assert len(pairs) + len(pairs.left_out) == 12 and len(pairs) >= 10, repr(pairs)
    for number in range(len(pairs)):
        clean, corrupted = pairs.clean[number], pairs.corrupted[number]
        (start, stop), differs = pairs.subjects[number], np.flatnonzero(clean != corrupted)
        assert (start, stop) == (differs[0], differs[-1] + 1)
        assert pairs.wrong_answers[number] and not set(pairs.answers[number]) & set(pairs.wrong_answers[number])


def test_files_of_every_layout_are_read(model, tmp_path):
    (pair,) = [p for p in TASKS["agreement"].pairs("report", 1, 0)]
    clean, corrupted = pair.clean.prompt, pair.corrupted.prompt
    right, wrong = pair.clean.answers[0], pair.corrupted.answers[0]
    own = {"clean": clean, "corrupted": corrupted, "answer": right, "wrong_answer": [wrong], "subject": [1, 2]}
    agreement = {"clean_prefix": clean, "patch_prefix": corrupted, "clean_answer": right, "patch_answer": wrong}
    fact = {"prompt": clean, "subject": clean.split()[0], "attribute": right.strip(), "known_id": 0}
    files = {
        "own.jsonl": json.dumps(own) + "\n",
        "agreement.json": json.dumps(agreement) + "\n\n" + json.dumps(agreement | {"case": "x"}),
        "facts.json": json.dumps([fact]),
        "table.csv": f'clean,corrupted,answer,wrong_answer\n"{clean}","{corrupted}",{right},{wrong}\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        pairs = jclt.load_pairs(model, tmp_path / name)
        np.testing.assert_array_equal(pairs.clean[0], model.encode(clean))
        assert model.tokenizer.text(pairs.answers[0][0]) == right and pairs.names[0] == f"{name} 0"
        assert (pairs.corrupted[0] is None) == (name == "facts.json")
    for text, message in (
        ("", "has no rows"),
        ("[1]", "row 0: int, expected an object"),
        ('{"a": 1}', "fields a, expected clean, corrupted, answer"),
        (json.dumps(own) + '\n{"clean": "x"}', "row 1: 'answer', expected the fields of the first row"),
        ("{", "line 1: not valid JSON"),
    ):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(jclt.UserError, match=message):
            jclt.load_pairs(model, tmp_path / "bad.jsonl")


def test_published_rows_are_read_from_their_text():
    clean = "Then, Aaron and Amber were working at the house. Aaron decided to give a drink to"
    row = read_indirect_object({"clean": clean, "corrupted": clean.replace(" Aaron d", " Tiffany d")}, "corrupted")
    assert (row.answer, row.wrong_answer, row.subject) == (" Amber", " Aaron", "Aaron")
    year = {
        "clean": "from the year 1352 to the year 13",
        "corrupted": "from the year 1301 to the year 13",
        "label": "52",
    }
    row = read_greater_than(year, "corrupted")
    assert row.answer[0] == "53" and row.answer[-1] == "99" and len(row.answer) == 47
    assert row.wrong_answer[0] == "00" and row.wrong_answer[-1] == "52" and len(row.wrong_answer) == 53
