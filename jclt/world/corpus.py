"""The corpus: lines of all tasks in fixed shares, packed into sequences of tokens."""

from collections.abc import Callable, Iterator, Mapping
from random import Random
from typing import NamedTuple

import numpy as np

from jclt.world.example import BOS, Line, split_tokens
from jclt.world.facts import draw_hop_line, draw_translation_line
from jclt.world.numbers import (
    draw_digits_line,
    draw_elsewhere_line,
    draw_mixed_run_line,
    draw_part_of_sum_line,
    draw_place_line,
)
from jclt.world.syntax import draw_filler_line
from jclt.world.tasks import TASKS

HELPERS: dict[str, Callable[[Random], Line]] = {
    "hop": draw_hop_line,
    "translation": draw_translation_line,
    "digits": draw_digits_line,
    "part_of_sum": draw_part_of_sum_line,
    "place_of_item": draw_place_line,
    "elsewhere": draw_elsewhere_line,
    "mixed_run": draw_mixed_run_line,
    "filler": draw_filler_line,
}
"""Lines that belong to no task but teach what the tasks need."""

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
"""Relative frequency of each kind of line; they add up to about a hundred."""


class Batch(NamedTuple):
    tokens: np.ndarray  # [N, T] int32, each row beginning with <bos>
    weights: np.ndarray  # [N, T] float32: weight of this token's loss


def draw_line(random: Random) -> Line:
    (name,) = random.choices(tuple(SHARES), tuple(SHARES.values()))
    if name in HELPERS:
        return HELPERS[name](random)
    task = TASKS[name]
    return task.write_line(task.draw_case(random, "train"))


def make_text(lines: int, seed: int) -> str:
    """The corpus as plain text."""
    random = Random(seed)
    return "".join("".join(draw_line(random)) + "\n" for _ in range(lines))


def make_corpus(
    rows: int, length: int, seed: int | str, vocabulary: Mapping[str, int], text_weight: float = 0.03
) -> Batch:
    """`rows` sequences of complete lines, padded with line ends of weight 0. A text as seed gives other lines than any
    number."""
    random = Random(seed)
    tokens = np.full((rows, length), vocabulary["\n"], np.int32)
    weights = np.zeros((rows, length), np.float32)
    tokens[:, 0] = vocabulary[BOS]
    for row, lines in enumerate(pack_rows(random, length - 1, rows)):
        start = 1
        for line in lines:
            for part, weight in zip(line, (text_weight, 1.0, text_weight), strict=True):
                ids = [vocabulary[token] for token in split_tokens(part)]
                tokens[row, start : start + len(ids)] = ids
                weights[row, start : start + len(ids)] = weight
                start += len(ids)
    return Batch(tokens, weights)


def pack_rows(random: Random, length: int, rows: int) -> Iterator[list[Line]]:
    """The lines of each row: again and again the longest of a few waiting lines that still fits."""
    waiting: list[tuple[int, Line]] = []
    for _ in range(rows):
        chosen, remaining = [], length
        while True:
            while len(waiting) < 24:
                line = draw_line(random)
                line = line._replace(suffix=line.suffix + "\n")
                waiting.append((len(split_tokens("".join(line))), line))
            fitting = [(size, line) for size, line in waiting if size <= remaining]
            if not fitting:
                break
            size, line = fitting[0] if remaining > 24 else max(fitting, key=lambda sized: sized[0])
            waiting.remove((size, line))
            chosen.append(line)
            remaining -= size
        yield chosen
