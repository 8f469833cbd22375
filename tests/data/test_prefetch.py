"""Work ahead of time: in order, and without threads left over."""

import threading
import time

import pytest

from jclt.data.prefetch import map_ahead, prefetch
from jclt.errors import UserError


def test_batches_come_in_order_and_a_few_ahead():
    steps_made: list[int] = []

    def batch(step: int) -> int:
        assert threading.current_thread() is not threading.main_thread()
        steps_made.append(step)
        return step * step

    with prefetch(batch, 3, 40, depth=2) as batches:
        for step, value in enumerate(batches, 3):
            assert value == step * step and len(steps_made) <= step - 3 + 3
    assert steps_made == list(range(3, 40))
    with prefetch(batch, 3, 3) as batches:
        assert list(batches) == []


def test_an_error_in_a_batch_is_raised_where_the_batch_is_used():
    def batch(step: int) -> int:
        if step == 4:
            raise UserError("shard 4: missing")
        return step

    values, threads = [], threading.active_count()
    with pytest.raises(UserError, match="shard 4: missing"), prefetch(batch, 0, 9) as batches:
        for value in batches:
            values.append(value)
    assert values == [0, 1, 2, 3] and threading.active_count() == threads


def test_stopping_early_leaves_no_thread():
    steps_made: list[int] = []

    def batch(step: int) -> int:
        steps_made.append(step)
        time.sleep(0.01)
        return step

    began, threads = time.perf_counter(), threading.active_count()
    with pytest.raises(KeyError), prefetch(batch, 0, 10_000, depth=5) as batches:
        next(batches)
        raise KeyError
    assert time.perf_counter() - began < 1 and len(steps_made) <= 6 and threading.active_count() == threads


def test_several_workers_keep_the_order():
    def slow(n: int) -> int:
        time.sleep(0.002 * (n % 3))
        return n

    with map_ahead(slow, range(50), workers=4, depth=8) as results:
        assert list(results) == list(range(50))
