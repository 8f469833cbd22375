"""The order of rows, and where they are placed."""

import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jclt.data.activation_store import create_store
from jclt.data.batches import choose_batch_rows, permute, place_rows
from jclt.data.token_rows import TokenRows
from jclt.mesh import DATA_AXIS, FEATURES_AXIS, make_mesh, make_sharding


@pytest.mark.parametrize("count", [1, 2, 3, 10, 16, 17, 1000, 4097, 100_000])
def test_every_epoch_visits_every_row_once(count):
    order = permute(np.arange(count), count, (0, 0))
    assert np.array_equal(np.sort(order), np.arange(count))
    assert np.array_equal(permute(np.arange(count)[::-1], count, (0, 0)), order[::-1])
    if count > 10:
        assert (permute(np.arange(count), count, (0, 1)) != order).mean() > 0.8
        assert (permute(np.arange(count), count, (1, 0)) != order).mean() > 0.8


def test_a_batch_is_a_function_of_the_step_alone():
    numbers = np.concatenate([choose_batch_rows(10, 3, step, 4) for step in range(5)])
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10))
    assert numbers[:10].tolist() != numbers[10:].tolist()
    np.testing.assert_array_equal(choose_batch_rows(10, 3, 2, 4), numbers[8:12])
    assert choose_batch_rows(10, 4, 0, 4).tolist() != numbers[:4].tolist()


def test_the_order_looks_shuffled():
    count, keys = 12, 6000
    orders = np.stack([permute(np.arange(count), count, (7, key)) for key in range(keys)])
    # Every number at every place, and every pair of neighbours, as often as by chance: chi-squared over its degrees of
    # freedom is near 1.
    singles = np.stack([np.bincount(orders[:, at], minlength=count) for at in range(count)])
    pairs = np.bincount((orders[:, :-1] * count + orders[:, 1:]).ravel(), minlength=count**2).reshape(count, count)
    pairs = pairs[~np.eye(count, dtype=bool)]
    for counts in (singles, pairs):
        expected = counts.mean()
        assert ((counts - expected) ** 2 / expected).mean() < 1.3
    large = permute(np.arange(100_000), 100_000, (0, 0)).astype(float)
    assert abs(np.corrcoef(large[:-1], large[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(large, np.arange(100_000))[0, 1]) < 0.02
    halves = np.bincount((large[:1000] // 10_000).astype(int), minlength=10)
    assert halves.min() > 60 and halves.max() < 140


def test_billions_of_rows_take_no_longer_than_a_few():
    count = 3_000_000_000_000
    rows = TokenRows(np.broadcast_to(np.uint16(1), (count, 4)), np.broadcast_to(np.float16(1), (count, 4)))
    began = time.perf_counter()
    numbers = np.concatenate([choose_batch_rows(len(rows), 0, step, 1024) for step in (0, 1, count // 1024 - 1)])
    assert time.perf_counter() - began < 0.5
    assert len(set(numbers.tolist())) == 3 * 1024 and 0 <= numbers.min() and numbers.max() < count
    assert abs(numbers.mean() / count - 0.5) < 0.05


def test_each_device_gets_its_rows_and_each_row_is_read_once():
    mesh = make_mesh(2, 2)
    rows = TokenRows(np.arange(400, dtype=np.uint16).reshape(50, 8), np.linspace(0, 1, 400).reshape(50, 8))
    index = choose_batch_rows(len(rows), 0, 3, 16)
    indices_read: list[np.ndarray] = []

    def read(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        indices_read.append(index)
        return rows.read(index)

    for axes, parts in [(("batch", None), 4), (("tokens", None), 2), ((None, None), 1)]:
        indices_read.clear()
        sharding = make_sharding(mesh, (16, 8), axes)
        tokens, weights = place_rows(read, index, sharding)
        want = jax.device_put(rows.read(index), sharding)
        assert tokens.sharding == weights.sharding == sharding and tokens.dtype == np.int32
        for array, expected in zip((tokens, weights), want, strict=True):
            np.testing.assert_array_equal(array, expected)
            for shard, expected_shard in zip(array.addressable_shards, expected.addressable_shards, strict=True):
                np.testing.assert_array_equal(shard.data, expected_shard.data)
        assert np.array_equal(np.concatenate(indices_read), index) and len(indices_read) == parts + 1


def test_activations_of_a_store_are_placed_the_same_way(tmp_path):
    store = create_store(tmp_path / "store", {}, 8, (2, 3, 4), "bfloat16")
    values = np.arange(192, dtype=np.float32).reshape(8, 2, 3, 4)
    store.write(0, values, -values)
    index, mesh = np.array([5, 1, 7, 2]), make_mesh(2, 2)
    inputs, targets = place_rows(store.read, index, NamedSharding(mesh, P(DATA_AXIS, None, None, FEATURES_AXIS)))
    np.testing.assert_array_equal(np.asarray(inputs, np.float32), values[index])
    np.testing.assert_array_equal(np.asarray(targets, np.float32), -values[index])
    assert {shard.data.shape for shard in inputs.addressable_shards} == {(2, 2, 3, 2)}
