"""Successors: the features that say which list an item is from, exchanged, give the item of the other list.

    python experiments/case_studies/successor.py

"List: Tuesday Wednesday Thursday" -> " Friday"; as a list of numerals -> " five": the same places in another list. The
other list must have all of these places, as a prompt with its items must exist. The features lie in layer 0 at the end.
Expected: see README.md. Cost: half a minute on one CPU core.
"""

from functools import cache

from common import Outcomes, Swap, at_end, before, concept, draw_examples, fit_code, measure_swap
from report import Claim, Study, main, show_swaps

from jclt.graphs import Graph
from jclt.world import Example
from jclt.world.numbers import LISTS, SHOWN


def read_places(example: Example) -> tuple[int, int]:
    """The places of the first item shown and of the answer, counted from 0; below 0 where a run goes around the end."""
    place, step = int(concept("index")(example)) - 1, int(concept("step")(example))
    shows_run = any(c.name == "start" for c in example.concepts)
    return place - step * (SHOWN - 1) * shows_run, place + step


def expect_item(example: Example, name: str) -> tuple[str, ...]:
    """None where the list lacks one of the places."""
    first, answer = read_places(example)
    return (f" {LISTS[name][answer]}",) if 0 <= first and answer < len(LISTS[name]) else ()


def stays_within(example: Example) -> bool:
    return bool(expect_item(example, concept("list")(example)))


@cache
def make_swap() -> Swap:
    code = fit_code("successor", concept("list"), at_end, layers=(0,), share=0.2)
    return Swap("list", "successor", (code,), expect_item, strength=1.5, wrong=before(at_end), keep=stays_within)


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
