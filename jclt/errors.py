"""Errors that the user can put right: one line that names the culprit and what was expected."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the command line shows as one line, without a traceback.

    A message can quote names and contents of files, which may hold line breaks, colour codes or right-to-left marks:
    characters that do not print are shown as escapes. The middle of a very long message is left out.
    """

    def __init__(self, message: str):
        super().__init__(shorten(escape_unprintable(message)))


class Interrupted(Exception):
    """A run was asked to stop and has saved its state; this is no failure."""


def escape_unprintable(text: str) -> str:
    """The text on one line, with escapes for characters that do not print."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shorten(text: str, longest: int = 2000) -> str:
    """The beginning and the end of a text that is too long to read."""
    return text if len(text) <= longest else f"{text[: longest * 3 // 4]} ... {text[-longest // 4 + 5 :]}"


def first_line(error: BaseException) -> str:
    """The first line of another library's error message; its type if it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def reason_of(error: BaseException) -> str:
    """Why something failed, without the error number and file name that errors of the operating system add."""
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)


def suggest_name(word: str, known: Iterable[str]) -> str:
    """A hint: the known name that is most like the word, or a list of all known names."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    return f"did you mean '{close[0]}'?" if close else f"expected one of: {', '.join(names)}"
