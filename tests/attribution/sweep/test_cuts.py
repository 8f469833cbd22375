"""A cut changes how edges are computed, not what they are; and it is chosen by counting operations."""

import itertools

import jax
import numpy as np
import pytest
from more_cases import mark_others
from traced_graphs import DOUBLE, assert_close, assert_same, make_case, measure_residual, trace_whole_graph

from jclt.attribution import attribute, attribute_batch, calls
from jclt.attribution.sweep.cuts import COLUMN_BYTES, Work, choose_cut, count_operations
from jclt.models import ModelConfig

FEW = [("gemma2", "raw writes", 2)]
"""Post-norms and a CLT. A batch has learned positions, and a prompt without a cut."""
PAIRS = {*DOUBLE.items(), ("gemma3", "some layers"), ("gemma2", "raw writes"), ("neox", "some skips")}
CUTS = [(name, kind, cut) for name, kind in PAIRS for cut in (1, 2)]


def cut_at(monkeypatch: pytest.MonkeyPatch, *cuts: int) -> None:
    waiting = itertools.cycle(cuts)
    monkeypatch.setattr(calls, "choose_cut", lambda *_: next(waiting))


@pytest.mark.parametrize(("name", "kind", "cut"), mark_others(sorted(CUTS), FEW))
def test_graphs_are_the_same_with_a_cut(name, kind, cut, monkeypatch):
    cut_at(monkeypatch, cut)
    with jax.enable_x64():
        want = trace_whole_graph(name, kind, "float64")
        got = attribute(*make_case(name, kind, "float64"))
    assert_close(got.adjacency, want.adjacency, 1e-12)


@pytest.mark.exhaustive  # in a plain run all features are traced where there is a cut
def test_a_part_of_a_graph_with_a_cut_keeps_the_law(monkeypatch):
    cut_at(monkeypatch, 2)
    with jax.enable_x64():
        case = make_case("gemma2", "raw writes", "float64")
        few = attribute(*case, max_features=len(attribute(*case).features) // 3)
    assert measure_residual(few) <= 1e-10


@pytest.mark.exhaustive  # a plain run has one prompt with a cut
def test_prompts_of_a_batch_have_cuts_of_their_own(monkeypatch):
    model, coder, tokens = make_case("gpt2", "clt", "float32")
    prompts = [tokens, tokens[::-1]]
    want = [attribute(model, coder, prompt) for prompt in prompts]
    cut_at(monkeypatch, 1, 0)
    for got, graph in zip(attribute_batch(model, coder, prompts), want, strict=True):
        assert_same(got, graph)


MODEL = ModelConfig(family="gpt2", vocabulary=50257, width=768, layers=12, heads=12, mlp_width=3072, context=1024)


def test_operations_are_those_of_every_pair_and_step():
    rng = np.random.default_rng(0)
    features, cut, length = rng.integers(0, 3, (12, 5)), 4, 5
    work = Work(features.astype(float), traced=1.0, outputs=2, writes_on=True)
    carry, product = 4 * 768 * 768 * 2 // 2, 2 * 768
    sources = [(layer, position) for layer, position in np.ndindex(12, 5) for _ in range(features[layer, position])]
    targets = [*sources, (12, 4), (12, 4)]
    sources += list(np.ndindex(12, 5))
    errors = len(sources) - len(targets) + 2
    expected = 0
    for layer, position in targets:
        if layer >= cut:
            expected += carry * (layer - cut) * (position + 1)
        for number, (source, place) in enumerate(sources):
            if place > position or source >= layer:
                continue
            if layer < cut:
                expected += product
                continue
            is_error = number >= len(sources) - errors
            # The layers above the cut in which the source's writes are compared, and the positions where both meet.
            expected += product * (source >= cut if is_error else len(range(max(source, cut), layer)))
            expected += product * (position - place + 1) * (source < cut)
    for source, place in sources:
        expected += carry * max(cut - 2 - source, 0) * (length - place)
    assert count_operations(MODEL, work, cut) == expected


def test_a_cut_is_chosen_where_it_saves_much_and_fits():
    rng = np.random.default_rng(0)
    work = Work(rng.integers(10, 40, (12, 16)).astype(float), traced=1.0, outputs=5, writes_on=True)
    numbers = COLUMN_BYTES["cpu"] // 4
    cut = choose_cut(MODEL, work, numbers)
    operations = [count_operations(MODEL, work, layer) for layer in range(12)]
    assert cut in (4, 6) and operations[cut] == min(operations[::2]) < 0.75 * operations[0]
    assert choose_cut(MODEL, work, numbers // 20) < cut
    assert choose_cut(MODEL, work._replace(traced=0.02), numbers) == 0  # few targets cost less than many sources
    assert choose_cut(MODEL, work._replace(features=work.features // 10), numbers) == 0  # not worth a program
