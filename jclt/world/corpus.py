"""The corpus: lines of all tasks in fixed shares, packed into sequences of tokens."""

from collections.abc import Callable, Iterator, Mapping
from random import Random
from typing import NamedTuple

import numpy as np

from jclt.world.example import BOS, Line, pieces
from jclt.world.facts import hop, translation
from jclt.world.numbers import digits, elsewhere, mixed_run, part_of_sum, place_of_item
from jclt.world.syntax import filler
from jclt.world.tasks import TASKS

HELPERS: dict[str, Callable[[Random], Line]] = {
    "hop": hop,
    "translation": translation,
    "digits": digits,
    "part_of_sum": part_of_sum,
    "place_of_item": place_of_item,
    "elsewhere": elsewhere,
    "mixed_run": mixed_run,
    "filler": filler,
}
"""Lines that are no task themselves but from which the tasks' ingredients are learned."""

SHARES = {
    "acronym": 5,
    "athlete": 5,
    "addition": 18,
    "two_hop": 9,
    "agreement": 3,
    "ioi": 4,
    "greater_than": 2,
    "antonym": 3,
    "successor": 16,
    "closing": 3,
    "induction": 5,
    "hop": 8,
    "translation": 2,
    "digits": 6,
    "part_of_sum": 10,
    "place_of_item": 5,
    "elsewhere": 6,
    "mixed_run": 6,
    "filler": 1,
}
"""How many lines in about a hundred."""


class Batch(NamedTuple):
    tokens: np.ndarray  # [N, T] int32, each row beginning with <bos>
    weights: np.ndarray  # [N, T] float32: what predicting the token at this place counts


def draw_line(random: Random) -> Line:
    (name,) = random.choices(tuple(SHARES), tuple(SHARES.values()))
    if name in HELPERS:
        return HELPERS[name](random)
    task = TASKS[name]
    return task.line(task.case(random, "train"))


def text(lines: int, seed: int) -> str:
    """The corpus as plain text."""
    random = Random(seed)
    return "".join("".join(draw_line(random)) + "\n" for _ in range(lines))


def corpus(rows: int, length: int, seed: int | str, vocabulary: Mapping[str, int], text_weight: float = 0.03) -> Batch:
    """`rows` sequences of whole lines, filled up with line ends that do not count. A seed that is a text draws others
    than any number does."""
    random = Random(seed)
    tokens = np.full((rows, length), vocabulary["\n"], np.int32)
    weights = np.zeros((rows, length), np.float32)
    tokens[:, 0] = vocabulary[BOS]
    for row, lines in enumerate(packed(random, length - 1, rows)):
        at = 1
        for line in lines:
            for part, weight in zip(line, (text_weight, 1.0, text_weight), strict=True):
                ids = [vocabulary[piece] for piece in pieces(part)]
                tokens[row, at : at + len(ids)] = ids
                weights[row, at : at + len(ids)] = weight
                at += len(ids)
    return Batch(tokens, weights)


def packed(random: Random, room: int, rows: int) -> Iterator[list[Line]]:
    """For each row the lines that fill it: the longest of a few waiting ones that still fits, again and again."""
    waiting: list[tuple[int, Line]] = []
    for _ in range(rows):
        chosen, left = [], room
        while True:
            while len(waiting) < 24:
                line = draw_line(random)
                line = line._replace(rest=line.rest + "\n")
                waiting.append((len(pieces("".join(line))), line))
            fits = [entry for entry in waiting if entry[0] <= left]
            if not fits:
                break
            entry = fits[0] if left > 24 else max(fits, key=lambda e: e[0])
            waiting.remove(entry)
            chosen.append(entry[1])
            left -= entry[0]
        yield chosen
