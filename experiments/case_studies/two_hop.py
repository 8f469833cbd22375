"""Two hops, city to state to capital: another state's features give the other state's capital.

    python experiments/case_studies/two_hop.py

The prompts ask for capitals of cities for which no line of the corpus asks. The state's features are those of layers 1
and 2 at the end of the prompt, found on other cities. The same features are then exchanged in questions for rivers,
birds and flowers: do they say the state, or only its capital?
Expected: see README.md. Cost: a minute on one CPU core.
"""

from functools import cache

from common import Outcomes, Swap, at_end, before, concept, draw_examples, fit_code, measure_swap
from report import Claim, Study, main, show_swaps

from jclt.graphs import Graph
from jclt.world import Example
from jclt.world.facts import CITY_SPLIT, value_of

RELATION = concept("relation")


def expect_value(example: Example, state: str) -> tuple[str, ...]:
    return (f" {value_of(state, RELATION(example))}",)


def asks_for_more(example: Example) -> bool:
    """Of a city that is kept for reporting."""
    return RELATION(example) in ("river", "bird", "flower") and CITY_SPLIT[concept("city")(example)] == "report"


def knows_city(example: Example) -> bool:
    return CITY_SPLIT[concept("city")(example)] == "train"


@cache
def make_swaps() -> tuple[Swap, Swap]:
    codes = (fit_code("two_hop", concept("state"), at_end, layers=(1, 2), share=0.1, keep=knows_city),)
    common = {"strength": 2, "wrong": before(at_end)}
    return (
        Swap("state", "two_hop", codes, expect_value, **common),
        Swap("state, other question", "two_hop", codes, expect_value, keep=asks_for_more, **common),
    )


def measure(seed: int, count: int) -> Outcomes:
    capital, more = make_swaps()
    return measure_swap(capital, seed, count) | measure_swap(more, seed, count, "train")


def show() -> Graph:
    return show_swaps(make_swaps()[:1], draw_examples("two_hop", 1, 0)[0])


SWAPPED = "Texas to California: Sacramento, shown on an example"
STUDY = Study(
    "two_hop",
    (
        Claim("state exchanged; at a wrong place", SWAPPED, 0.9, 0.05),
        Claim("state exchanged; random features", SWAPPED, 0.9, 0.05),
        Claim("state, other question exchanged; random features", "not shown", 0.9, 0.05),
        Claim("state, other question exchanged; at a wrong place", "not shown", 0.9, 0.05),
        Claim("state set to 0; random features", "not given", 0.1, ratio=5),
    ),
    measure,
    show,
)

if __name__ == "__main__":
    main(STUDY)
