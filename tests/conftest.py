"""Every test runs with strict types and ranks, on several virtual CPU devices."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    """What `tests/fuzz` draws; only the first conftest may add options."""
    group = parser.getgroup("fuzz")
    group.addoption(
        "--fuzz-inputs", type=int, metavar="N", help="damaged files to read (default: few; -m fuzz: 10,000)"
    )
    group.addoption("--fuzz-seed", type=int, default=0, metavar="S", help="draws other inputs")
    group.addoption("--fuzz-only", type=int, metavar="NUMBER", help="this input alone")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Each compiled program holds on to memory maps, of which a process may have so many; a whole run needs more."""
    yield
    jax.clear_caches()
