"""The case studies of experiments/case_studies: their rules and their statistics; their verdicts on a few prompts."""

import sys
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import jax
import numpy as np
import pytest

from jclt.world.measure import Answer

FOLDER = Path(__file__).parents[1] / "experiments/case_studies"
STUDIES = sorted({path.stem for path in FOLDER.glob("*.py")} - {"beside", "common", "report", "smollm2"})


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    yield import_module
    for name in (*STUDIES, "beside", "common", "report"):
        sys.modules.pop(name, None)


def test_an_interval_is_that_of_the_mean(load):
    values = np.random.default_rng(0).normal(0.3, 0.1, 400)
    low, high = load("report").bootstrap(values)
    half = 1.96 * values.std() / 20
    np.testing.assert_allclose((low, high), (values.mean() - half, values.mean() + half), atol=0.15 * half)


def test_a_claim_holds_only_if_it_does_in_every_seed(load):
    report, outcome = load("report"), load("common").Outcome
    good, bad = [outcome(1.0, 0.0)] * 3, [outcome(1.0, 0.5)] * 3
    claim = report.Claim("", "", 0.9, ratio=5)
    assert report.judge(claim, [good, good])["holds"] and not report.judge(claim, [good, bad])["holds"]
    assert not report.judge(report.Claim("", "", 0.9, 0.05), [[outcome(0.8, 0.0)]])["holds"]


def test_random_features_are_others_of_the_same_layers_active_ones_first(load):
    activations = np.zeros((2, 3, 10), np.float32)
    activations[0, 1, [0, 4, 7]] = activations[1, 1, [2, 3]] = 1
    cells = [(0, 0), (0, 1), (0, 2), (1, 2)]
    drawn = load("common").draw_others(activations, 1, cells, np.random.default_rng(0))
    assert [layer for layer, _ in drawn] == [0, 0, 0, 1] and not set(drawn) & set(cells)
    assert len(set(drawn)) == 4 and set(drawn) >= {(0, 4), (0, 7), (1, 3)}


def test_other_sums_differ_as_they_should(load):
    draw, random = load("addition").draw_sums, Random(0)
    for _ in range(200):
        a, b = random.randrange(10, 100), random.randrange(10, 100)
        ones, tens = map(sum, draw(a, b, random))
        assert ones // 10 == (a + b) // 10 != tens // 10 and tens % 10 == (a + b) % 10


def test_prompts_are_those_that_the_model_answers_rightly(load, monkeypatch):
    common = load("common")
    examples = common.TASKS["successor"].examples("choose", 3 * common.DRAWN, 0)
    wrong = {example.prompt for example in examples[::2]}
    answer = lambda _, some: [Answer(x.answers[0], 1.0, x.prompt not in wrong) for x in some]  # noqa: E731
    monkeypatch.setattr(common, "answer_examples", answer)
    assert common.draw_examples("successor", 3, 0, split="choose") == examples[1:7:2]
    monkeypatch.undo()
    (answered,) = common.answer_examples(common.load()[0], [common.TASKS["addition"].make_example((36, 59))])
    assert answered.predicted == "95" and answered.right


@pytest.mark.parametrize(
    ("case", "other", "answer"),
    [
        (("days", 3, 1, 3), "months", (" May",)),  # Tuesday Wednesday Thursday
        (("months", 5, 3, 0), "numbers", (" 9",)),  # three after June
        (("months", 5, 3, 0), "days", ()),  # there is no ninth day
        (("months", 10, 1, 3), "days", ()),  # September October November
        (("days", 0, 1, 3), "months", ()),  # Saturday Sunday Monday: a list of months does not go around there
        (("days", 0, 1, 3), "jours", ()),
    ],
)
def test_another_list_has_an_answer_only_if_it_has_all_places_of_the_prompt(load, case, other, answer):
    successor = load("successor")
    example = load("common").TASKS["successor"].make_example(case)
    assert successor.expect_item(example, other) == answer
    assert successor.stays_within(example) == (case[:2] != ("days", 0))


@pytest.mark.exhaustive  # half a minute each, most of it to compile; the tests above are of their parts
@pytest.mark.parametrize("name", STUDIES)
def test_verdicts_on_a_few_prompts(name, load, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        study, report = load(name).STUDY, load("report")
        rows = report.run_study(study, prompts=6, seeds=(3,))
        assert study.show().logit_names
    for claim, row in zip(study.claims, rows, strict=True):
        times = 0.75 if claim.ratio > 2 else 1.1
        most = times * row["ours"] if claim.ratio else claim.most + 0.1  # of six prompts
        assert row["ours"] >= 0.7 * claim.least and row["control"] <= most, row
