"""What no input may cost, and what every refusal has to look like."""

import os
import resource
import signal
import stat
import subprocess
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

SECONDS = {signal.SIGALRM: 40, signal.SIGPROF: 10}
"""On the clock, which a pipe stops, and of processors' time, which a busy machine does not lengthen."""
MOST_MEMORY = 200 << 20
"""Bytes that a tiny file may cost at its peak; what asks for ten times as much gets none."""
LONGEST = 4_000
"""Signs of a line that a terminal can show."""


class TooLong(BaseException):
    """No `Exception`: nothing that catches those may go on."""


class Fault(NamedTuple):
    cause: str
    """What is alike in all inputs that meet the same fault."""
    detail: str


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


@contextmanager
def limited(most: int = MOST_MEMORY) -> Iterator[list[Fault]]:
    """Within it a hang ends, memory is finite, and what it costs beyond the limits is added to the list at its end."""
    found: list[Fault] = []

    def too_long(number: int, _: object) -> None:
        raise TooLong

    before = {name: signal.signal(name, too_long) for name in SECONDS}
    limits = resource.getrlimit(resource.RLIMIT_AS)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    except OSError:
        pass
    held, peak = _memory("VmRSS"), _memory("VmHWM")
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + 10 * most, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS[signal.SIGALRM], 1)
    signal.setitimer(signal.ITIMER_PROF, SECONDS[signal.SIGPROF], 1)
    try:
        yield found
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for name, handler in before.items():
            signal.signal(name, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        taken = _memory("VmHWM") - max(held, peak)
        if taken > most:
            found.append(Fault("memory", f"{taken >> 20} MB at the peak"))


@contextmanager
def filled_later(path: Path, seconds: float = 5) -> Iterator[list[Fault]]:
    """If the path is a pipe that someone waits for, it ends after a while, as often as it is opened: libraries that
    open it in C are deaf to alarms. That someone waited is a fault."""
    found: list[Fault] = []
    if not path.exists() or not stat.S_ISFIFO(path.lstat().st_mode):
        yield found
        return
    with TemporaryDirectory() as scratch:
        waited, began = Path(scratch) / "waited", time.monotonic()
        script = 'sleep "$1"; : > "$2"; : > "$3"; while :; do : > "$2"; done'  # to open it waits for a reader
        command = ["sh", "-c", script, "sh", str(seconds), str(path), str(waited)]
        writer = subprocess.Popen(command, start_new_session=True)
        try:
            yield found
        finally:
            if time.monotonic() - began > seconds:
                time.sleep(0.2)  # the writer may not have said so yet
            os.killpg(writer.pid, signal.SIGKILL)
            writer.wait()
            if waited.exists():
                found.append(Fault("hang at a pipe", path.name))


def fault_of(error: BaseException) -> Fault:
    """Of an exception that should not be: its type, and the last place in jclt that it went through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/jclt/" in frame.filename]
    ours = [
        frame for frame in frames if not frame.filename.endswith(("/jclt/files.py", "/jclt/array_files.py"))
    ] or frames
    kind = "hang" if isinstance(error, TooLong) else type(error).__name__
    where = f"{ours[-1].filename.rpartition('/jclt/')[2]}:{ours[-1].lineno}" if ours else "outside jclt"
    said = str(error).strip().splitlines()
    return Fault(f"{kind} at {where}", said[0][:150] if said else "")


def check_line(line: str, *names: str) -> Fault | None:
    """What is wrong with a refusal: it is one line of signs that print, and names what is to blame."""
    if not line.isprintable():
        return Fault("line does not print", repr(line[:200]))
    if len(line) > LONGEST:
        return Fault("line of more signs than anyone reads", f"{len(line)}: {line[:200]}")
    if names and not any(name in line for name in names):
        return Fault("line names no file", line[:300])
    return None


def tree(folder: Path) -> set[str]:
    """All names below a folder."""
    return {
        os.path.relpath(os.path.join(root, name), folder)
        for root, folders, files in os.walk(folder)
        for name in (*folders, *files)
    }


def told(faults: dict[str, list[str]]) -> str:
    """The faults by cause, the frequent ones first, each with one example."""
    lines = [f"{len(examples):5} x {cause}\n        {examples[0]}" for cause, examples in faults.items()]
    return "\n".join(sorted(lines, key=lambda line: -int(line.split(" x ")[0])))
