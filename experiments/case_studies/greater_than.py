"""Greater than: the features that say a year's decade, exchanged for an earlier decade's, allow earlier years.

    python experiments/case_studies/greater_than.py

"The war lasted from 1782 to 17" -> a year after 82. The features lie at the end of the prompt. After the exchange an
answer counts that is right for the earlier decade and wrong for the year named. The wrong place is the token before.
Expected: see README.md. Cost: half a minute on one CPU core.
"""

from functools import cache

from common import Outcomes, Swap, at_end, before, concept, draw_examples, fit_code, measure_swap
from report import Claim, Study, main, show_swaps

from jclt.graphs import Graph
from jclt.world import Example

YEAR = concept("year")


def read_decade(example: Example) -> str:
    return YEAR(example)[0]


def expect_years(example: Example, decade: str) -> tuple[str, ...]:
    """After the decade, and not after the year; none if the decade is not three or more before it."""
    first, last = int(decade) * 10 + 10, int(YEAR(example))
    return tuple(f"{year}" for year in range(first, last + 1)) if first + 20 <= last else ()


def has_earlier_decade(example: Example) -> bool:
    return any(expect_years(example, f"{decade}") for decade in range(10))


@cache
def make_swap() -> Swap:
    code = fit_code("greater_than", read_decade, at_end, share=0.05)
    return Swap(
        "decade", "greater_than", (code,), expect_years, strength=8, wrong=before(at_end), keep=has_earlier_decade
    )


def measure(seed: int, count: int) -> Outcomes:
    return measure_swap(make_swap(), seed, count)


def show() -> Graph:
    return show_swaps((make_swap(),), draw_examples("greater_than", 1, 0)[0])


STUDY = Study(
    "greater_than",
    (
        Claim("decade exchanged; at a wrong place", "", 0.9, 0.05),
        Claim("decade exchanged; random features", "", 0.9, 0.1),
        Claim("decade set to 0; random features", "", 0.1, ratio=5),
        Claim("decade sign flipped; random features", "", 0.1, ratio=5),
    ),
    measure,
    show,
)

if __name__ == "__main__":
    main(STUDY)
