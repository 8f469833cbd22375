"""Factual recall: two paths to an athlete's sport, each alone and both.

    python experiments/case_studies/factual_recall.py

"The athlete Pete Jordan plays the sport of" -> the sport. Features that say it lie at the last name and at the end
of the prompt. The wrong place is the first name, from which no sport follows.
Expected: see README.md. Cost: two minutes on one CPU core.
"""

from functools import cache

from common import Outcomes, Swap, at, at_end, concept, draw_examples, fit_code, measure_swap
from report import Claim, Study, main, show_swaps

from jclt.graphs import Graph
from jclt.world import Example

SPORT = concept("answer")


def expect_sport(_: Example, sport: str) -> tuple[str, ...]:
    return (f" {sport}",)


@cache
def make_swaps() -> tuple[Swap, ...]:
    name, end = fit_code("athlete", SPORT, at("last"), share=0.2), fit_code("athlete", SPORT, at_end, share=0.2)
    more_of_name = fit_code("athlete", SPORT, at("last"), share=0.05)

    def make(title: str, *codes: object, strength: float = 2) -> Swap:
        return Swap(title, "athlete", codes, expect_sport, strength, at("first"))  # type: ignore[arg-type]

    return (
        make("sport at the name", more_of_name, strength=3),
        make("sport at the end", end),
        make("sport at both", name, end),
    )


def measure(seed: int, count: int) -> Outcomes:
    return {claim: found for swap in make_swaps() for claim, found in measure_swap(swap, seed, count).items()}


def show() -> Graph:
    return show_swaps(make_swaps()[:2], draw_examples("athlete", 1, 0)[0])


PATHS = "two paths; without one the other stays"
STUDY = Study(
    "factual_recall",
    (
        Claim("sport at the name exchanged; random features", PATHS, 0.4, 0.05),
        Claim("sport at the end exchanged; random features", PATHS, 0.9, 0.05),
        Claim("sport at both exchanged; random features", PATHS, 0.9, 0.05),
        Claim("sport at both exchanged; at a wrong place", PATHS, 0.9, 0.05),
        Claim("sport at the name set to 0; random features", "", 0.1, ratio=5),
        Claim("sport at the end set to 0; random features", "", 0.1, ratio=5),
        Claim("sport at both set to 0; random features", "", 0.1, ratio=5),
    ),
    measure,
    show,
)

if __name__ == "__main__":
    main(STUDY)
