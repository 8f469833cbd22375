"""The shipped model knows its world: the bars of experiments/small_world.py, on the report split."""

import json
from pathlib import Path

import pytest
from more_cases import mark_others

import jclt
from jclt.models import Model, find_model
from jclt.world import measure
from jclt.world.facts import ASKED
from jclt.world.measure import BARS, KEPT, MOVED, find_state_swap, measure_accuracy, measure_swaps, probe_states
from jclt.world.tasks import TASKS
from jclt.world.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def shipped() -> Model:
    return jclt.load_model("demo")


def test_it_is_small_and_has_a_few_layers(shipped):
    size = sum(path.stat().st_size for path in Path(find_model("demo")).rglob("*"))
    assert size < 8e6
    assert 4 <= shipped.config.layers <= 6


def test_its_files_and_its_tokenizer_are_those_that_saving_it_writes(shipped, tmp_path):
    jclt.save_model(shipped, tmp_path / "again")
    folder = Path(find_model("demo"))
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "again").iterdir()}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((folder / name).read_text()) == json.loads((tmp_path / "again" / name).read_text())
    assert shipped.tokenizer.backend.get_vocab() == build_tokenizer().get_vocab()


def test_every_task_is_known(shipped, share_program):
    """Of 100 examples of a task, a share of 0.98 has a standard error of 0.014."""
    share_program(100)
    for task, share in measure_accuracy(shipped, "report", count=100).items():
        assert share >= BARS[task], (task, share)


@pytest.mark.parametrize("forms", mark_others([1, len(ASKED)], [1]))
def test_cities_are_answered_in_two_hops(shipped, forms, monkeypatch):
    """At the first place where a probe can read the state, before the last layer, the stream of another city of the
    same state keeps the answer and that of another state does not. A layer earlier, and at the city, a swap moves few.

    Of 80 swaps for each form of the question, shares of 0.95 and 0.9 have standard errors of 0.024 and 0.034."""
    monkeypatch.setattr(measure, "ASKED", ASKED[:forms])
    swaps = measure_swaps(shipped)
    right = find_state_swap(swaps, probe_states(shipped))
    assert right.layer < shipped.config.layers - 1
    assert right.kept >= KEPT and right.moved >= MOVED
    elsewhere = {(swap.layer, swap.where): swap.moved for swap in swaps}
    assert elsewhere[right.layer - 1, "end"] < 0.3
    assert elsewhere[right.layer, "city"] < 0.1


def test_the_state_is_worked_out_not_looked_up(shipped):
    probes = probe_states(shipped)
    assert probes["embeddings"] < 0.2
    assert probes[f"resid_post {shipped.config.layers - 2} end"] > 0.9


def test_text_goes_in_and_comes_out(shipped):
    assert jclt.generate(shipped, "calc: 36+59=", max_new_tokens=2) == "calc: 36+59=95"
    example = TASKS["two_hop"].examples("report", 1, seed=3)[0]
    assert jclt.generate(shipped, example.prompt, max_new_tokens=2).startswith(example.prompt + example.answers[0])
    samples = {jclt.generate(shipped, "calc: 36+59=", 2, temperature=5.0, seed=seed) for seed in range(8)}
    assert len(samples) > 1
