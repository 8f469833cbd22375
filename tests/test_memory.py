"""The available memory, and the message if it is too little."""

import mmap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jclt import memory
from jclt.errors import UserError


def test_free_and_used_memory_are_plausible():
    free, used = memory.measure_free_memory(), memory.measure_used_memory()
    assert free is not None and 1 << 20 < free < 1 << 50
    assert used is not None and 1 << 20 < used < 1 << 46


def test_used_memory_grows_with_what_is_held():
    before = memory.measure_used_memory()
    with mmap.mmap(-1, 50_000_000) as block:  # an array might lie where an earlier one was freed
        block.write(b"\1" * len(block))
        after = memory.measure_used_memory()
        assert before is not None and after is not None and after - before > 0.8 * len(block)


def test_what_does_not_fit_is_refused_with_what_would(monkeypatch):
    monkeypatch.setattr(memory, "measure_free_host_memory", lambda: 10**9)
    memory.check_memory(0.9e9, "graph", "shorten it")
    with pytest.raises(UserError, match=r"^graph: needs 1.2 GB of memory, expected at most 1 GB; shorten it$"):
        memory.check_memory(1.2e9, "graph", "shorten it")


def test_nothing_is_refused_where_nothing_is_known(monkeypatch):
    monkeypatch.setattr(memory, "measure_free_host_memory", lambda: None)
    memory.check_memory(1e30, "graph", "shorten it")


def test_the_end_of_memory_is_recognised():
    with pytest.raises(Exception) as numpys:
        np.zeros(1 << 58, np.uint8)
    with pytest.raises(Exception) as devices:
        jax.block_until_ready(jnp.zeros(1 << 46, jnp.uint8))
    assert memory.is_out_of_memory(numpys.value) and memory.is_out_of_memory(devices.value)
    assert not memory.is_out_of_memory(ValueError("No space left on device"))
    assert not memory.is_out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: No space left on device"))
