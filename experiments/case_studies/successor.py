"""Successors: the features that say which list an item is from, exchanged, give the item of the other list.

    python experiments/case_studies/successor.py

"List: Tuesday Wednesday Thursday" -> " Friday"; as a list of numerals -> " five": the same place and step, another
list. The features lie in layer 0 at the end.
Expected: see README.md. Cost: half a minute on one CPU core.
"""

from functools import cache

from common import Outcomes, Swap, at_end, before, concept, draw_examples, fit_code, measure_swap
from report import Claim, Study, main, show_swaps

from jclt.graphs import Graph
from jclt.world import Example
from jclt.world.numbers import item_at


def expect_item(example: Example, name: str) -> tuple[str, ...]:
    """None where the other list is too short."""
    item = item_at(name, int(concept("index")(example)) - 1 + int(concept("step")(example)))
    return (f" {item}",) if item else ()


@cache
def make_swap() -> Swap:
    code = fit_code("successor", concept("list"), at_end, layers=(0,), share=0.2)
    return Swap("list", "successor", (code,), expect_item, strength=1.5, wrong=before(at_end))


def measure(seed: int, count: int) -> Outcomes:
    return measure_swap(make_swap(), seed, count)


def show() -> Graph:
    return show_swaps((make_swap(),), draw_examples("successor", 1, 0)[0])


STUDY = Study(
    "successor",
    (
        Claim("list exchanged; at a wrong place", "", 0.9, 0.05),
        Claim("list exchanged; random features", "", 0.9, 0.05),
        Claim("list set to 0; random features", "", 0.1, ratio=5),
    ),
    measure,
    show,
)

if __name__ == "__main__":
    main(STUDY)
