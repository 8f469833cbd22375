"""Used by all benchmarks: this machine's measured matmul rate, timing, peak memory, the table and the JSON."""

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jclt.training.coder.speed import measure_matmul_rate as measured_rate


class Case(NamedTuple):
    case: str
    operations: float
    seconds: float
    matmul_fraction: float | None = None
    against: str | None = None
    ratio: float | None = None  # its time over ours
    peak_gb: float | None = None  # the most memory of the process, with model and coder


def parser(doc: str | None) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", type=Path, help="write the cases to this file")
    options.add_argument("--repeats", type=int, default=7, help="runs of each case, of which the fastest counts")
    return options


def arguments(doc: str | None) -> argparse.Namespace:
    return parser(doc).parse_args()


def best(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest run, after one that is not counted."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_rate(repeats: int, dtype: str = "float32", size: int | None = None) -> float:
    """Operations a second of one large product. Other figures are compared with it."""
    return measured_rate(dtype, size, max(repeats, 5))


def run_alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own, so that its peak memory is its own, too."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def forget_peak() -> None:
    """Lets `measure_peak` begin anew, at what this process uses now."""
    Path("/proc/self/clear_refs").write_text("5")


def measure_peak() -> float:
    """The most memory that this process has used, in GB (10^9 bytes)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmHWM:"))


def report(cases: list[Case], rate: float, file: Path | None) -> None:
    print(f"matmul rate of this machine ({jax.devices()[0].device_kind}): {rate / 1e9:.0f} GFLOP/s")
    print(f"{'case':46} {'GFLOP':>9} {'seconds':>9} {'GFLOP/s':>9} {'of matmul':>9} {'GB':>5}  beside")
    for c in cases:
        speed = c.operations / c.seconds / 1e9
        fraction = "" if c.matmul_fraction is None else f"{c.matmul_fraction:9.0%}"
        peak = "" if c.peak_gb is None else f"{c.peak_gb:.2f}"
        beside = "" if c.against is None else f"{c.against}: {c.ratio:.2f}x"
        print(f"{c.case:46} {c.operations / 1e9:9.1f} {c.seconds:9.4f} {speed:9.0f} {fraction:>9} {peak:>5}  {beside}")
    if file:
        file.write_text(json.dumps([c._asdict() for c in cases], indent=1) + "\n")
