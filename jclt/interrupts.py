"""Ctrl-C at any moment of a command, from its first import to its exit: one line on stderr, and exit status 130.

An exception raised in the middle of C code can be lost there, or crash the process. So an interrupt normally ends the
process at once. It is raised as an exception only within `undo_on_interrupt`, where half-done work must be undone.
"""

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

INTERRUPTED = 130
"""The exit status."""
GRACE = 2.0
"""Seconds from an interrupt until the process ends in any case; the exception may have been lost in a callback."""
SOON = 0.1
"""Seconds after which the main thread counts as busy, for instance because it compiles."""

_to_undo: set[object] = set()
_exit_began = threading.Lock()
_was_interrupted = _is_finished = False


class undo_on_interrupt:
    """A context in which an interrupt is raised as KeyboardInterrupt, so that half-done work can be undone."""

    def __enter__(self) -> None:
        _to_undo.add(self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _to_undo.discard(self)


def handle_interrupts() -> None:
    """Handles interrupts of this process from now on, unless the program that started it ignores them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.signal(signal.SIGINT, _handle_signal)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_end_process_if_main_thread_is_busy, args=(read,), daemon=True).start()
    sys.unraisablehook = _report_unraisable


def was_interrupted() -> bool:
    return _was_interrupted


def exit_interrupted() -> None:
    """Ends the process directly, since libraries may be in the middle of something."""
    if _exit_began.acquire(blocking=False):
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, RuntimeError, ValueError, AttributeError):  # full, in use, closed or none
                pass
        _write_message_and_exit()


def mark_finished() -> None:
    """Called when the command has done its work: an interrupt during its exit undoes nothing."""
    global _is_finished
    _is_finished = True


def _handle_signal(number: int, frame: FrameType | None) -> None:
    global _was_interrupted
    if not _to_undo or _is_finished:
        exit_interrupted()
    elif not _was_interrupted:  # only once, so that a second interrupt does not disturb the undoing
        _was_interrupted = True
        raise KeyboardInterrupt


def _end_process_if_main_thread_is_busy(read: int) -> None:
    """A thread that ends the process if the main thread does not. Training, which saves first, has its own handler."""
    while True:
        if signal.SIGINT in os.read(read, 64) and signal.getsignal(signal.SIGINT) is _handle_signal:
            time.sleep(SOON)
            start = time.monotonic()
            while _to_undo and time.monotonic() < start + GRACE:
                time.sleep(SOON)
            time.sleep(SOON if _was_interrupted else 0)
            if _exit_began.acquire(blocking=False):
                _write_message_and_exit()


def _write_message_and_exit() -> None:
    os.write(2, b"\njclt: interrupted\n" if os.isatty(2) else b"jclt: interrupted\n")
    os._exit(INTERRUPTED)


def _report_unraisable(unraisable: Any) -> None:
    """Does not report an interrupt that is lost in a callback: the process ends anyway."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
