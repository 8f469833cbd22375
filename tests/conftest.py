"""Every test runs with strict types and ranks, on several virtual CPU devices.

Programs run once or twice here, on a few numbers, so most of the time would go into compiling them. They are compiled
without most optimizations, in one piece, and without XLA's newer code generator, which is slow when these are off.
Tests that compare the bits of different programs, and those of programs for TPUs, are marked `optimized`: they have all
optimizations, and `.ci/run` repeats them with the newer generator.
"""

import gc
import os
import sys
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "")
if "device_count" not in os.environ["XLA_FLAGS"]:  # a worker of pytest-xdist has the flags already
    os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=4"
if "fusion_emitters" not in os.environ["XLA_FLAGS"] and version("jaxlib") < "0.11":  # an unknown flag ends the process
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import jax
import pytest
import type_checks
from drawing import add_options, read_options

gc.set_threshold(100_000, 20, 100)  # tracing makes many small objects: to look for cycles among them is 5% of the time
type_checks.check_calls()
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    add_options(parser)
    parser.addoption("--share", metavar="K/N", help="every N-th of the selected tests, from number K on")


@pytest.hookimpl(trylast=True)  # after the selection by markers
def pytest_collection_modifyitems(config, items):
    # Last, since compiled programs are forgotten before the first of them.
    items.sort(key=lambda item: item.get_closest_marker("optimized") is not None)
    if share := config.getoption("--share"):
        first, step = map(int, share.split("/"))
        # Neighbours are mostly cases of one test, so that each share has most of the tests.
        left_out = [item for number, item in enumerate(items) if number % step != first]
        config.hook.pytest_deselected(items=left_out)
        items[:] = items[first::step]


def pytest_configure(config):
    """Programs are compiled once: for all files, for the processes that tests start, and for the next run."""
    if "exhaustive" in config.option.markexpr.replace("not exhaustive", ""):
        type_checks.calls_checked = sys.maxsize
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR") and hasattr(config, "cache"):
        settings = {
            "jax_compilation_cache_dir": str(config.cache.mkdir("jax")),
            "jax_persistent_cache_min_compile_time_secs": 0.0,
        }
        for name, value in settings.items():
            jax.config.update(name, value)
            os.environ[name.upper()] = str(value)
    # With `-n`, neighbours go to one process, which has their fixtures and programs; at the end it gives some away.
    if getattr(config.option, "dist", "no") == "load":
        config.option.dist = "worksteal"


@pytest.fixture(scope="session")
def draw(pytestconfig):
    return read_options(pytestconfig)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before fixtures, which compile too; the processes that a test starts compile as it does."""
    optimized = item.get_closest_marker("optimized") is not None
    if optimized == jax.config.read("jax_disable_most_optimizations"):
        jax.clear_caches()  # no program of the other kind is used again
        jax.config.update("jax_disable_most_optimizations", not optimized)
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(not optimized))


@pytest.fixture
def one_form(monkeypatch):
    """Asks about a state in the first form of the question alone."""
    from jclt.evaluation import exchange

    monkeypatch.setattr(exchange, "ASKED", exchange.ASKED[:1])


MANY_MAPS = 20_000


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Each compiled program holds memory maps. Linux allows a process 65,530 of them; a full run would need more."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
