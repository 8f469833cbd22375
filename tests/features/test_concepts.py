"""Labels by known concepts: what holds where in a prompt, which label is chosen, and its purity, on features made by
hand and on the coder that ships."""

import numpy as np
import pytest
import scipy.sparse

import jclt
from jclt.coders import read_fingerprint
from jclt.features import load_labels
from jclt.features.concepts import (
    Firing,
    Truth,
    find_truth,
    list_candidates,
    read_activations,
    score_statements,
    write_concepts,
)
from jclt.features.statements import list_statements
from jclt.world import TASKS
from jclt.world.example import Concept, Example

PROMPT = Example(
    "agreement",
    "train",
    "Today the table beside the pictures",
    (" is",),
    (Concept("time", "Today", 1), Concept("subject", "table", 3), Concept("number", "singular", 3, ("subject",))),
)


def test_statements_hold_from_where_they_are_known():
    holds = {statement: list(positions) for statement, positions in list_statements(PROMPT, 6)}
    assert holds["task", "agreement"] == [0, 1, 2, 3, 4, 5, 6]
    assert holds["number", "singular"] == holds["subject", "table"] == [3, 4, 5, 6]
    assert holds["place", "time"] == [1] and holds["place", "after time"] == [2]
    assert holds["place", "subject"] == [3] and holds["place", "after subject"] == [4, 5, 6]
    assert holds["token", "singular noun"] == [3] and ("place", "number") not in holds
    every = [(s, list(p)) for s, p in list_statements(PROMPT, 6)]
    assert (("next", "singular noun"), [2]) in every and (("next", "verb"), [6]) in every  # the answer comes next


def test_parts_of_values_hold_too():
    example = TASKS["addition"].make_example((36, 59))
    holds = {statement: list(positions) for statement, positions in list_statements(example, 6)}
    assert holds["first digit of a", "3"] == holds["a", "36"] and holds["last digit of answer", "5"][-1] == 6
    city = TASKS["two_hop"].make_example(("Port Falls", "capital", "The city of {city} has the {relation}"))
    holds = {statement for statement, _ in list_statements(city, 8)}
    assert {("first word of city", "Port"), ("second word of city", "Falls")} <= holds


def make_truth(statements: dict[tuple[str, str], list[int]], prompts: int) -> Truth:
    """One place a prompt."""
    holds = np.zeros((len(statements), prompts), np.float32)
    for row, places in zip(holds, statements.values(), strict=True):
        row[places] = 1
    families: dict[str, list[int]] = {}
    for number, (name, _) in enumerate(statements):
        families.setdefault(name, []).append(number)
    matrix = scipy.sparse.csr_array(holds)
    return Truth(list(statements), {n: np.array(ids) for n, ids in families.items()}, matrix.tocsc(), matrix)


def fire(truth: Truth, values: dict[int, float]) -> Firing:
    places = np.array(sorted(values))
    return Firing(places, np.array([values[p] for p in places], np.float32), truth.holds[:, places].tocsr())


TRUTH = make_truth(
    {
        ("state", "Ohio"): list(range(8)),
        ("state", "Iowa"): list(range(8, 16)),
        ("state", "Utah"): list(range(16, 40)),
        ("task", "two_hop"): list(range(40)),
        ("task", "ioi"): list(range(40, 60)),
    },
    60,
)


@pytest.mark.parametrize(
    ("values", "text", "purity", "recall"),
    [
        ({n: 1.0 for n in range(8)}, "state = Ohio", 1, 1),
        ({n: 1.0 for n in range(14)}, "state is one of Ohio, Iowa", 1, 14 / 16),
        ({**{n: 3.0 for n in range(6)}, 50: 2.0}, "state = Ohio", 0.9, 6 / 8),
        ({n: 1.0 for n in range(0, 40, 2)}, "task = two_hop", 1, 0.5),  # three of three values would say nothing
        ({n: 1.0 for n in range(40, 50)}, "task = ioi", 1, 0.5),
        ({n: 1.0 for n in range(4)}, None, 0, 0),  # too few prompts
    ],
)
def test_the_label_says_where_the_activation_is(values, text, purity, recall):
    candidates = list(list_candidates(fire(TRUTH, values), TRUTH))
    best = max(candidates, key=lambda candidate: candidate.rank, default=None)
    if text is None or best is None:
        assert text is None and best is None
        return
    assert write_concepts(best.name, [TRUTH.statements[n][1] for n in best.statements]) == text
    assert (best.purity, best.recall) == (pytest.approx(purity), pytest.approx(recall))


def test_scores_are_those_of_their_definitions():
    firing = fire(TRUTH, {0: 3.0, 1: 3.0, 2: 1.0, 3: 1.0, 20: 2.0})
    scores = score_statements(firing, TRUTH, [("state", "Ohio")], 60)
    assert scores["purity"] == pytest.approx(0.8) and scores["pure_firings"] == pytest.approx(4 / 5)
    assert scores["detection"] == pytest.approx((4 / 5 + 51 / 55) / 2)
    assert score_statements(firing, TRUTH, [("state", "absent")], 60)["purity"] == 0
    assert score_statements(fire(TRUTH, {0: 1.0}), TRUTH, [("state", "Ohio")], 60) == {}


def test_activations_are_the_coders():
    model = jclt.load_model("demo")
    coder = jclt.load_coder("demo", model=model, check=False)
    prompts = TASKS["addition"].examples("report", 3, seed=0) + TASKS["ioi"].examples("report", 2, seed=0)
    found = read_activations(model, coder, prompts)
    start = 0
    for number, example in enumerate(prompts):
        seen = jclt.run(model, example.prompt, capture=("mlp_in",))[1]["mlp_in"]
        want = np.asarray(coder.encode(2, seen[2]))[..., 1:, :].reshape(-1, coder.config.features)
        got = found.values[2][start : start + len(want)].toarray()
        np.testing.assert_allclose(got, want, atol=1e-3)
        assert (found.prompt[start : start + len(want)] == number).all()
        start += len(want)
    truth = find_truth(model, coder, prompts)
    for task, first, last in (("addition", 0, 3), ("ioi", 3, 5)):
        holds = truth.holds.tocsr()[[truth.statements.index(("task", task))]].toarray()[0]
        np.testing.assert_array_equal(holds, (found.prompt >= first) & (found.prompt < last))


def test_the_shipped_labels_are_of_the_shipped_coder_and_mostly_pure():
    coder = jclt.load_coder("demo", check=False)
    labels = load_labels("demo", read_fingerprint(coder))
    by_concepts = [label for label in labels.values() if label.source == "concepts"]
    assert len(by_concepts) > 800 and all(label.scores["purity"] >= 0.8 for label in by_concepts)
    assert np.mean([label.scores["shuffled"] for label in by_concepts]) < 0.3
    graph = jclt.attribute(jclt.load_model("demo"), coder, TASKS["addition"].examples("report", 1, seed=0)[0].prompt)
    kept = {(int(layer), int(feature)) for layer, _, feature in graph.prune().features}
    named = [place for place in kept if place in labels and labels[place].source == "concepts"]
    assert len(named) >= 0.5 * len(kept)
