"""The `jclt` command as a program of its own, which can be interrupted at any moment.

Whatever it is doing then, from its first imports to its way out, it says so in one line and ends with status 130.
"""

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

INTERRUPTED = 130
GRACE = 2.0
"""Seconds that an interrupted command has to end by itself, as it cannot while it compiles, say, or when the interrupt
came within a callback of C code, where it is lost."""

asked = leaving = said = False


def main() -> int:
    global leaving, said
    open_streams()
    watch_interrupts()
    try:
        from jclt.cli import main as run

        status = run()
        said = said or status == INTERRUPTED
        leaving = True
    except BaseException as error:  # libraries turn an interrupt into other errors
        if not asked and not isinstance(error, KeyboardInterrupt):
            raise
        status = INTERRUPTED
        say_interrupted()
    if status == INTERRUPTED:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                pass
        os._exit(status)  # not by way of libraries that may be in the midst of something
    return status


def open_streams() -> None:
    """What is closed leads nowhere, rather than into the next file that is opened; what a terminal cannot show is
    shown as its escapes."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(number, mode, closefd=False))
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def watch_interrupts() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.signal(signal.SIGINT, _interrupt)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read,), daemon=True).start()
    sys.unraisablehook = _unraisable


def _interrupt(number: int, frame: FrameType | None) -> None:
    global asked
    if leaving:
        say_interrupted()
        os._exit(INTERRUPTED)
    if not asked:  # once: what is then cleaned up is not disturbed
        asked = True
        raise KeyboardInterrupt


def _watch(read: int) -> None:
    """Ends the process when an interrupt has not. Training answers interrupts itself: it saves first."""
    while True:
        if signal.SIGINT in os.read(read, 64) and signal.getsignal(signal.SIGINT) is _interrupt:
            time.sleep(GRACE)
            say_interrupted()
            os._exit(INTERRUPTED)


def _unraisable(found: Any) -> None:
    """Says nothing of an interrupt that is lost in a callback: the process ends all the same."""
    if not issubclass(found.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(found)


def say_interrupted() -> None:
    global said
    if not said:
        said = True
        os.write(2, b"jclt: interrupted\n")


if __name__ == "__main__":
    sys.exit(main())
