"""The program `jclt`, or `python -m jclt`: opens closed streams, handles Ctrl-C, and only then imports the command."""

import os
import sys
from typing import Any

from jclt import interrupts


def main() -> int:
    open_streams()
    interrupts.handle_interrupts()
    try:
        from jclt.cli.main import main as run

        status = run()
    except BaseException as error:  # libraries turn an interrupt into other errors
        if not interrupts.was_interrupted() and not isinstance(error, KeyboardInterrupt):
            raise
        status = interrupts.INTERRUPTED
    if status == interrupts.INTERRUPTED:
        interrupts.exit_interrupted()
    interrupts.mark_finished()
    return status


def open_streams() -> None:
    """Makes the standard streams safe to use.

    A closed stream is opened on the null device; otherwise the next file that is opened would take its number.
    Characters that a terminal cannot show are written as escapes.
    """
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
