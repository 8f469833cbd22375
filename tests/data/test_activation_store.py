"""The store of activations: rows read as written, a harvest continues where it stopped, other stores are refused."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jclt.data.activation_store import create_store, open_store
from jclt.errors import UserError

ABOUT = {"model": "demo", "sites": ["mlp_in", "mlp_out"], "length": 5, "data": "abc"}
SHAPE = (2, 5, 3)


def rows(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, *SHAPE)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_was_written_is_read(tmp_path, dtype):
    inputs, targets = (jnp.asarray(rows(12, seed), dtype) for seed in (0, 1))
    inputs = inputs.at[3].set(0)  # zarr leaves out chunks of zeros, and the row exists all the same
    store = create_store(tmp_path / "store", ABOUT, 12, SHAPE, dtype)
    for start in (0, 5, 10):
        store.write(start, inputs[start : start + 5], targets[start : start + 5])
    index = np.array([11, 3, 3, 0])
    again = open_store(tmp_path / "store", ABOUT)
    for expected, array in zip((inputs, targets), again.read(index), strict=True):
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, np.asarray(expected)[index])
    assert [x.shape for x in again.read(index[:0])] == [(0, *SHAPE)] * 2
    assert len(again) == 12


def test_a_batch_reads_only_its_rows(tmp_path):
    store = create_store(tmp_path / "store", ABOUT, 6, SHAPE)
    store.write(0, rows(6, 0), rows(6, 1))
    files = [path for path in (tmp_path / "store" / "inputs").rglob("*") if path.is_file()]
    chunks = [path for path in files if path.name != "zarr.json"]
    assert len(chunks) == 6 and {path.stat().st_size for path in chunks} == {2 * 2 * 5 * 3}


def test_a_harvest_goes_on_where_it_stopped(tmp_path):
    store = create_store(tmp_path / "store", ABOUT, 6, SHAPE)
    assert store.count_written() == 0
    store.write(0, rows(2, 0), rows(2, 1))
    store.write(4, rows(1, 2), rows(1, 3))
    again = create_store(tmp_path / "store", ABOUT, 6, SHAPE)
    assert again.count_written() == 2 and again.find_written().tolist() == [True, True, False, False, True, False]
    with pytest.raises(UserError, match="3 of 6 rows are written, expected all of them"):
        open_store(tmp_path / "store", ABOUT)
    with pytest.raises(UserError, match=r"rows cannot be read \(NOT_FOUND"):
        again.read(np.array([0, 3]))
    again.write(2, rows(4, 4), rows(4, 5))
    assert again.count_written() == 6
    assert again.read(np.array([0]))[0].tolist() == store.read(np.array([0]))[0].tolist()


def test_processes_write_different_rows():
    """In a key-value store in memory. Each thread opens it again, as a process would."""
    inputs, targets = rows(40, 0), rows(40, 1)

    def process(start: int) -> None:
        store = create_store("memory://shared/store", ABOUT, 40, SHAPE, "float32")
        for row in range(start, start + 10):
            store.write(row, inputs[row : row + 1], targets[row : row + 1])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(process, range(0, 40, 10)))
    store = open_store("memory://shared/store/", ABOUT | {"dtype": "float32"})
    np.testing.assert_array_equal(store.read(np.arange(40))[1], targets)


def test_a_store_made_from_something_else_is_refused(tmp_path):
    path = tmp_path / "store"
    create_store(path, ABOUT, 1, SHAPE).write(0, rows(1, 0), rows(1, 0))
    with pytest.raises(UserError) as error:
        open_store(path, ABOUT | {"sites": ["resid_mid", "mlp_out"]})
    expected = "was made with sites=['mlp_in', 'mlp_out'], expected sites=['resid_mid', 'mlp_out']"
    assert str(error.value) == f"store '{path}': {expected}"
    with pytest.raises(UserError, match="was made with data=abc, expected data=abd"):
        create_store(path, ABOUT | {"data": "abd"}, 1, SHAPE)
    with pytest.raises(UserError, match="does not say with which model_weights it was made, expected model_weights=a1"):
        create_store(path, ABOUT | {"model_weights": "a1"}, 1, SHAPE)
    with pytest.raises(UserError, match="was made with rows=1, expected rows=2"):
        create_store(path, ABOUT, 2, SHAPE)
    with pytest.raises(UserError, match="was made with dtype=bfloat16, expected dtype=float32"):
        create_store(path, ABOUT, 1, SHAPE, "float32")


def test_wrong_arguments_and_damaged_stores_are_refused(tmp_path):
    with pytest.raises(UserError, match="no description.json, expected a store of activations"):
        open_store(tmp_path, ABOUT)
    with pytest.raises(UserError, match="dtype 'int8', expected one of: bfloat16, float16, float32"):
        create_store(tmp_path, ABOUT, 1, SHAPE, "int8")
    with pytest.raises(UserError, match=r"store 'gs2://x': cannot be opened \(.*unsupported URL scheme"):
        create_store("gs2://x", ABOUT, 1, SHAPE)
    store = create_store(tmp_path / "store", ABOUT, 2, SHAPE)
    with pytest.raises(ValueError, match=r"rows 1 on of shape \(2, 2, 5, 3\) do not fit into \(2, 2, 5, 3\)"):
        store.write(1, rows(2, 0), rows(2, 0))
    (tmp_path / "store" / "targets" / "zarr.json").unlink()
    with pytest.raises(UserError, match="cannot be opened"):
        open_store(Path(tmp_path / "store"), ABOUT)
