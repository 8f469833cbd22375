"""Tasks that recall facts: cities and states in two hops, athletes, antonyms."""

from random import Random

from jclt.world import words
from jclt.world.example import Concept, Line, Split, Task, choose_other, find_position, last_position

FACTS = Random(2025)  # the facts are part of the world and do not depend on the seed of a corpus

# ---------------------------------------------------------------- two hops: city -> state -> capital


def deal(values: tuple[str, ...], count: int) -> list[str]:
    """`count` values, each value equally often, in random order."""
    shuffled = [values[i % len(values)] for i in range(count)]
    FACTS.shuffle(shuffled)
    return shuffled


CITIES = tuple(f"{first} {second}" for first in words.CITY_FIRST for second in words.CITY_SECOND)
STATES = tuple(words.STATE_FACTS)
STATE_OF = dict(zip(CITIES, deal(STATES, len(CITIES)), strict=True))
SPLIT_SIZES: dict[Split, int] = {"choose": 15, "report": 20, "train": 65}
DEALT: list[Split] = [split for split, size in SPLIT_SIZES.items() for _ in range(size)]
CITY_SPLIT: dict[str, Split] = dict(zip(FACTS.sample(CITIES, len(CITIES)), DEALT, strict=True))
"""The corpus never asks for the capital of a city outside `train`."""

ASKED = (
    "The {relation} of the state containing {city} is",
    "The city of {city} lies in a state with the {relation}",
    "Question: in the state of {city}, what is the {relation}? Answer:",
    "Fact: {city} belongs to a state whose {relation} is called",
)
TOLD = (
    "The {relation} of the state called {state} is",
    "The name {state} means a state with the {relation}",
    "Question: in the state named {state}, what is the {relation}? Answer:",
    "Fact: {state} is a state whose {relation} is called",
)
LOCATED = (
    "The name of the state containing {city} is",
    "The city of {city} lies in a state called",
    "Question: what is the state of {city}? Answer:",
    "Fact: {city} belongs to the state of",
    "Address: {city},",
)


def value_of(state: str, relation: str) -> str:
    return words.STATE_FACTS[state][words.RELATIONS.index(relation)]


Question = tuple[str, str, str]  # city, relation, form


def draw_question(random: Random) -> Question:
    return random.choice(CITIES), random.choice(words.RELATIONS), random.choice(ASKED)


def assign_question_split(case: Question) -> Split | None:
    """Only capitals are withheld; the corpus asks for the other relations of every city."""
    return CITY_SPLIT[case[0]] if case[1] == "capital" else "train"


def write_capital_line(case: Question) -> Line:
    city, relation, form = case
    return Line(form.format(city=city, relation=relation), f" {value_of(STATE_OF[city], relation)}", ".")


def list_capital_concepts(case: Question, prompt: str) -> tuple[Concept, ...]:
    city, relation, _ = case
    state, city_at, relation_at = STATE_OF[city], find_position(prompt, city), find_position(prompt, relation)
    return (
        Concept("city", city, city_at),
        Concept("relation", relation, relation_at),
        Concept("state", state, city_at, ("city",)),
        Concept("answer", value_of(state, relation), max(city_at, relation_at), ("state", "relation")),
    )


def change_city(random: Random, case: Question) -> tuple[Question, str]:
    """Another city: of another state, but of the same split, so that pairs are as hard as examples."""
    city, relation, form = case
    cities = [c for c in CITIES if STATE_OF[c] != STATE_OF[city] and CITY_SPLIT[c] == CITY_SPLIT[city]]
    return (random.choice(cities), relation, form), "city"


TWO_HOP = Task(
    name="two_hop",
    description="the capital of the state of a city whose capital was never asked for in training",
    draw=draw_question,
    assign_split=assign_question_split,
    write_line=write_capital_line,
    list_concepts=list_capital_concepts,
    corrupt=change_city,
)


def draw_hop_line(random: Random) -> Line:
    """One hop alone: the state of a city, or a relation of a state."""
    if random.random() < 0.6:
        city = random.choice(CITIES)
        return Line(random.choice(LOCATED).format(city=city), f" {STATE_OF[city]}", ".")
    state, relation = random.choice(STATES), random.choice(words.RELATIONS)
    return Line(random.choice(TOLD).format(state=state, relation=relation), f" {value_of(state, relation)}", ".")


# ---------------------------------------------------------------- athlete -> sport

ATHLETES = tuple((first, last_name) for first in words.ATHLETE_FIRST for last_name in words.ATHLETE_LAST)
SPORT_OF = dict(zip(ATHLETES, deal(words.SPORTS, len(ATHLETES)), strict=True))
SPORT_FORMS = (
    "Everyone knows that {first} {last} plays",
    "The athlete {first} {last} plays the sport of",
    "Fact: {first} {last} is a star of",
    "Question: which sport does {first} {last} play? Answer:",
)


def draw_withheld(count: int, forms: int) -> list[tuple[int, Split]]:
    """For each of `count` facts: the one form that the corpus does not show, and the split that tests it."""
    return [(FACTS.randrange(forms), FACTS.choice(("choose", "report"))) for _ in range(count)]


ATHLETE_WITHHELD = dict(zip(ATHLETES, draw_withheld(len(ATHLETES), len(SPORT_FORMS)), strict=True))

Athlete = tuple[tuple[str, str], int]


def draw_athlete(random: Random) -> Athlete:
    return random.choice(ATHLETES), random.randrange(len(SPORT_FORMS))


def assign_athlete_split(case: Athlete) -> Split:
    form, tester = ATHLETE_WITHHELD[case[0]]
    return tester if case[1] == form else "train"


def write_athlete_line(case: Athlete) -> Line:
    (first, last_name), form = case
    return Line(SPORT_FORMS[form].format(first=first, last=last_name), f" {SPORT_OF[case[0]]}", ".")


def list_athlete_concepts(case: Athlete, prompt: str) -> tuple[Concept, ...]:
    first, last_name = case[0]
    return (
        Concept("first", first, find_position(prompt, first)),
        Concept("last", last_name, find_position(prompt, last_name)),
        Concept("answer", SPORT_OF[case[0]], find_position(prompt, last_name), ("first", "last")),
    )


def change_athlete(random: Random, case: Athlete) -> tuple[Athlete, str]:
    """The same first or the same last name, and another sport."""
    (first, last_name), form = case
    shared = random.randrange(2)
    rivals = [a for a in ATHLETES if a[shared] == (first, last_name)[shared] and SPORT_OF[a] != SPORT_OF[case[0]]]
    return (random.choice(rivals), form), ("last", "first")[shared]


ATHLETE = Task(
    name="athlete",
    description="the sport of an athlete, in a phrasing in which this athlete was never seen",
    draw=draw_athlete,
    assign_split=assign_athlete_split,
    write_line=write_athlete_line,
    list_concepts=list_athlete_concepts,
    corrupt=change_athlete,
)

# ---------------------------------------------------------------- antonyms in three languages

ANTONYM_FORMS = {
    "English": (
        "The opposite of {word} is",
        "What is not {word} must be",
        "English: {word} or",
        "The contrary of {word} is",
    ),
    "French": (
        "Le contraire de {word} est",
        "Ce qui est loin de {word} est",
        "Français: {word} ou",
        "Un contraire de {word} est",
    ),
    "Spanish": (
        "Lo contrario de {word} es",
        "Lo que no es {word} es",
        "Español: {word} o",
        "El contrario de {word} es",
    ),
}
OPPOSITE = {(language, a): b for language, rows in words.ANTONYMS.items() for row in rows for a, b in (row, row[::-1])}
ANTONYM_WITHHELD = dict(zip(OPPOSITE, draw_withheld(len(OPPOSITE), 4), strict=True))

Antonym = tuple[tuple[str, str], int]


def draw_antonym(random: Random) -> Antonym:
    return random.choice(tuple(OPPOSITE)), random.randrange(4)


def assign_antonym_split(case: Antonym) -> Split:
    form, tester = ANTONYM_WITHHELD[case[0]]
    return tester if case[1] == form else "train"


def write_antonym_line(case: Antonym) -> Line:
    (language, word), form = case
    return Line(ANTONYM_FORMS[language][form].format(word=word), f" {OPPOSITE[case[0]]}", ".")


def list_antonym_concepts(case: Antonym, prompt: str) -> tuple[Concept, ...]:
    language, word = case[0]
    row = next(i for i, pair in enumerate(words.ANTONYMS[language]) if word in pair)
    at = find_position(prompt, f" {word}")
    return (
        Concept("word", word, at),
        Concept("language", language, at, ("word",)),
        Concept("quality", "/".join(words.ANTONYMS["English"][row]), at, ("word",)),
        Concept("answer", OPPOSITE[case[0]], last_position(prompt), ("quality", "language", "word")),
    )


def change_word(random: Random, case: Antonym) -> tuple[Antonym, str]:
    (language, word), form = case
    candidates = tuple(w for tongue, w in OPPOSITE if tongue == language and w != OPPOSITE[case[0]])
    return ((language, choose_other(random, candidates, word)), form), "word"


ANTONYM = Task(
    name="antonym",
    description="the opposite of a word in its own language, in a phrasing in which this word was never seen",
    draw=draw_antonym,
    assign_split=assign_antonym_split,
    write_line=write_antonym_line,
    list_concepts=list_antonym_concepts,
    corrupt=change_word,
)


def draw_translation_line(random: Random) -> Line:
    """The same quality in two languages, so that a model can share it between them."""
    a, b = random.sample(tuple(words.ANTONYMS), 2)
    row, side = random.randrange(12), random.randrange(2)
    word, meaning = words.ANTONYMS[a][row][side], words.ANTONYMS[b][row][side]
    return Line(f"Dictionary: {word} in {b} is", f" {meaning}", ".")
