"""The one kind of error that is the user's to mend: a line that names the culprit and what was expected."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Shown by the command line as one line, without a traceback."""


class Interrupted(Exception):
    """A run was asked to stop, and has saved what it needs to go on; no failure."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint naming what the user may have meant, or all that there is to choose from."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    return f"did you mean '{close[0]}'?" if close else f"expected one of: {', '.join(names)}"
