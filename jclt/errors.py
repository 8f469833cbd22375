"""The one kind of error that is the user's to mend: a line that names the culprit and what was expected."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Shown by the command line as one line, without a traceback.

    Names and contents of files go into the message, and whoever made them may have put line breaks, colours or
    right-to-left marks into them: signs that do not print are shown as their escapes. Of a text of many pages the
    middle is left out.
    """

    def __init__(self, message: str):
        super().__init__(shortened(printable(message)))


class Interrupted(Exception):
    """A run was asked to stop, and has saved what it needs to go on; no failure."""


def printable(text: str) -> str:
    """The text on one line, signs that do not print as their escapes."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shortened(text: str, longest: int = 2000) -> str:
    """A text that can be read, with its beginning and its end."""
    return text if len(text) <= longest else f"{text[: longest * 3 // 4]} ... {text[-longest // 4 + 5 :]}"


def first_line(error: BaseException) -> str:
    """What an error of another library says, as short as it can be quoted."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def reason_of(error: BaseException) -> str:
    """Why something failed, without the number and the file's name that the system's own errors add."""
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint naming what the user may have meant, or all that there is to choose from."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    return f"did you mean '{close[0]}'?" if close else f"expected one of: {', '.join(names)}"
