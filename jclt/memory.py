"""How much memory there is, asked before it is taken, and what is said when it ends all the same."""

import os
from pathlib import Path
from typing import Any

import jax

from jclt.errors import UserError

SPARE = 0.05
"""The share of what is free that nothing of ours takes."""


def free_memory(device: Any = None) -> int | None:
    """Bytes that can still be taken on a device (by default the first one); None where nothing says so.

    On a CPU this is what the machine has available, or what the container's limit leaves of it.
    """
    device = device or jax.local_devices()[0]
    if device.platform == "cpu":
        return free_host_memory()
    try:
        stats = device.memory_stats() or {}
    except jax.errors.JaxRuntimeError:  # some devices keep no statistics
        stats = {}
    limit = stats.get("bytes_limit")
    return None if limit is None else max(0, int(limit) - int(stats.get("bytes_in_use", 0)))


def free_host_memory() -> int | None:
    found = [free for free in (_available(), _left_of_limit()) if free is not None]
    return min(found, default=None)


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None


def _left_of_limit() -> int | None:
    """Of the memory limit of this process's control group (version 2), if it has one."""
    try:
        group = next(line.partition("::")[2] for line in _lines("/proc/self/cgroup") if line.startswith("0::"))
        folder = Path("/sys/fs/cgroup") / group.lstrip("/")
        limit = _lines(folder / "memory.max")[0]
        if limit == "max":
            return None
        cached = next(int(line.split()[1]) for line in _lines(folder / "memory.stat") if line.startswith("file "))
        return max(0, int(limit) - int(_lines(folder / "memory.current")[0]) + cached)
    except (OSError, ValueError, StopIteration, IndexError):
        return None


def _lines(path: str | Path) -> list[str]:
    return Path(path).read_text(encoding="ascii").splitlines()


def used_memory() -> int | None:
    """Bytes that this process holds of the host's memory, or of the first device's if that has its own."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        try:
            return (device.memory_stats() or {}).get("bytes_in_use")
        except jax.errors.JaxRuntimeError:
            return None
    try:
        return int(_lines("/proc/self/statm")[0].split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def check_memory(need: int | float, what: str, remedy: str, *, host: bool = False) -> None:
    """An error of one line if what is about to be done needs more memory than is free; `remedy` says what would fit."""
    free = free_host_memory() if host else free_memory()
    if free is not None and need > free * (1 - SPARE):
        raise UserError(f"{what}: needs {size_text(need)} of memory, expected at most {size_text(free)}; {remedy}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has ended, on the host or on a device."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, jax.errors.JaxRuntimeError | RuntimeError) and any(
        sign in str(error) for sign in ("RESOURCE_EXHAUSTED: Out of memory", "Out of memory", "out of memory")
    )


def size_text(size: int | float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
