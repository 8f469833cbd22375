"""Indirect objects and induction: how much of the work is done by attention patterns?

    python experiments/case_studies/attention.py

Pairs of prompts differ in a city, in who gives, or in the last word of a copied list. Into the pass of the one go the
attention patterns of the other, with all MLPs free to react; or what all the other's MLPs write, at every position,
while the patterns stay frozen. In which does the answer become the other's? A graph has frozen patterns, so it shows
only the second. Only pairs count of which the model answers both. Who receives a gift is settled by MLPs, as a city's
capital is; what followed a word by attention alone.
Expected: see README.md. Cost: half a minute on one CPU core.
"""

from collections.abc import Callable, Sequence
from random import Random

import numpy as np
from common import Outcome, Outcomes, decode, draw_examples, load, pad_tokens
from report import Claim, Study, main, show_swaps

from jclt import Freeze, run
from jclt.graphs import Graph
from jclt.world import TASKS, Example, Pair

Case = tuple[str, str, str, str]
"""Two prompts of as many tokens, and their answers."""


def draw_pairs(task: str, concept: str) -> Callable[[int, int], list[Case]]:
    def draw(seed: int, count: int) -> list[Case]:
        pairs: list[Pair] = [pair for pair in TASKS[task].pairs("report", 4 * count, seed) if pair.concept == concept]
        cases = [(x.clean.prompt, x.corrupted.prompt, x.clean.answers[0], x.corrupted.answers[0]) for x in pairs]
        return [case for case in cases if case[2] != case[3]][:count]

    return draw


def draw_copies(seed: int, count: int) -> list[Case]:
    """The same list, with another of its words at the end."""
    random, cases = Random(seed), list[Case]()
    for example in draw_examples("induction", count, seed):
        words = example.prompt.split()[1:]
        followers = {word: after for word, after in reversed(list(zip(words, words[1:-1], strict=False)))}
        others = [word for word in followers if word != words[-1] and followers[word] != followers[words[-1]]]
        other = random.choice(others)
        prompt = example.prompt.removesuffix(words[-1]) + other
        cases.append((example.prompt, prompt, example.answers[0], f" {followers[other]}"))
    return cases


def measure_pairs(cases: Sequence[Case]) -> list[Outcome]:
    """Whether the answer becomes the other prompt's: with its patterns; with what its MLPs write."""
    model, _ = load()
    ends = [len(model.encode(clean)) - 1 for clean, *_ in cases]
    clean, other = (pad_tokens(model, [make_example(case[side]) for case in cases]) for side in (0, 1))
    (logits, own), (other_logits, seen) = (
        run(model, tokens, capture=("pattern", "mlp_out")) for tokens in (clean, other)
    )
    by_patterns = run(model, clean, edit=Freeze({"pattern": seen["pattern"]}))[0]
    by_writes = run(model, clean, edit=Freeze({"mlp_out": seen["mlp_out"], "pattern": own["pattern"]}))[0]
    rows = np.arange(len(cases))
    passes = (logits, other_logits, by_patterns, by_writes)
    answers = [[decode(int(token)) for token in np.asarray(x)[rows, ends].argmax(axis=1)] for x in passes]
    return [
        Outcome(float(by_pattern == case[3]), float(by_write == case[3]))
        for case, *answered, by_pattern, by_write in zip(cases, *answers, strict=True)
        if tuple(answered) == case[2:]
    ]


def make_example(prompt: str) -> Example:
    return Example("", None, prompt, (), ())


def turn(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [Outcome(outcome.control, outcome.ours) for outcome in outcomes]


def measure(seed: int, count: int) -> Outcomes:
    return {
        "other city: MLPs alone; patterns alone": turn(measure_pairs(draw_pairs("two_hop", "city")(seed, count))),
        "other giver: MLPs alone; patterns alone": turn(measure_pairs(draw_pairs("ioi", "giver")(seed, count))),
        "other word at the end of a list: patterns alone; MLPs alone": measure_pairs(draw_copies(seed, count)),
    }


def show() -> Graph:
    return show_swaps((), draw_examples("ioi", 1, 0)[0])


STUDY = Study(
    "attention",
    (
        Claim("other city: MLPs alone; patterns alone", "attention is not explained", 0.9, 0.05),
        Claim("other giver: MLPs alone; patterns alone", "attention is not explained", 0.9, 0.05),
        Claim("other word at the end of a list: patterns alone; MLPs alone", "attention is not explained", 0.8, 0.1),
    ),
    measure,
    show,
)

if __name__ == "__main__":
    main(STUDY)
