"""The world keeps its rules: nothing withheld is in the corpus, and the concepts of a prompt are true."""

import re
from random import Random

import numpy as np
import pytest
from tokenizers import Tokenizer

from jclt.models import find_model
from jclt.world import facts, numbers, words
from jclt.world.corpus import make_corpus, make_text
from jclt.world.example import BOS, UNKNOWN, Concept, Example, split_tokens
from jclt.world.tasks import TASKS

TOKENIZER = Tokenizer.from_file(str(find_model("demo") / "tokenizer.json"))  # test_shipped_model.py builds it anew
VOCABULARY = TOKENIZER.get_vocab()
TEXT = make_text(20_000, seed=11)
LINES = TEXT.splitlines()
SHOWN = {" ".join(parts[:n]) for parts in map(split_tokens, LINES) for n in range(2, len(parts) + 1)}
each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def roots(example: Example) -> dict[str, str]:
    return {concept.name: concept.value for concept in example.concepts if not concept.parents}


# ---------------------------------------------------------------- generation


def test_same_seed_same_world():
    assert make_text(500, seed=3) == make_text(500, seed=3) != make_text(500, seed=4)
    first, again = (make_corpus(20, 64, 5, VOCABULARY) for _ in range(2))
    assert np.array_equal(first.tokens, again.tokens) and np.array_equal(first.weights, again.weights)
    for task in TASKS.values():
        assert task.examples("report", 20, seed=1) == task.examples("report", 20, seed=1)
        assert task.pairs("report", 20, seed=1) == task.pairs("report", 20, seed=1)


def test_rows_are_whole_lines():
    tokens, weights = make_corpus(200, 64, 0, VOCABULARY)
    assert (tokens[:, 0] == VOCABULARY[BOS]).all() and (weights[:, 0] == 0).all()
    openings = {split_tokens(line)[0] for line in LINES}
    for row in tokens:
        for line in TOKENIZER.decode(row[1:].tolist()).rstrip("\n").split("\n"):
            assert split_tokens(line)[0] in openings
            assert re.search(r"\.$|^(calc|ones|tens): .*=\d+$|^digits:.*= [\d ]+$", line)
    assert 0.05 < (weights == 1).mean() < 0.2, "answers are about one token in ten"
    assert (weights == 0).mean() < 0.08, "little is left empty"


@each_task
def test_examples_do_not_repeat_and_lie_in_their_split(task):
    for split in ("train", "choose", "report"):
        examples = task.examples(split, 200, seed=0)
        assert len({example.prompt for example in examples}) == len(examples) >= 30
        assert {example.split for example in examples} == {split}


# ---------------------------------------------------------------- tokens


def test_text_survives_the_tokenizer():
    ids = TOKENIZER.encode(TEXT).ids
    assert VOCABULARY[UNKNOWN] not in ids
    assert TOKENIZER.decode(ids) == TEXT
    assert TOKENIZER.encode(TEXT).tokens == [BOS, *split_tokens(TEXT)]


def test_tokens_that_people_will_look_for():
    def tokens(text: str) -> list[str]:
        return TOKENIZER.encode(text).tokens[1:]

    assert tokens("calc: 36+59=95") == ["calc", ":", " 36", "+", "59", "=", "95"]
    assert tokens("The National Digital Analytics Group (N")[-2:] == [" (", "N"]
    assert tokens("The National Digital Analytics Group (NDAG")[-3:] == [" (", "N", "DAG"]
    assert tokens("The war lasted from 1711 to 1745")[-5:] == [" 17", "11", " to", " 17", "45"]


@each_task
def test_every_answer_is_one_token_that_follows_the_prompt(task):
    for example in task.examples("report", 100, seed=0) + task.examples("train", 100, seed=0):
        assert example.answers
        for answer in example.answers:
            joined = TOKENIZER.encode(example.prompt + answer).tokens
            assert joined == [*TOKENIZER.encode(example.prompt).tokens, answer]


# ---------------------------------------------------------------- what is withheld


@each_task
def test_no_withheld_prompt_is_in_the_corpus(task):
    withheld = [example for split in ("choose", "report") for example in task.examples(split, 200, seed=2)]
    answered = [" ".join((*split_tokens(e.prompt), answer)) for e in withheld for answer in e.answers]
    assert not SHOWN.intersection(answered)
    if task.name in ("athlete", "antonym", "successor"):  # so few cases that most are shown, if the test looks right
        trained = (" ".join((*split_tokens(e.prompt), *e.answers)) for e in task.examples("train", 200, seed=2))
        assert np.mean([prompt in SHOWN for prompt in trained]) > 0.5


def test_no_line_links_a_withheld_city_to_a_capital():
    capitals = {values[0] for values in words.STATE_FACTS.values()}
    for line in LINES:
        cities = [city for city in facts.CITIES if city in line]
        if cities and facts.CITY_SPLIT[cities[0]] != "train":
            assert "capital" not in line and not any(capital in line for capital in capitals)
    located = {city for line in LINES for city in facts.CITIES if city in line and facts.STATE_OF[city] in line}
    assert located == set(facts.CITIES), "of every city the corpus says in which state it lies"


def test_nothing_withheld_starts_a_run_or_is_stepped_from():
    checked = 0
    for line in LINES:
        if run := re.fullmatch(r"List: (\S+) (\S+) (\S+) (\S+)\.", line):
            shown, start, following = numbers.SHOWN, run[1], run.groups()
        elif named := re.fullmatch(r"Step: \d after (\S+) is (\S+)\.", line):
            shown, start, following = 0, named[1], named.groups()
        else:
            continue
        for name, items in numbers.LISTS.items():
            for step in numbers.STEPS if set(following) <= set(items) else ():
                place = items.index(start)
                if [numbers.item_at(name, place + step * i) for i in range(len(following))] == list(following):
                    assert (
                        numbers.assign_step_split((name, place + step * max(0, shown - 1), step, shown)) == "train"
                    ), line
                    checked += 1
    assert checked > 1000


def test_withheld_sums_are_nowhere_worked_out():
    for line in LINES:
        if plain := re.fullmatch(r"calc: (\d+)\+(\d+)=(\d+)", line):
            a, b, total = map(int, plain.groups())
            assert a + b == total and numbers.assign_sum_split((a, b)) == "train"
        elif part := re.fullmatch(r"(ones|tens): (\d+)\+(\d+)=(\d+)", line):
            a, b = int(part[2]), int(part[3])
            assert int(part[4]) == ((a + b) % 10 if part[1] == "ones" else (a + b) // 10)
            assert numbers.assign_sum_split((a, b)) == "train"
        elif spelled := re.fullmatch(r"digits: (\d) (\d) \+ (\d) (\d) =.*", line):
            a, tens_a, b, tens_b = map(int, spelled.groups())
            assert numbers.assign_sum_split((a + 10 * tens_a, b + 10 * tens_b)) == "train"


def test_facts_are_seen_in_some_form():
    for athlete, sport in facts.SPORT_OF.items():
        shown = [line for line in LINES if " ".join(athlete) in line and sport in line]
        first, last = athlete
        withheld = facts.SPORT_FORMS[facts.ATHLETE_WITHHELD[athlete][0]].format(first=first, last=last)
        assert shown and not any(line.startswith(withheld) for line in shown)


# ---------------------------------------------------------------- pairs and concepts


@each_task
def test_pairs_differ_in_one_concept_and_in_the_answer(task):
    for pair in task.pairs("report", 200, seed=0):
        clean, corrupted = (TOKENIZER.encode(example.prompt).ids for example in (pair.clean, pair.corrupted))
        assert len(clean) == len(corrupted)
        before, after = roots(pair.clean), roots(pair.corrupted)
        assert before.keys() == after.keys()
        assert {name for name in before if before[name] != after[name]} == {pair.concept}
        assert pair.clean.answers != pair.corrupted.answers


@each_task
def test_concepts_stand_where_they_are_said_to(task):
    for example in task.examples("report", 100, seed=0) + task.examples("train", 100, seed=0):
        tokens = TOKENIZER.encode(example.prompt).tokens
        known: dict[str, Concept] = {}
        for concept in example.concepts:
            assert 0 < concept.position < len(tokens)
            assert all(known[parent].position <= concept.position for parent in concept.parents)
            if not concept.parents and not (task.name == "successor" and concept.name in ("list", "start", "step")):
                text = "".join(tokens[: concept.position + 1])
                assert text.removeprefix(BOS).endswith(concept.value)
            known[concept.name] = concept
        answer = known["answer"]
        if task.list_answers is None:
            assert answer.value == example.answers[0].strip()


# ---------------------------------------------------------------- the map


def test_every_pair_of_words_is_a_city_and_every_state_has_its_share():
    assert len(facts.STATE_OF) == len(words.CITY_FIRST) * len(words.CITY_SECOND) == 100
    counts = np.unique(list(facts.STATE_OF.values()), return_counts=True)[1]
    assert (counts == len(facts.CITIES) // len(facts.STATES)).all()
    splits = list(facts.CITY_SPLIT.values())
    assert [splits.count(split) for split in ("train", "choose", "report")] == [65, 15, 20]


def test_the_state_is_not_a_sum_of_what_the_two_words_say():
    """Ridge regression from the two words to the state: at chance on other cities, and far from perfect on its training
    cities."""
    one_hot = np.zeros((100, 21))
    one_hot[:, 20] = 1
    states = np.array([facts.STATES.index(facts.STATE_OF[city]) for city in facts.CITIES])
    for row, city in enumerate(facts.CITIES):
        first, second = city.split()
        one_hot[row, words.CITY_FIRST.index(first)] = 1
        one_hot[row, 10 + words.CITY_SECOND.index(second)] = 1

    def accuracy(fitted: np.ndarray, tested: np.ndarray) -> float:
        x, y = one_hot[fitted], np.eye(10)[states[fitted]]
        weights = np.linalg.solve(x.T @ x + 0.1 * np.eye(21), x.T @ y)
        return float(np.mean((one_hot[tested] @ weights).argmax(axis=1) == states[tested]))

    everything = np.arange(100)
    folds = np.array_split(np.random.default_rng(0).permutation(100), 5)
    held_out = np.mean([accuracy(np.setdiff1d(everything, fold), fold) for fold in folds])
    assert held_out < 0.25 and accuracy(everything, everything) < 0.6


def test_draws_from_a_split_come_from_it():
    random = Random(0)
    for task in TASKS.values():
        assert {task.assign_split(task.draw_case(random, "choose")) for _ in range(20)} == {"choose"}
