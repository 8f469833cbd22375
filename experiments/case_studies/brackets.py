"""Brackets: the features that say which bracket is the innermost open one, exchanged, change what closes it.

    python experiments/case_studies/brackets.py

"Nest: [ ( apple" -> " )". The features lie in layer 0 at the last word. The wrong place is the first token:
the token before the last word may be the bracket itself.
Expected: see README.md. Cost: half a minute on one CPU core.
"""

from functools import cache

from common import Outcomes, Swap, at_end, concept, draw_examples, fit_code, measure_swap
from report import Claim, Study, main, show_swaps

from jclt.graphs import Graph
from jclt.world import Example, words


def expect_closer(example: Example, opener: str) -> tuple[str, ...]:
    return (f" {words.BRACKETS[opener]}",)


@cache
def make_swap() -> Swap:
    code = fit_code("closing", concept("innermost"), at_end, layers=(0,), share=0.2)
    return Swap("innermost", "closing", (code,), expect_closer, strength=4, wrong=lambda _: 1)


def measure(seed: int, count: int) -> Outcomes:
    return measure_swap(make_swap(), seed, count)


def show() -> Graph:
    return show_swaps((make_swap(),), draw_examples("closing", 1, 0)[0])


STUDY = Study(
    "brackets",
    (
        Claim("innermost exchanged; at a wrong place", "", 0.9, 0.05),
        Claim("innermost exchanged; random features", "", 0.9, 0.05),
        Claim("innermost sign flipped; random features", "", 0.1, ratio=5),
    ),
    measure,
    show,
)

if __name__ == "__main__":
    main(STUDY)
