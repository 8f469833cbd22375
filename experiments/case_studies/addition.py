"""Addition: what one operand's ones and tens do, and two routes: the last digit and the rest.

    python experiments/case_studies/addition.py

"calc: 36+59=" -> "95". At "=", features of the last layers are exchanged for those of another sum:

- all, of a sum in which only the ones of b differ and the carry is the same: the last digit alone should change;
- all, of a sum in which only the tens of b differ: all but the last digit should change;
- of the first of these sums, only the features that say the ones of a sum more than its tens, and of the second, only
  those that say the tens more: two routes. Beside each, the features of the other route.

Beside the others, the same changes of random features, and at the token before "=".
Expected: see README.md. Cost: two minutes on one CPU core.
"""

from collections.abc import Sequence
from functools import cache
from random import Random

import numpy as np
from common import (
    DRAWS,
    Code,
    Outcome,
    Outcomes,
    Shifts,
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

LAYERS, STRENGTH = (2, 3), 2
ROUTE_LAYERS, ROUTE_STRENGTH = (1, 2, 3), 1.25
Sum = tuple[int, int]


def read_sum(example: Example) -> Sum:
    return int(concept("a")(example)), int(concept("b")(example))


def has_two_digits(example: Example) -> bool:
    return min(read_sum(example)) >= 10


@cache
def make_codes() -> tuple[Code, Code]:
    """The features that say the ones of the sum more than the tens, and the reverse."""
    ones, tens = (
        fit_code("addition", concept(name), at_end, layers=ROUTE_LAYERS, share=0, keep=has_two_digits)
        for name in ("ones", "tens")
    )
    return ones.select(ones.shares > tens.shares), tens.select(tens.shares > ones.shares)


def draw_sums(a: int, b: int, random: Random) -> tuple[Sum, Sum]:
    """With other ones of b and the same carry; with other tens of b."""

    def carries(ones: int) -> bool:
        return a % 10 + ones >= 10

    ones = [b // 10 * 10 + i for i in range(10) if i != b % 10 and carries(i) == carries(b % 10)]
    tens = [10 * i + b % 10 for i in range(1, 10) if i != b // 10]
    return (a, random.choice(ones or [b])), (a, random.choice(tens))


def scale_changes(change: np.ndarray, position: int, features: Sequence[tuple[int, int]], strength: float) -> Shifts:
    return {(n, f): strength * float(change[n, position, f]) for n, f in features if change[n, position, f]}


def measure(seed: int, count: int) -> Outcomes:
    model, outcomes, random, draw = load()[0], Outcomes(), Random(seed), np.random.default_rng(seed)
    everything = [(layer, f) for layer in LAYERS for f in range(load()[1].config.features)]
    ones, tens = (code.features for code in make_codes())
    for example in draw_examples("addition", count, seed, has_two_digits):
        (a, b), position = read_sum(example), at_end(example)
        sums = draw_sums(a, b, random)
        tokens = pad_tokens(model, [example, *map(TASKS["addition"].make_example, sums)])
        own, *others = read_activations(tokens)
        changes = [other - own for other in others]
        for digit, other, change, route, other_route in (
            ("ones", sums[0], changes[0], ones, tens),
            ("tens", sums[1], changes[1], tens, ones),
        ):
            if sum(other) == a + b:
                continue
            shifts = scale_changes(change, position, everything, STRENGTH)
            of_route, of_other = (scale_changes(change, position, x, ROUTE_STRENGTH) for x in (route, other_route))
            rows = [shift(own, shifts, position), shift(own, shifts, position - 1)]
            rows += [shift(own, of_route, position), shift(own, of_other, position)]
            rows += [shift(own, give_to_others(own, position, shifts, draw), position) for _ in range(DRAWS)]
            changed = run_rows(example, tokens.shape[1], rows)[1]
            hits = [float(decode(row.argmax()) == f"{sum(other)}") for row in changed]
            found = {
                f"{digit} of b exchanged; at a wrong place": Outcome(hits[0], hits[1]),
                f"{digit} of b exchanged; random features": Outcome(hits[0], float(np.mean(hits[4:]))),
                f"{digit} route exchanged; the other route": Outcome(hits[2], hits[3]),
            }
            for claim, outcome in found.items():
                outcomes.setdefault(claim, []).append(outcome)
    return outcomes


def show() -> Graph:
    example = draw_examples("addition", 1, 0, has_two_digits)[0]
    ones, tens = make_codes()
    return show_codes(example, {"ones": (ones,), "tens": (tens,)})


PAPER = "_6 flipped: 98 for 95; _9 flipped: 91"
ROUTES = "without the magnitude features the ones stay"
STUDY = Study(
    "addition",
    (
        Claim("ones of b exchanged; random features", PAPER, 0.8, 0.05),
        Claim("ones of b exchanged; at a wrong place", PAPER, 0.8, 0.05),
        Claim("tens of b exchanged; random features", PAPER, 0.9, 0.05),
        Claim("tens of b exchanged; at a wrong place", PAPER, 0.9, 0.05),
        Claim("ones route exchanged; the other route", ROUTES, 0.5, 0.05),
        Claim("tens route exchanged; the other route", ROUTES, 0.9, 0.05),
    ),
    measure,
    show,
)

if __name__ == "__main__":
    main(STUDY)
