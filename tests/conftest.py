"""Every test runs with strict types and ranks, on several virtual CPU devices."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import jax
import pytest
from drawing import add_options, read_options

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    add_options(parser)


def pytest_configure(config):
    """Programs are compiled once: for all files, for the processes that tests start, and for the next run."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR") and hasattr(config, "cache"):
        settings = {
            "jax_compilation_cache_dir": str(config.cache.mkdir("jax")),
            "jax_persistent_cache_min_compile_time_secs": 0.1,
        }
        for name, value in settings.items():
            jax.config.update(name, value)
            os.environ[name.upper()] = str(value)


@pytest.fixture(scope="session")
def draw(pytestconfig):
    return read_options(pytestconfig)


@pytest.fixture
def compile_quickly():
    """For programs that run once, on a few numbers, where no test asks how they are compiled."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


MANY_MAPS = 20_000


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Each compiled program holds memory maps. Linux allows a process 65,530 of them; a full run would need more."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
