"""Results that are kept: computed once for each object, and forgotten with it."""

import gc
import weakref

import pytest
from coder_samples import CLT, random_coder

from jclt.attribution.placement import check_finite
from jclt.errors import UserError
from jclt.fingerprints import fingerprint
from jclt.kept import keep_result


class Weights(list[float]):
    """A list that can be referenced weakly."""


def test_a_result_is_computed_once_for_each_object():
    calls = list[Weights]()

    @keep_result
    def add_up(weights: Weights) -> float:
        calls.append(weights)
        return sum(weights)

    first, equal = Weights([1, 2]), Weights([1, 2])
    assert [add_up(first), add_up(first), add_up(equal)] == [3, 3, 3]
    assert len(calls) == 2 and calls[0] is first and calls[1] is equal


def test_a_result_is_forgotten_with_its_object():
    copy = keep_result(lambda weights: Weights(weights))
    weights = Weights([1, 2])
    result = weakref.ref(copy(weights))
    gc.collect()
    assert result() == weights  # kept, though nothing else refers to it
    del weights
    gc.collect()
    assert result() is None


def test_a_new_object_at_the_place_of_an_old_one_has_its_own_result():
    count = keep_result(len)
    for size in range(20):  # each list is freed before the next one is made, so most of them have the same identity
        assert count(Weights([0.0] * size)) == size
        gc.collect()


def test_an_object_without_weak_references_is_computed_at_each_call():
    weights = {"x": 1.0}
    count = keep_result(len)
    assert count(weights) == 1
    weights["y"] = 2.0
    assert count(weights) == 2


def test_an_error_is_not_kept():
    answers = iter([UserError("first"), 5])

    @keep_result
    def ask(_: Weights) -> int:
        answer = next(answers)
        if isinstance(answer, UserError):
            raise answer
        return answer

    weights = Weights()
    with pytest.raises(UserError, match="first"):
        ask(weights)
    assert ask(weights) == 5


def test_coders_can_be_referenced_weakly(monkeypatch):
    """So their fingerprints and checks are kept."""
    coder = random_coder(CLT)
    value = fingerprint(coder)
    check_finite(coder)
    monkeypatch.setattr("jclt.fingerprints.hash_json", lambda _: pytest.fail("computed again"))
    monkeypatch.setattr("jclt.attribution.placement.check_encoder", lambda _: pytest.fail("computed again"))
    assert fingerprint(coder) == value
    check_finite(coder)
