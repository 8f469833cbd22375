"""The parts of a task: its cases, the text of a case, the right answers, and the concepts behind them."""

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, NamedTuple

Split = Literal["train", "choose", "report"]
"""The corpus shows `train`. A recipe is chosen with `choose` and judged once with `report`."""

TOKEN_PATTERN = (
    r"(?<=\()[A-Z](?=[A-Z]{3})"  # the N of (NDAG
    r"| ?\d\d(?=\d\d\b)"  # the century of a year
    r"| ?\d+| ?[^\W\d_]+| ?[^\w\s]|\n"
)
"""The text of a token: a word, number or sign with the space before it. Python and the tokenizer read it alike."""

BOS, EOS, UNKNOWN = "<bos>", "<eos>", "<unk>"


class Line(NamedTuple):
    """One line of the corpus. The loss of the answer's tokens has full weight."""

    prompt: str
    answer: str
    suffix: str = ""


@dataclass(frozen=True)
class Concept:
    """A fact that can be known from `position` on, a token of the prompt (<bos> is 0).

    Concepts without parents are free; together they determine the prompt. The others follow from their parents.
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
    answers: tuple[str, ...]  # the right tokens
    concepts: tuple[Concept, ...]


@dataclass(frozen=True)
class Pair:
    """Two examples whose prompts have as many tokens and differ in one free concept, `concept`."""

    clean: Example
    corrupted: Example
    concept: str


@dataclass(frozen=True)
class Task:
    """A rule of the world, as functions of a case. A case is a tuple of everything that is free in one prompt."""

    name: str
    description: str
    draw: Callable[[Random], Any]
    assign_split: Callable[[Any], Split | None]  # None: in no split
    write_line: Callable[[Any], Line]
    list_concepts: Callable[[Any, str], tuple[Concept, ...]]  # of a case and its prompt
    corrupt: Callable[[Random, Any], tuple[Any, str]]  # another case, and the concept in which it differs
    list_answers: Callable[[Any], tuple[str, ...]] | None = None  # if more than one answer is right

    def make_example(self, case: Any) -> Example:
        line = self.write_line(case)
        answers = self.list_answers(case) if self.list_answers else (split_tokens(line.answer)[0],)
        concepts = self.list_concepts(case, line.prompt)
        return Example(self.name, self.assign_split(case), line.prompt, answers, concepts)

    def draw_case(self, random: Random, split: Split) -> Any:
        """A random case of the split."""
        while True:
            case = self.draw(random)
            if self.assign_split(case) == split:
                return case

    def examples(self, split: Split, count: int, seed: int) -> list[Example]:
        """Up to `count` examples without repeats; fewer if the split has no more."""
        return [self.make_example(case) for case in self._draw_cases(split, count, seed)]

    def pairs(self, split: Split, count: int, seed: int) -> list[Pair]:
        """Up to `count` pairs. No clean prompt repeats."""
        random = Random(seed + 1)
        pairs: list[Pair] = []
        for case in self._draw_cases(split, count, seed):
            changed, concept = self.corrupt(random, case)
            pairs.append(Pair(self.make_example(case), self.make_example(changed), concept))
        return pairs

    def _draw_cases(self, split: Split, count: int, seed: int) -> list[Any]:
        random = Random(seed)
        cases: dict[Any, None] = {}
        for _ in range(8 * count):
            if len(cases) == count:
                break
            cases.setdefault(self.draw_case(random, split))
        return list(cases)


def split_tokens(text: str) -> list[str]:
    """The text as a list of tokens."""
    return re.findall(TOKEN_PATTERN, text)


def position_at(prompt: str, end: int) -> int:
    """The position (<bos> is 0) of the token whose text ends at the prompt's character `end`."""
    return len(split_tokens(prompt[:end]))


def find_position(prompt: str, text: str, start: int = 0) -> int:
    """The position of the last token of the first occurrence of `text` in the prompt."""
    return position_at(prompt, prompt.index(text, start) + len(text))


def last_position(prompt: str) -> int:
    """The position of the prompt's last token, which predicts the answer."""
    return len(split_tokens(prompt))


def assign_split(*key: object) -> Split:
    """The split of a combination, always the same: one in ten is for `choose`, one in ten for `report`."""
    bucket = zlib.crc32(repr(key).encode()) % 10
    return "choose" if bucket == 0 else "report" if bucket == 1 else "train"


def choose_other(random: Random, values: tuple[Any, ...], *excluded: Any) -> Any:
    """A random value that is not excluded."""
    return random.choice([value for value in values if value not in excluded])
