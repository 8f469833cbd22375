"""Pairs of a clean and a corrupted prompt, with right and wrong answers: what patching compares.

The two prompts of a pair have as many tokens, and each answer is one token. Rows that are not so are left out, and the
object says which and why: averages over positions mean nothing for prompts of different lengths.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np

from jclt.errors import UserError, shorten
from jclt.models import Model
from jclt.models.model import token_array
from jclt.shapes import Int
from jclt.world import TASKS
from jclt.world.example import Split

PromptSide = str | Sequence[int] | np.ndarray
"""Text, or token ids `[T]`."""
AnswerTokens = str | int | Sequence[str | int]
"""One answer or several, as text with its leading space, or as token ids."""


class PairRow(NamedTuple):
    """One pair as it is written down. Without a corrupted prompt it only serves methods that need none."""

    clean: PromptSide
    corrupted: PromptSide | None
    answer: AnswerTokens
    wrong_answer: AnswerTokens = ()
    subject: str | tuple[int, int] | None = None  # text within the clean prompt, or its first token and the one after
    name: str | None = None


class LeftOut(NamedTuple):
    """A row that is no pair, and why."""

    name: str
    reason: str  # of a few kinds, for counting
    detail: str


@dataclass(frozen=True, eq=False, repr=False)
class PromptPairs:
    """Pairs as token ids; one entry each."""

    names: tuple[str, ...]
    clean: tuple[Int[np.ndarray, "_"], ...]
    corrupted: tuple[Int[np.ndarray, "_"] | None, ...]
    answers: tuple[tuple[int, ...], ...]
    wrong_answers: tuple[tuple[int, ...], ...]
    subjects: tuple[tuple[int, int] | None, ...]  # first token of the subject, and the one after its last
    token_texts: tuple[tuple[str, ...], ...]  # of the clean prompts
    left_out: tuple[LeftOut, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        lengths = sorted(self.group_by_length())
        tokens = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        counts = Counter(row.reason for row in self.left_out)
        reasons = ", ".join(f"{count} with {reason}" for reason, count in counts.items())
        return f"<PromptPairs: {len(self)} pairs of {tokens} tokens{f'; left out: {reasons}' if reasons else ''}>"

    def group_by_length(self) -> dict[int, Int[np.ndarray, "_"]]:
        """The numbers of the pairs of each length."""
        lengths = np.array([len(ids) for ids in self.clean], int)
        return {int(length): np.flatnonzero(lengths == length) for length in np.unique(lengths)}

    def keep_one_length(self, beside: "PromptPairs | None" = None) -> "PromptPairs":
        """The pairs of one length, as only then positions mean the same: the most frequent one. With `beside`, the
        length for which the smaller of the two numbers of pairs is largest; `beside.keep_one_length(self)` then keeps
        the same length."""
        groups = [pairs.group_by_length() for pairs in (self, self if beside is None else beside)]
        shared = sorted(groups[0].keys() & groups[1].keys())
        if not shared:
            lengths = (", ".join(map(str, group)) for group in groups)
            raise UserError(
                f"pairs: of {' and of '.join(lengths)} tokens in two sets, expected a length that both have"
            )
        best = max(shared, key=lambda length: min(len(group[length]) for group in groups))
        return self.take(groups[0][best])

    def take(self, numbers: Iterable[int] | np.ndarray) -> "PromptPairs":
        """The pairs with these numbers."""
        numbers = [int(number) for number in numbers]
        if not numbers or not all(0 <= number < len(self) for number in numbers):
            raise UserError(f"pairs {shorten(str(numbers), 80)}: expected numbers from 0 to {len(self) - 1}")
        columns = {name: getattr(self, name) for name in PAIR_COLUMNS}
        return PromptPairs(**{name: tuple(column[i] for i in numbers) for name, column in columns.items()})


PAIR_COLUMNS = ("names", "clean", "corrupted", "answers", "wrong_answers", "subjects", "token_texts")


def make_pairs(model: Model, rows: Iterable[PairRow | tuple[Any, ...]]) -> PromptPairs:
    """Pairs from rows of (clean, corrupted, answer, wrong answer), in text or token ids, with a subject and a name if
    wanted. Rows whose prompts differ in length, or with an answer that is not one token, are listed in `left_out`."""
    kept: list[tuple] = []
    left_out: list[LeftOut] = []
    for number, row in enumerate(rows):
        row = PairRow(*cast(Any, row))
        name = f"pair {number}" if row.name is None else row.name
        read = read_row(model, row, name)
        if isinstance(read, LeftOut):
            left_out.append(read)
        else:
            kept.append(read)
    if not kept:
        first = f"; {left_out[0].name}: {left_out[0].detail}" if left_out else ""
        raise UserError(f"pairs: none of {len(left_out)} rows is left{first}")
    return PromptPairs(*zip(*kept, strict=True), left_out=tuple(left_out))


def read_row(model: Model, row: PairRow, name: str) -> LeftOut | tuple:
    """The columns of one pair, or why it is none."""
    clean = read_side(model, row.clean, name)
    corrupted = None if row.corrupted is None else read_side(model, row.corrupted, name)
    if corrupted is not None and len(corrupted) != len(clean):
        detail = f"{len(clean)} tokens of the clean prompt and {len(corrupted)} of the corrupted one"
        return LeftOut(name, "prompts of unequal length", detail)
    answers: list[tuple[int, ...]] = []
    for given in (row.answer, row.wrong_answer):
        tokens = [given] if isinstance(given, str | int | np.integer) else list(given)
        ids = [find_answer(model, row.clean, clean, answer) for answer in tokens]
        if None in ids:
            detail = f"answer {tokens[ids.index(None)]!r} is not one token"
            return LeftOut(name, "an answer that is not one token", detail)
        answers.append(tuple(dict.fromkeys(token for token in ids if token is not None)))
    if not answers[0]:
        return LeftOut(name, "no answer", "expected at least one token")
    if shared := set(answers[0]) & set(answers[1]):
        return LeftOut(name, "the same token as right and wrong answer", f"token {min(shared)}")
    if corrupted is not None and np.array_equal(clean, corrupted):
        return LeftOut(name, "a corrupted prompt that is the clean one", "expected another prompt")
    subject = find_subject(model, row, clean, name)
    texts = tuple(str(token) if model.tokenizer is None else model.tokenizer.text(token) for token in clean.tolist())
    return name, clean, corrupted, *answers, subject, texts


def read_side(model: Model, side: PromptSide, name: str) -> Int[np.ndarray, "_"]:
    ids = token_array(model, side)
    if ids.ndim != 1:
        raise UserError(f"{name}: token ids of {ids.ndim} axes, expected text or token ids [T] of one prompt")
    return ids


def find_answer(model: Model, prompt: PromptSide, ids: Int[np.ndarray, "_"], answer: str | int) -> int | None:
    """The token of an answer; None if it is not one. Where the tokenizer joins the answer to the prompt's last token,
    the answer's own token counts."""
    if isinstance(answer, int | np.integer):
        if not 0 <= answer < model.config.vocabulary:
            raise UserError(f"answer: token id {answer}, expected 0 to {model.config.vocabulary - 1}")
        return int(answer)
    unknown = None
    if model.tokenizer is not None:
        unknown = model.tokenizer.backend.token_to_id("<unk>")
    if isinstance(prompt, str):
        whole = model.encode(prompt + answer)
        if len(whole) == len(ids) + 1 and whole[:-1] == ids.tolist() and whole[-1] != unknown:
            return whole[-1]
    assert model.tokenizer is not None or model.encode(answer)  # encode says that text needs a tokenizer
    alone = [] if model.tokenizer is None else model.tokenizer.plain(answer)
    return alone[0] if len(alone) == 1 and alone[0] != unknown else None


def find_subject(model: Model, row: PairRow, clean: Int[np.ndarray, "_"], name: str) -> tuple[int, int] | None:
    """The tokens of the subject; None if the row has none. Text may begin and end within tokens."""
    if row.subject is None:
        return None
    if not isinstance(row.subject, str):
        start, stop = (int(end) for end in row.subject)
        if not 0 <= start < stop <= len(clean):
            raise UserError(f"{name}: subject at tokens {start} to {stop}, expected a part of {len(clean)} tokens")
        return start, stop
    if not isinstance(row.clean, str) or model.tokenizer is None:
        raise UserError(f"{name}: subject as text, expected the numbers of its tokens, as the prompt is token ids")
    first = row.clean.find(row.subject)
    if first < 0 or not row.subject:
        raise UserError(f"{name}: subject '{row.subject}' is not in the clean prompt")
    ends = [end for _, end in model.tokenizer.backend.encode(row.clean).offsets]
    start = next(i for i, end in enumerate(ends) if end > first)
    stop = next(i for i, end in enumerate(ends) if end >= first + len(row.subject)) + 1
    return start, stop


def make_world_pairs(model: Model, task: str, count: int = 24, split: Split = "report", seed: int = 0) -> PromptPairs:
    """Pairs of a task of the small world: the two prompts differ in one free concept, and in the answer. The subject is
    from the first to the last token that differs."""
    if task not in TASKS:
        raise UserError(f"task '{task}': does not exist, expected one of: {', '.join(TASKS)}")
    rows: list[PairRow] = []
    for number, pair in enumerate(TASKS[task].pairs(split, count, seed)):
        # Of a prompt with several answers, the other one may have them all: then it is the corrupted one.
        clean, corrupted = sorted((pair.clean, pair.corrupted), key=lambda example: len(example.answers))
        wrong = tuple(answer for answer in corrupted.answers if answer not in clean.answers)
        right = tuple(answer for answer in clean.answers if wrong or answer not in corrupted.answers)
        ids = [np.array(model.encode(example.prompt)) for example in (clean, corrupted)]
        differs = np.flatnonzero(ids[0] != ids[1]) if len(ids[0]) == len(ids[1]) else np.array([0])
        subject = (int(differs[0]), int(differs[-1]) + 1)
        name = f"{task} {number} ({pair.concept})"
        rows.append(PairRow(clean.prompt, corrupted.prompt, right, wrong, subject, name))
    return make_pairs(model, rows)
