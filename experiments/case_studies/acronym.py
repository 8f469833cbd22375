"""Acronyms: three paths, one for each letter; flipping the signs of one word's features removes its letter alone.

    python experiments/case_studies/acronym.py

"The National Digital Analytics Group (N" -> "DAG". The features of letter i lie in layers 0 to 2 at word i. Measured is
the probability of all tokens that have the right letter at place i, beside those of the other two letters, and beside
as many random features of the same layers at word i. Then the features are exchanged for those of another letter, at
the word and at the end of the prompt together: what has reached the end already also says the letter.
Expected: see README.md. Cost: a minute on one CPU core.
"""

from functools import cache

import numpy as np
from common import (
    DRAWS,
    Outcome,
    Outcomes,
    Swap,
    at,
    at_end,
    concept,
    draw_examples,
    draw_others,
    fit_code,
    load,
    measure_swap,
    pad_tokens,
    read_activations,
    read_vocabulary,
    run_rows,
    scale,
)
from report import Claim, Study, main, show_swaps

from jclt.graphs import Graph
from jclt.world import Example

LETTERS = (0, 1, 2)


@cache
def make_swap(letter: int) -> Swap:
    def expect(example: Example, other: str) -> tuple[str, ...]:
        answer = example.answers[0]
        return (answer[:letter] + other + answer[letter + 1 :],)

    name = f"letter {letter + 1}"
    word = fit_code("acronym", concept(name), at(f"word {letter + 1}"), layers=(0, 1, 2), share=0.2)
    end = fit_code("acronym", concept(name), at_end, share=0.2)
    return Swap(name, "acronym", (word, end), expect, strength=2, wrong=lambda _: 1)


def sum_right(probabilities: np.ndarray, answer: str) -> np.ndarray:
    """For each of the three places, the probability of the acronyms that have the answer's letter there."""
    acronyms = {number: token for number, token in read_vocabulary().items() if len(token) == 3 and token.isupper()}
    return np.array([sum(probabilities[n] for n, text in acronyms.items() if text[i] == answer[i]) for i in LETTERS])


def measure_flips(seed: int, count: int) -> Outcomes:
    examples, random, outcomes = draw_examples("acronym", count, seed), np.random.default_rng(seed), Outcomes()
    tokens = pad_tokens(load()[0], examples)
    for example, activations in zip(examples, read_activations(tokens), strict=True):
        rows = []
        for letter in LETTERS:
            code = make_swap(letter).codes[0]
            position = code.place(example)
            active = [cell for cell in code.features if activations[cell[0], position, cell[1]] > 0]
            groups = [active, *(draw_others(activations, position, active, random) for _ in range(DRAWS))]
            rows += [scale(activations, group, position, -1) for group in groups]
        clean, flipped = run_rows(example, tokens.shape[1], rows)
        right = sum_right(clean, example.answers[0])
        lost = np.array([right - sum_right(row, example.answers[0]) for row in flipped]).reshape(3, 1 + DRAWS, 3)
        for letter in LETTERS:
            own, others = lost[letter, 0, letter], np.delete(lost[letter, 0], letter)
            found = {"the other letters": others.mean(), "random features": lost[letter, 1:, letter].mean()}
            for control, value in found.items():
                claim = f"letter {letter + 1} sign flipped; {control}"
                outcomes.setdefault(claim, []).append(Outcome(float(own), float(value)))
    return outcomes


def measure(seed: int, count: int) -> Outcomes:
    outcomes = {claim: found for i in LETTERS for claim, found in measure_swap(make_swap(i), seed, count).items()}
    return outcomes | measure_flips(seed, count)


def show() -> Graph:
    return show_swaps([make_swap(letter) for letter in LETTERS], draw_examples("acronym", 1, 0)[0])


PAPER = "a word's supernode flipped: its letter's path alone goes"
STUDY = Study(
    "acronym",
    (
        *(Claim(f"letter {i} sign flipped; the other letters", PAPER, 0.1, ratio=3) for i in (1, 2, 3)),
        *(Claim(f"letter {i} sign flipped; random features", PAPER, 0.1, ratio=5) for i in (1, 2, 3)),
        *(Claim(f"letter {i} exchanged; random features", "not shown", 0.75, 0.05) for i in (1, 2, 3)),
        *(Claim(f"letter {i} exchanged; at a wrong place", "not shown", 0.75, 0.05) for i in (1, 2, 3)),
    ),
    measure,
    show,
)

if __name__ == "__main__":
    main(STUDY)
