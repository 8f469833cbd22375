"""The `jclt` command as a program of its own: sound streams, and interrupts that are answered before anything else is
loaded."""

import os
import sys
from typing import Any

from jclt import interrupts


def main() -> int:
    open_streams()
    interrupts.watch()
    try:
        from jclt.cli.main import main as run

        status = run()
    except BaseException as error:  # libraries turn an interrupt into other errors
        if not interrupts.was_asked() and not isinstance(error, KeyboardInterrupt):
            raise
        status = interrupts.INTERRUPTED
    if status == interrupts.INTERRUPTED:
        interrupts.end()
    interrupts.over()
    return status


def open_streams() -> None:
    """What is closed leads nowhere, rather than into the next file that is opened; what a terminal cannot show is shown
    as its escapes."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(number, mode, closefd=False))
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
