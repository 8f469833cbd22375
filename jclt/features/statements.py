"""What is known to be true at each position of a prompt of the small world.

    state = Colorado           the concept has this value, and is known: from its position on
    last digit of a = 7        the same of parts of its value
    place = subject            at the token from which the subject is known
    place = after subject      from there up to the next token from which something is known
    token = number             the token is in this list of the world's words
    next = number              the token that follows is, or the answer
    task = addition            in the whole prompt

The last four are general: they say what a token is or does, and not which value is worked out.
"""

from collections.abc import Iterator
from functools import cache

from jclt.world import Example, words
from jclt.world.example import split_tokens

Statement = tuple[str, str]  # name, value
GENERAL = ("place", "token", "next", "task")


@cache
def list_kinds() -> dict[str, tuple[str, ...]]:
    """For each word, sign or number of the world what it is."""
    opposites = {word for rows in words.ANTONYMS.values() for pair in rows for word in pair}
    kinds = {
        "number": [str(number) for number in range(1000)],
        "letter of an acronym": [chr(letter) for letter in range(ord("A"), ord("Z") + 1)],
        "title": [word for group in words.ACRONYM_WORDS.values() for word in group],
        "first name of an athlete": words.ATHLETE_FIRST,
        "last name of an athlete": words.ATHLETE_LAST,
        "sport": words.SPORTS,
        "first word of a city": words.CITY_FIRST,
        "second word of a city": words.CITY_SECOND,
        "state": words.STATE_FACTS,
        "relation": words.RELATIONS,
        "fact of a state": [value for values in words.STATE_FACTS.values() for value in values],
        "singular noun": words.NOUNS,
        "plural noun": words.NOUNS.values(),
        "time": words.VERBS,
        "verb": [verb for verbs in words.VERBS.values() for verb in verbs],
        "preposition": words.PREPOSITIONS,
        "name": words.NAMES,
        "building": words.PLACES,
        "gift": words.OBJECTS,
        "thing": words.THINGS,
        "event": words.EVENTS,
        "quality": opposites,
        "opener": words.BRACKETS,
        "closer": words.BRACKETS.values(),
        **{f"item of {name}": items for name, items in (words.CYCLES | words.LADDERS).items()},
    }
    found: dict[str, tuple[str, ...]] = {}
    for kind, members in kinds.items():
        for word in members:
            found[word] = (*found.get(word, ()), kind)
    return found


def list_statements(example: Example, last: int) -> Iterator[tuple[Statement, range]]:
    """What is true of a prompt whose last position is `last`, and at which positions."""
    yield ("task", example.task), range(last + 1)
    tokens, kinds = [token.strip() for token in split_tokens(example.prompt)], list_kinds()
    for position, token in enumerate([*tokens, example.answers[0].strip()], start=1):
        for kind in kinds.get(token, ()):
            if position <= last:
                yield ("token", kind), range(position, position + 1)
            yield ("next", kind), range(position - 1, position)
    places: dict[int, list[str]] = {}
    for concept in example.concepts:
        for name, value in ((concept.name, concept.value), *_split_value(concept.name, concept.value)):
            yield (name, value), range(concept.position, last + 1)
        if not concept.parents:
            places.setdefault(concept.position, []).append(concept.name)
    starts = sorted(places)
    for start, end in zip(starts, [*starts[1:], last + 1], strict=True):
        for name in places[start]:
            yield ("place", name), range(start, start + 1)
            yield ("place", f"after {name}"), range(start + 1, end)


def _split_value(name: str, value: str) -> Iterator[Statement]:
    """The parts of numbers of several digits, and of names of two words."""
    words = value.split(" ")
    if value.isdigit() and len(value) > 1:
        yield f"last digit of {name}", value[-1]
        yield f"first digit of {name}" if len(value) == 2 else f"first digits of {name}", value[:-1]
    elif len(words) == 2 and all(map(str.isalpha, words)):
        yield f"first word of {name}", words[0]
        yield f"second word of {name}", words[1]
