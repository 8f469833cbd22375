"""The limits of time and memory for every input, and the form of every refusal."""

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
"""Seconds of wall-clock time, which end a wait at a pipe, and of processor time, unchanged by other processes."""
MOST_MEMORY = 200 << 20
"""Bytes of memory that a tiny file may need at the peak. Requests beyond ten times as much fail."""
LONGEST = 4_000
"""The most characters in a line."""


class TooLong(BaseException):
    """Raised at a time limit. Not an `Exception`, so that no handler of these continues."""


class Fault(NamedTuple):
    cause: str
    """The same for all inputs that cause the same fault."""
    detail: str


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


@contextmanager
def limit_resources(most: int = MOST_MEMORY) -> Iterator[list[Fault]]:
    """Limits time and memory. At the end, adds a fault to the list if the peak of memory was above `most`."""
    faults: list[Fault] = []

    def too_long(number: int, _: object) -> None:
        raise TooLong

    handlers = {name: signal.signal(name, too_long) for name in SECONDS}
    limits = resource.getrlimit(resource.RLIMIT_AS)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    except OSError:
        pass
    memory, peak = _memory("VmRSS"), _memory("VmHWM")
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + 10 * most, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS[signal.SIGALRM], 1)
    signal.setitimer(signal.ITIMER_PROF, SECONDS[signal.SIGPROF], 1)
    try:
        yield faults
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for name, handler in handlers.items():
            signal.signal(name, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        growth = _memory("VmHWM") - max(memory, peak)
        if growth > most:
            faults.append(Fault("memory", f"{growth >> 20} MB at the peak"))


@contextmanager
def fill_pipe_later(path: Path, seconds: float = 5) -> Iterator[list[Fault]]:
    """If the path is a pipe, opens and closes its other end after a while, as often as needed: alarms do not stop
    libraries that open it in C. If a reader waited, this is a fault."""
    faults: list[Fault] = []
    if not path.exists() or not stat.S_ISFIFO(path.lstat().st_mode):
        yield faults
        return
    with TemporaryDirectory() as scratch:
        waited, began = Path(scratch) / "waited", time.monotonic()
        script = 'sleep "$1"; : > "$2"; : > "$3"; while :; do : > "$2"; done'  # to open it waits for a reader
        command = ["sh", "-c", script, "sh", str(seconds), str(path), str(waited)]
        writer = subprocess.Popen(command, start_new_session=True)
        try:
            yield faults
        finally:
            if time.monotonic() - began > seconds:
                time.sleep(0.2)  # the writer may not have created the file yet
            os.killpg(writer.pid, signal.SIGKILL)
            writer.wait()
            if waited.exists():
                faults.append(Fault("hang at a pipe", path.name))


def describe_error(error: BaseException) -> Fault:
    """The fault of an unexpected exception: its type, and the last place in jclt in its traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/jclt/" in frame.filename]
    jclt_frames = [
        frame for frame in frames if not frame.filename.endswith(("/jclt/files.py", "/jclt/array_files.py"))
    ] or frames
    kind = "hang" if isinstance(error, TooLong) else type(error).__name__
    last = jclt_frames[-1] if jclt_frames else None
    where = f"{last.filename.rpartition('/jclt/')[2]}:{last.lineno}" if last else "outside jclt"
    message_lines = str(error).strip().splitlines()
    return Fault(f"{kind} at {where}", message_lines[0][:150] if message_lines else "")


def check_line(line: str, *names: str) -> Fault | None:
    """The fault of a refusal, unless it is one printable line that contains one of the names."""
    if not line.isprintable():
        return Fault("line does not print", repr(line[:200]))
    if len(line) > LONGEST:
        return Fault("line too long", f"{len(line)}: {line[:200]}")
    if names and not any(name in line for name in names):
        return Fault("line names no file", line[:300])
    return None


def list_tree(folder: Path) -> set[str]:
    """All names below a folder."""
    return {
        os.path.relpath(os.path.join(root, name), folder)
        for root, folders, files in os.walk(folder)
        for name in (*folders, *files)
    }


def format_faults(faults: dict[str, list[str]]) -> str:
    """The faults by cause, most frequent first, each with one example."""
    lines = [f"{len(examples):5} x {cause}\n        {examples[0]}" for cause, examples in faults.items()]
    return "\n".join(sorted(lines, key=lambda line: -int(line.split(" x ")[0])))
