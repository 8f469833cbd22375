"""What a task consists of: cases, the text of a case, and what is known to be true of it."""

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, NamedTuple

Split = Literal["train", "choose", "report"]
"""`train` is what the corpus shows; a recipe is chosen by `choose` and judged once by `report`."""

PIECE = (
    r"(?<=\()[A-Z](?=[A-Z]{3})"  # the N of (NDAG
    r"| ?\d\d(?=\d\d\b)"  # the century of a year
    r"| ?\d+| ?[^\W\d_]+| ?[^\w\s]|\n"
)
"""A token's text: a word, number or sign with the space before it. Python and the tokenizer read it alike."""


BOS, EOS, UNKNOWN = "<bos>", "<eos>", "<unk>"


class Line(NamedTuple):
    """One line of the corpus: the answer, of which each token counts, between a prompt and what follows."""

    prompt: str
    answer: str
    rest: str = ""


@dataclass(frozen=True)
class Concept:
    """Something that can be known from `position` (a token of the prompt, <bos> being 0) on.

    Concepts without parents are free, together they make the prompt; the others follow from their parents.
    """

    name: str
    value: str
    position: int
    parents: tuple[str, ...] = ()


@dataclass(frozen=True)
class Example:
    task: str
    split: Split | None
    prompt: str
    answers: tuple[str, ...]  # the tokens that are right
    concepts: tuple[Concept, ...]


@dataclass(frozen=True)
class Pair:
    """Two prompts of equal length in tokens, of which the one free concept `concept` differs, and the answers."""

    clean: Example
    corrupted: Example
    concept: str


@dataclass(frozen=True)
class Task:
    """A rule of the world as functions of a case, a tuple of all that is free in one prompt."""

    name: str
    description: str
    draw: Callable[[Random], Any]
    split: Callable[[Any], Split | None]  # None: shown nowhere
    line: Callable[[Any], Line]
    concepts: Callable[[Any, str], tuple[Concept, ...]]
    corrupt: Callable[[Random, Any], tuple[Any, str]]
    answers: Callable[[Any], tuple[str, ...]] | None = None  # where more than one answer is right

    def example(self, case: Any) -> Example:
        line = self.line(case)
        answers = self.answers(case) if self.answers else (pieces(line.answer)[0],)
        return Example(self.name, self.split(case), line.prompt, answers, self.concepts(case, line.prompt))

    def case(self, random: Random, split: Split) -> Any:
        """A random case of the split."""
        while True:
            case = self.draw(random)
            if self.split(case) == split:
                return case

    def examples(self, split: Split, count: int, seed: int) -> list[Example]:
        """Up to `count` examples without repeats; fewer where the split has no more."""
        return [self.example(case) for case in self._cases(split, count, seed)]

    def pairs(self, split: Split, count: int, seed: int) -> list[Pair]:
        """Up to `count` pairs, whose clean prompts do not repeat."""
        random = Random(seed + 1)
        pairs: list[Pair] = []
        for case in self._cases(split, count, seed):
            changed, concept = self.corrupt(random, case)
            pairs.append(Pair(self.example(case), self.example(changed), concept))
        return pairs

    def _cases(self, split: Split, count: int, seed: int) -> list[Any]:
        random = Random(seed)
        cases: dict[Any, None] = {}
        for _ in range(8 * count):
            if len(cases) == count:
                break
            cases.setdefault(self.case(random, split))
        return list(cases)


def pieces(text: str) -> list[str]:
    """The text of each token."""
    return re.findall(PIECE, text)


def position(prompt: str, end: int) -> int:
    """The position, after <bos>, of the token that ends where the text does at `end`."""
    return len(pieces(prompt[:end]))


def after(prompt: str, text: str, start: int = 0) -> int:
    """The position of the last token of the first occurrence of `text` in the prompt."""
    return position(prompt, prompt.index(text, start) + len(text))


def last(prompt: str) -> int:
    """The position of the prompt's last token, where the answer is read off."""
    return len(pieces(prompt))


def split_of(*key: object) -> Split:
    """The split of a combination: one in ten to choose by, one in ten to report, for ever."""
    place = zlib.crc32(repr(key).encode()) % 10
    return "choose" if place == 0 else "report" if place == 1 else "train"


def other(random: Random, values: tuple[Any, ...], *taken: Any) -> Any:
    """One of the values that is not taken."""
    return random.choice([value for value in values if value not in taken])
