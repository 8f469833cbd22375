"""Agreement: the features that say a subject's number, exchanged for the other number's, change the verb.

    python experiments/case_studies/agreement.py

"Today the keys near the cabinet" -> " are". The number's features lie at the subject. The wrong place is the noun that
stands between subject and verb, whose number does not count.
Expected: see README.md. Cost: half a minute on one CPU core.
"""

from functools import cache

from common import Outcomes, Swap, at, concept, draw_examples, fit_code, measure_swap
from report import Claim, Study, main, show_swaps

from jclt.graphs import Graph
from jclt.world import Example, words


def expect_verb(example: Example, number: str) -> tuple[str, ...]:
    return (f" {words.VERBS[concept('time')(example)][number == 'plural']}",)


@cache
def make_swap() -> Swap:
    code = fit_code("agreement", concept("number"), at("number"), share=0.05)
    return Swap("number", "agreement", (code,), expect_verb, strength=2.5, wrong=at("distractor"))


def measure(seed: int, count: int) -> Outcomes:
    return measure_swap(make_swap(), seed, count)


def show() -> Graph:
    return show_swaps((make_swap(),), draw_examples("agreement", 1, 0)[0])


STUDY = Study(
    "agreement",
    (
        Claim("number exchanged; at a wrong place", "about 100 neurons control it (2601.22594)", 0.9, 0.05),
        Claim("number exchanged; random features", "", 0.9, 0.05),
        Claim("number sign flipped; random features", "", 0.1, ratio=3),
    ),
    measure,
    show,
)

if __name__ == "__main__":
    main(STUDY)
