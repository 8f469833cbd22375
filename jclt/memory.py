"""How much memory is free, checked before it is allocated, and recognising errors of memory that has run out."""

import os
from pathlib import Path
from typing import Any

import jax

from jclt.errors import UserError

SPARE_SHARE = 0.05
"""The share of free memory that is left unused."""


def measure_free_memory(device: Any = None) -> int | None:
    """Bytes that can still be allocated on a device (by default the first one); None if that is not known.

    On a CPU this is the available memory of the machine or what is left of the container's limit, whichever is less.
    """
    device = device or jax.local_devices()[0]
    if device.platform == "cpu":
        return measure_free_host_memory()
    try:
        stats = device.memory_stats() or {}
    except jax.errors.JaxRuntimeError:  # some devices keep no statistics
        stats = {}
    limit = stats.get("bytes_limit")
    return None if limit is None else max(0, int(limit) - int(stats.get("bytes_in_use", 0)))


def measure_free_host_memory() -> int | None:
    """Bytes that can still be allocated on this host; None if that is not known."""
    limits = [free for free in (_read_available(), _read_left_of_limit()) if free is not None]
    return min(limits, default=None)


def _read_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None


def _read_left_of_limit() -> int | None:
    """What is left of the memory limit of this process's control group (version 2), if it has one."""
    try:
        group = next(
            line.partition("::")[2] for line in _read_text_lines("/proc/self/cgroup") if line.startswith("0::")
        )
        folder = Path("/sys/fs/cgroup") / group.lstrip("/")
        limit = _read_text_lines(folder / "memory.max")[0]
        if limit == "max":
            return None
        cached = next(
            int(line.split()[1]) for line in _read_text_lines(folder / "memory.stat") if line.startswith("file ")
        )
        return max(0, int(limit) - int(_read_text_lines(folder / "memory.current")[0]) + cached)
    except (OSError, ValueError, StopIteration, IndexError):
        return None


def _read_text_lines(path: str | Path) -> list[str]:
    return Path(path).read_text(encoding="ascii").splitlines()


def measure_used_memory() -> int | None:
    """Bytes that this process uses: of the first device's memory, or of the host's memory on a CPU."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        try:
            return (device.memory_stats() or {}).get("bytes_in_use")
        except jax.errors.JaxRuntimeError:
            return None
    try:
        return int(_read_text_lines("/proc/self/statm")[0].split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def check_memory(need: int | float, what: str, remedy: str, *, host: bool = False) -> None:
    """Raises an error of one line if `what` needs more memory than is free; `remedy` says what would fit."""
    free = measure_free_host_memory() if host else measure_free_memory()
    if free is not None and need > free * (1 - SPARE_SHARE):
        raise UserError(f"{what}: needs {format_size(need)} of memory, expected at most {format_size(free)}; {remedy}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that memory has run out, on the host or on a device."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, jax.errors.JaxRuntimeError | RuntimeError) and any(
        text in str(error) for text in ("RESOURCE_EXHAUSTED: Out of memory", "Out of memory", "out of memory")
    )


def format_size(size: int | float) -> str:
    """A number of bytes with its unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
