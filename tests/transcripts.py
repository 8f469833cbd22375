"""Transcripts on the pages are compared with what the command prints."""

import re
import shlex


def find_transcript(page: str, command: list[str]) -> list[str]:
    """The paragraphs that the text of a page shows below `$ jclt COMMAND`."""
    return page.split(f"$ jclt {shlex.join(command)}\n")[1].split("```")[0].strip().split("\n\n")


def check_transcript(shown: list[str], printed: str) -> None:
    """Each paragraph shown is printed, but for its decimal fractions; '...' stands for others."""

    def without_fractions(text: str) -> str:
        return re.sub(r"\d\.\d+", "p", text)

    paragraphs = {without_fractions(block) for block in printed.strip().split("\n\n")}
    assert {without_fractions(block) for block in shown} <= paragraphs | {"..."}
