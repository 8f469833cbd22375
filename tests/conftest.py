"""Every test runs with strict types and ranks, on several virtual CPU devices."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

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


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Each compiled program holds memory maps. Their number per process is limited, and a full run would need more."""
    yield
    jax.clear_caches()
