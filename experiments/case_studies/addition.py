"""Addition: what one operand's ones and tens do, and two routes: the last digit and the rest.

    python experiments/case_studies/addition.py

"calc: 36+59=" -> "95". At "=", features of layers 2 and 3 are exchanged for those of another sum:

- all, of a sum in which only the ones of b differ and the carry is the same: the last digit alone should change;
- all, of a sum in which only the tens of b differ: all but the last digit should change;
- of a sum in which both numbers differ, only those that say the ones of the sum more than its tens, or the reverse.

Beside these, the same changes of random features, and at the token before "=".
Expected: see README.md. Cost: two minutes on one CPU core.
"""

from functools import cache
from random import Random

import numpy as np
from common import (
    DRAWS,
    Code,
    Outcome,
    Outcomes,
    at_end,
    concept,
    decode,
    draw_examples,
    fit_code,
    give_to_others,
    load,
    pad_tokens,
    read_activations,
    run_rows,
    shift,
)
from report import Claim, Study, main, show_codes

from jclt.graphs import Graph
from jclt.world import TASKS, Example

LAYERS = (2, 3)
STRENGTH = 2
Sum = tuple[int, int]


def read_sum(example: Example) -> Sum:
    return int(concept("a")(example)), int(concept("b")(example))


def has_two_digits(example: Example) -> bool:
    return min(read_sum(example)) >= 10


@cache
def make_codes() -> tuple[Code, Code]:
    """The features that say the ones of the sum more than the tens, and the reverse."""
    ones, tens = (
        fit_code("addition", concept(name), at_end, layers=LAYERS, share=0, keep=has_two_digits)
        for name in ("ones", "tens")
    )
    return ones.select(ones.shares > tens.shares), tens.select(tens.shares > ones.shares)


def draw_sums(a: int, b: int, random: Random) -> tuple[Sum, Sum, Sum]:
    """With other ones of b and the same carry; with other tens of b; with another last digit and another rest."""

    def carries(ones: int) -> bool:
        return a % 10 + ones >= 10

    ones = [b // 10 * 10 + i for i in range(10) if i != b % 10 and carries(i) == carries(b % 10)]
    tens = [10 * i + b % 10 for i in range(1, 10) if i != b // 10]
    while True:
        both = random.randrange(10, 100), random.randrange(10, 100)
        if sum(both) % 10 != (a + b) % 10 and sum(both) // 10 != (a + b) // 10:
            break
    return (a, random.choice(ones or [b])), (a, random.choice(tens)), both


def join(rest: int, last: int) -> str:
    """A number with the last digit of one and the other digits of another."""
    return f"{rest // 10 * 10 + last % 10}"


def measure(seed: int, count: int) -> Outcomes:
    model, outcomes, random, draw = load()[0], Outcomes(), Random(seed), np.random.default_rng(seed)
    everything = [(layer, f) for layer in LAYERS for f in range(load()[1].config.features)]
    ones, tens = make_codes()
    for example in draw_examples("addition", count, seed, has_two_digits):
        (a, b), position = read_sum(example), at_end(example)
        sums = draw_sums(a, b, random)
        tokens = pad_tokens(model, [example, *map(TASKS["addition"].make_example, sums)])
        own, *others = read_activations(tokens)
        changes = [other - own for other in others]
        tests = {
            "ones of b": (changes[0], everything, f"{sum(sums[0])}"),
            "tens of b": (changes[1], everything, f"{sum(sums[1])}"),
            "ones route": (changes[2], ones.features, join(a + b, sum(sums[2]))),
            "tens route": (changes[2], tens.features, join(sum(sums[2]), a + b)),
        }
        for name, (change, features, want) in tests.items():
            if want == f"{a + b}":
                continue
            shifts = {(n, f): STRENGTH * float(change[n, position, f]) for n, f in features if change[n, position, f]}
            rows = [shift(own, shifts, position), shift(own, shifts, position - 1)]
            rows += [shift(own, give_to_others(own, position, shifts, draw), position) for _ in range(DRAWS)]
            hits = [float(decode(row.argmax()) == want) for row in run_rows(example, tokens.shape[1], rows)[1]]
            found = {"at a wrong place": hits[1], "random features": float(np.mean(hits[2:]))}
            for control, value in found.items():
                outcomes.setdefault(f"{name} exchanged; {control}", []).append(Outcome(hits[0], value))
    return outcomes


def show() -> Graph:
    example = draw_examples("addition", 1, 0, has_two_digits)[0]
    return show_codes(example, dict(zip(("ones", "tens"), make_codes(), strict=True)))


PAPER = "_6 flipped: 98 for 95; _9 flipped: 91"
ROUTES = "without the magnitude features the ones stay"
STUDY = Study(
    "addition",
    (
        Claim("ones of b exchanged; random features", PAPER, 0.8, 0.05),
        Claim("ones of b exchanged; at a wrong place", PAPER, 0.8, 0.05),
        Claim("tens of b exchanged; random features", PAPER, 0.9, 0.05),
        Claim("tens of b exchanged; at a wrong place", PAPER, 0.9, 0.05),
        Claim("ones route exchanged; random features", ROUTES, 0.6, 0.05),
        Claim("tens route exchanged; random features", ROUTES, 0.8, 0.05),
    ),
    measure,
    show,
)

if __name__ == "__main__":
    main(STUDY)
