"""Indirect objects: the features that say who receives, exchanged for those of the giver, make the giver the answer.

    python experiments/case_studies/indirect_object.py

"When Mary and John went to the market, John gave a ring to" -> " Mary". The features lie at the end of the prompt. What
attention does is in attention.py.
Expected: see README.md. Cost: half a minute on one CPU core.
"""

from functools import cache

from common import Outcomes, Swap, at_end, before, concept, draw_examples, fit_code, measure_swap
from report import Claim, Study, main, show_swaps

from jclt.graphs import Graph
from jclt.world import Example


def expect_giver(example: Example, name: str) -> tuple[str, ...]:
    """None where the other name is not the giver's."""
    return (f" {name}",) if name == concept("giver")(example) else ()


@cache
def make_swap() -> Swap:
    code = fit_code("ioi", concept("answer"), at_end, share=0.3)
    return Swap("receiver", "ioi", (code,), expect_giver, strength=2, wrong=before(at_end))


def measure(seed: int, count: int) -> Outcomes:
    return measure_swap(make_swap(), seed, count)


def show() -> Graph:
    return show_swaps((make_swap(),), draw_examples("ioi", 1, 0)[0])


STUDY = Study(
    "indirect_object",
    (
        Claim("receiver exchanged; at a wrong place", "", 0.9, 0.05),
        Claim("receiver exchanged; random features", "", 0.9, 0.05),
        Claim("receiver set to 0; random features", "", 0.1, ratio=5),
    ),
    measure,
    show,
)

if __name__ == "__main__":
    main(STUDY)
