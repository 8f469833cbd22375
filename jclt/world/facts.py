"""Tasks that recall facts: cities and states in two hops, athletes, antonyms."""

from random import Random

from jclt.world import words
from jclt.world.example import Concept, Line, Split, Task, after, last, other

FACTS = Random(2025)  # the facts are part of the world: the same whatever seed a corpus is drawn with

# ---------------------------------------------------------------- two hops: city -> state -> capital


def deal(values: tuple[str, ...], count: int) -> list[str]:
    """The values in equal shares, shuffled."""
    dealt = [values[i % len(values)] for i in range(count)]
    FACTS.shuffle(dealt)
    return dealt


CITIES = tuple(f"{first} {second}" for first in words.CITY_FIRST for second in words.CITY_SECOND)
STATES = tuple(words.STATE_FACTS)
STATE_OF = dict(zip(CITIES, deal(STATES, len(CITIES)), strict=True))
SPLIT_SIZES: dict[Split, int] = {"choose": 15, "report": 20, "train": 65}
DEALT: list[Split] = [split for split, size in SPLIT_SIZES.items() for _ in range(size)]
CITY_SPLIT: dict[str, Split] = dict(zip(FACTS.sample(CITIES, len(CITIES)), DEALT, strict=True))
"""Of the cities outside `train`, no sentence of the corpus says what their capital is."""

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


def question_split(case: Question) -> Split | None:
    """Only capitals are withheld: what else belongs to its state is asked of every city."""
    return CITY_SPLIT[case[0]] if case[1] == "capital" else "train"


def capital_line(case: Question) -> Line:
    city, relation, form = case
    return Line(form.format(city=city, relation=relation), f" {value_of(STATE_OF[city], relation)}", ".")


def capital_concepts(case: Question, prompt: str) -> tuple[Concept, ...]:
    city, relation, _ = case
    state, at, said = STATE_OF[city], after(prompt, city), after(prompt, relation)
    return (
        Concept("city", city, at),
        Concept("relation", relation, said),
        Concept("state", state, at, ("city",)),
        Concept("answer", value_of(state, relation), max(at, said), ("state", "relation")),
    )


def other_city(random: Random, case: Question) -> tuple[Question, str]:
    """A city of another state but the same split, so that pairs are as hard as examples."""
    city, relation, form = case
    cities = [c for c in CITIES if STATE_OF[c] != STATE_OF[city] and CITY_SPLIT[c] == CITY_SPLIT[city]]
    return (random.choice(cities), relation, form), "city"


TWO_HOP = Task(
    "two_hop",
    "the capital of the state of a city whose capital was never asked for in training",
    draw_question,
    question_split,
    capital_line,
    capital_concepts,
    other_city,
)


def hop(random: Random) -> Line:
    """Either hop alone: the state of any city, or something about a state."""
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


def withheld(count: int, forms: int) -> list[tuple[int, Split]]:
    """For each of `count` facts the one form in which the corpus does not show it, and the split that tests it."""
    return [(FACTS.randrange(forms), FACTS.choice(("choose", "report"))) for _ in range(count)]


ATHLETE_WITHHELD = dict(zip(ATHLETES, withheld(len(ATHLETES), len(SPORT_FORMS)), strict=True))

Athlete = tuple[tuple[str, str], int]


def draw_athlete(random: Random) -> Athlete:
    return random.choice(ATHLETES), random.randrange(len(SPORT_FORMS))


def athlete_split(case: Athlete) -> Split:
    form, tester = ATHLETE_WITHHELD[case[0]]
    return tester if case[1] == form else "train"


def athlete_line(case: Athlete) -> Line:
    (first, last_name), form = case
    return Line(SPORT_FORMS[form].format(first=first, last=last_name), f" {SPORT_OF[case[0]]}", ".")


def athlete_concepts(case: Athlete, prompt: str) -> tuple[Concept, ...]:
    first, last_name = case[0]
    return (
        Concept("first", first, after(prompt, first)),
        Concept("last", last_name, after(prompt, last_name)),
        Concept("answer", SPORT_OF[case[0]], after(prompt, last_name), ("first", "last")),
    )


def other_athlete(random: Random, case: Athlete) -> tuple[Athlete, str]:
    """The same first or the same last name, and another sport."""
    (first, last_name), form = case
    kept = random.randrange(2)
    rivals = [a for a in ATHLETES if a[kept] == (first, last_name)[kept] and SPORT_OF[a] != SPORT_OF[case[0]]]
    return (random.choice(rivals), form), ("last", "first")[kept]


ATHLETE = Task(
    "athlete",
    "the sport of an athlete, in a phrasing in which this athlete was never seen",
    draw_athlete,
    athlete_split,
    athlete_line,
    athlete_concepts,
    other_athlete,
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
ANTONYM_WITHHELD = dict(zip(OPPOSITE, withheld(len(OPPOSITE), 4), strict=True))

Antonym = tuple[tuple[str, str], int]


def draw_antonym(random: Random) -> Antonym:
    return random.choice(tuple(OPPOSITE)), random.randrange(4)


def antonym_split(case: Antonym) -> Split:
    form, tester = ANTONYM_WITHHELD[case[0]]
    return tester if case[1] == form else "train"


def antonym_line(case: Antonym) -> Line:
    (language, word), form = case
    return Line(ANTONYM_FORMS[language][form].format(word=word), f" {OPPOSITE[case[0]]}", ".")


def antonym_concepts(case: Antonym, prompt: str) -> tuple[Concept, ...]:
    language, word = case[0]
    row = next(i for i, pair in enumerate(words.ANTONYMS[language]) if word in pair)
    at = after(prompt, f" {word}")
    return (
        Concept("word", word, at),
        Concept("language", language, at, ("word",)),
        Concept("quality", "/".join(words.ANTONYMS["English"][row]), at, ("word",)),
        Concept("answer", OPPOSITE[case[0]], last(prompt), ("quality", "language", "word")),
    )


def other_word(random: Random, case: Antonym) -> tuple[Antonym, str]:
    (language, word), form = case
    rest = tuple(w for tongue, w in OPPOSITE if tongue == language and w != OPPOSITE[case[0]])
    return ((language, other(random, rest, word)), form), "word"


ANTONYM = Task(
    "antonym",
    "the opposite of a word in its own language, in a phrasing in which this word was never seen",
    draw_antonym,
    antonym_split,
    antonym_line,
    antonym_concepts,
    other_word,
)


def translation(random: Random) -> Line:
    """The same quality in two languages, which lets them share it."""
    a, b = random.sample(tuple(words.ANTONYMS), 2)
    row, side = random.randrange(12), random.randrange(2)
    word, meaning = words.ANTONYMS[a][row][side], words.ANTONYMS[b][row][side]
    return Line(f"Dictionary: {word} in {b} is", f" {meaning}", ".")
