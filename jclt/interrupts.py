"""Ctrl-C, at any moment of a command, from its first imports to its way out: one line, and status 130.

An exception that is raised in the midst of C code can be lost there, or end the process in a crash. So an interrupt
ends the process at once, and is raised as an exception only where something must be undone first (`undone`).
"""

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

INTERRUPTED = 130
GRACE = 2.0
"""Seconds to undo things in, from an interrupt on; it may have been lost in a callback."""
SOON = 0.1
"""Seconds after which the main thread has not answered, since it compiles, say."""

_to_undo: set[object] = set()
_ended = threading.Lock()
_asked = _is_over = False


class undone:
    """Within it an interrupt is raised as KeyboardInterrupt, so that what is half done can be undone."""

    def __enter__(self) -> None:
        _to_undo.add(self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _to_undo.discard(self)


def watch() -> None:
    """From now on interrupts of this process are answered here, unless whoever started it had them ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.signal(signal.SIGINT, _answer)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_wait, args=(read,), daemon=True).start()
    sys.unraisablehook = _unraisable


def was_asked() -> bool:
    return _asked


def end() -> None:
    """Ends the process, not by way of libraries that may be in the midst of something."""
    if _ended.acquire(blocking=False):
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, RuntimeError, ValueError, AttributeError):  # full, in use, closed or none
                pass
        _say_and_exit()


def over() -> None:
    """The command has done its work: what interrupts it on its way out undoes nothing."""
    global _is_over
    _is_over = True


def _answer(number: int, frame: FrameType | None) -> None:
    global _asked
    if not _to_undo or _is_over:
        end()
    elif not _asked:  # once: what undoes things is not disturbed
        _asked = True
        raise KeyboardInterrupt


def _wait(read: int) -> None:
    """Ends the process where the main thread does not. Training answers interrupts itself: it saves first."""
    while True:
        if signal.SIGINT in os.read(read, 64) and signal.getsignal(signal.SIGINT) is _answer:
            time.sleep(SOON)
            start = time.monotonic()
            while _to_undo and time.monotonic() < start + GRACE:
                time.sleep(SOON)
            time.sleep(SOON if _asked else 0)
            if _ended.acquire(blocking=False):
                _say_and_exit()


def _say_and_exit() -> None:
    os.write(2, b"\njclt: interrupted\n" if os.isatty(2) else b"jclt: interrupted\n")
    os._exit(INTERRUPTED)


def _unraisable(found: Any) -> None:
    """Says nothing of an interrupt that is lost in a callback: the process ends all the same."""
    if not issubclass(found.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(found)
