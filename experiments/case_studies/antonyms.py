"""Antonyms in three languages: operand, language, and whether the two are apart.

    python experiments/case_studies/antonyms.py

"Le contraire de grand est" -> " petit". At the word and at the end the features of the word asked for are exchanged for
those of another word of the same language (the operand), or of the same word in another language (its translation).
Beside the latter, those that say the language alone: in this model language and word are not apart.
Expected: see README.md. Cost: two minutes on one CPU core.
"""

from functools import cache

from common import Code, Outcome, Outcomes, Swap, at, at_end, concept, draw_examples, fit_code, measure_swap
from report import Claim, Study, main, show_swaps

from jclt.graphs import Graph
from jclt.world import Example, words
from jclt.world.facts import OPPOSITE

TRANSLATION, ALONE = "word, by its translation", "language alone"
LANGUAGE, QUALITY = concept("language"), concept("quality")
LANGUAGES_OF = {word: [language for language, other in OPPOSITE if other == word] for _, word in OPPOSITE}


def expect_operand(example: Example, word: str) -> tuple[str, ...]:
    """None where the word is of another language."""
    opposite = OPPOSITE.get((LANGUAGE(example), word))
    return (f" {opposite}",) if opposite and LANGUAGES_OF[word] == [LANGUAGE(example)] else ()


def translate(example: Example, language: str) -> str:
    """The answer in another language."""
    row = ["/".join(pair) for pair in words.ANTONYMS["English"]].index(QUALITY(example))
    side = words.ANTONYMS[LANGUAGE(example)][row].index(example.answers[0].strip())
    return words.ANTONYMS[language][row][side]


def expect_language(example: Example, language: str) -> tuple[str, ...]:
    return (f" {translate(example, language)}",)


def expect_translation(example: Example, word: str) -> tuple[str, ...]:
    """None where the word is no translation of the one asked for."""
    for language in words.ANTONYMS:
        if language != LANGUAGE(example) and OPPOSITE.get((language, word)) == translate(example, language):
            return (f" {translate(example, language)}",)
    return ()


@cache
def make_swaps() -> tuple[Swap, ...]:
    places = at("word"), at_end
    word = tuple(fit_code("antonym", concept("word"), place, share=0.5) for place in places)
    languages = tuple(fit_code("antonym", LANGUAGE, place, share=0.2) for place in places)

    def make(name: str, codes: tuple[Code, ...], expect: object, strength: float) -> Swap:
        return Swap(name, "antonym", codes, expect, strength, lambda _: 1)  # type: ignore[arg-type]

    return (
        make("operand", word, expect_operand, 2),
        make(TRANSLATION, word, expect_translation, 2),
        make(ALONE, languages, expect_language, 3),
    )


def measure(seed: int, count: int) -> Outcomes:
    outcomes = {claim: found for swap in make_swaps() for claim, found in measure_swap(swap, seed, count).items()}
    word, language = (outcomes[f"{name} exchanged; random features"] for name in (TRANSLATION, ALONE))
    beside = [Outcome(both.ours, alone.ours) for both, alone in zip(word, language, strict=False)]
    return outcomes | {f"{TRANSLATION} exchanged; {ALONE}": beside}


def show() -> Graph:
    return show_swaps(make_swaps()[:1], draw_examples("antonym", 1, 0)[0])


SHOWN = "operand, language and operation exchanged apart"
STUDY = Study(
    "antonyms",
    (
        Claim("operand exchanged; random features", SHOWN, 0.9, 0.05),
        Claim("operand exchanged; at a wrong place", SHOWN, 0.9, 0.05),
        Claim(f"{TRANSLATION} exchanged; random features", SHOWN, 0.9, 0.05),
        Claim(f"{TRANSLATION} exchanged; {ALONE}", "not so: the language is exchanged alone", 0.9, 0.2),
        Claim("operand set to 0; random features", "", 0.1, ratio=5),
    ),
    measure,
    show,
)

if __name__ == "__main__":
    main(STUDY)
