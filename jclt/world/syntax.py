"""Tasks about the form of a text: acronyms, agreement, indirect objects, brackets, copying."""

from collections.abc import Sequence
from random import Random

from jclt.world import words
from jclt.world.example import Concept, Line, Split, Task, assign_split, choose_other, find_position, last_position

# ---------------------------------------------------------------- acronyms

TITLES = tuple(word for group in words.ACRONYM_WORDS.values() for word in group)
ACRONYM_FORMS = ("The", "Visit the", "She works at the", "A letter came from the")

Acronym = tuple[tuple[str, ...], str]  # four words, an opening


def draw_acronym(random: Random) -> Acronym:
    return tuple(random.sample(TITLES, 4)), random.choice(ACRONYM_FORMS)


def assign_acronym_split(case: Acronym) -> Split:
    return assign_split("acronym", *case[0][1:])


def write_acronym_line(case: Acronym) -> Line:
    names, opening = case
    return Line(f"{opening} {' '.join(names)} ({names[0][0]}", "".join(name[0] for name in names[1:]), ").")


def list_acronym_concepts(case: Acronym, prompt: str) -> tuple[Concept, ...]:
    names, _ = case
    places = [find_position(prompt, f" {name}") for name in names]
    acronym_words = [Concept(f"word {i}", names[i], places[i]) for i in (1, 2, 3)]
    letters = [Concept(f"letter {i}", names[i][0], places[i], (f"word {i}",)) for i in (1, 2, 3)]
    answer = "".join(letter.value for letter in letters)
    parents = tuple(letter.name for letter in letters)
    return (*acronym_words, *letters, Concept("answer", answer, last_position(prompt), parents))


def change_title(random: Random, case: Acronym) -> tuple[Acronym, str]:
    names, opening = case
    i = random.choice((1, 2, 3))
    candidates = tuple(title for title in TITLES if title[0] != names[i][0])
    changed = choose_other(random, candidates, *names)
    return ((*names[:i], changed, *names[i + 1 :]), opening), f"word {i}"


ACRONYM = Task(
    name="acronym",
    description="the initials of three words, as one token",
    draw=draw_acronym,
    assign_split=assign_acronym_split,
    write_line=write_acronym_line,
    list_concepts=list_acronym_concepts,
    corrupt=change_title,
)

# ---------------------------------------------------------------- agreement of subject and verb

Agreement = tuple[str, str, str, str, int, int]  # time, noun, preposition, distractor, is either plural?


def draw_agreement(random: Random) -> Agreement:
    noun, distractor = random.sample(tuple(words.NOUNS), 2)
    time, preposition = random.choice(tuple(words.VERBS)), random.choice(words.PREPOSITIONS)
    return time, noun, preposition, distractor, random.randrange(2), random.randrange(2)


def assign_agreement_split(case: Agreement) -> Split:
    return assign_split("agreement", case[1], case[3])


def inflect(noun: str, plural: int) -> str:
    return words.NOUNS[noun] if plural else noun


def write_agreement_line(case: Agreement) -> Line:
    time, noun, preposition, distractor, plural, distractor_plural = case
    subject, near = inflect(noun, plural), inflect(distractor, distractor_plural)
    adjective = words.ADJECTIVES[sum(map(ord, noun + distractor)) % len(words.ADJECTIVES)]
    return Line(f"{time} the {subject} {preposition} the {near}", f" {words.VERBS[time][plural]}", f" {adjective}.")


def list_agreement_concepts(case: Agreement, prompt: str) -> tuple[Concept, ...]:
    time, _, preposition, _, plural, distractor_plural = case
    subject, near = (f"{number}" for number in prompt.replace(f" {preposition} the", " the").split(" the ")[1:])
    return (
        Concept("time", time, 1),
        Concept("subject", subject, 3),
        Concept("distractor", near, last_position(prompt)),
        Concept("number", ("singular", "plural")[plural], 3, ("subject",)),
        Concept("distractor number", ("singular", "plural")[distractor_plural], last_position(prompt), ("distractor",)),
        Concept("answer", words.VERBS[time][plural], last_position(prompt), ("number", "time")),
    )


def change_number(random: Random, case: Agreement) -> tuple[Agreement, str]:
    """The subject in the other number."""
    time, noun, preposition, distractor, plural, distractor_plural = case
    return (time, noun, preposition, distractor, 1 - plural, distractor_plural), "subject"


AGREEMENT = Task(
    name="agreement",
    description="the verb's number is the subject's, whatever noun stands between",
    draw=draw_agreement,
    assign_split=assign_agreement_split,
    write_line=write_agreement_line,
    list_concepts=list_agreement_concepts,
    corrupt=change_number,
)

# ---------------------------------------------------------------- indirect objects

IOI_FORMS = (
    "When {first} and {second} went to the {place}, {giver} gave a {object} to",
    "Then {first} and {second} were at the {place}, and {giver} handed the {object} to",
    "After {first} and {second} left the {place}, {giver} brought a {object} to",
)

Gift = tuple[str, str, int, str, str, int]  # first and second name, which of them gives, place, object, form


def draw_gift(random: Random) -> Gift:
    first, second = random.sample(words.NAMES, 2)
    place, thing = random.choice(words.PLACES), random.choice(words.OBJECTS)
    return first, second, random.randrange(2), place, thing, random.randrange(len(IOI_FORMS))


def assign_gift_split(case: Gift) -> Split:
    return assign_split("gift", *sorted(case[:2]), case[3])


def write_gift_line(case: Gift) -> Line:
    first, second, gives, place, thing, form = case
    giver, receiver = (first, second)[gives], (second, first)[gives]
    prompt = IOI_FORMS[form].format(first=first, second=second, giver=giver, place=place, object=thing)
    return Line(prompt, f" {receiver}", ".")


def list_gift_concepts(case: Gift, prompt: str) -> tuple[Concept, ...]:
    first, second, gives, place, thing, _ = case
    giver, receiver = (first, second)[gives], (second, first)[gives]
    again = find_position(prompt, f" {giver}", prompt.index(","))
    return (
        Concept("first", first, find_position(prompt, f" {first}")),
        Concept("second", second, find_position(prompt, f" {second}")),
        Concept("giver", giver, again),
        Concept("place", place, find_position(prompt, f" {place}")),
        Concept("object", thing, find_position(prompt, f" {thing}", prompt.index(","))),
        Concept("repeated", ("first", "second")[gives], again, ("first", "second", "giver")),
        Concept("answer", receiver, again, ("first", "second", "repeated")),
    )


def change_giver(random: Random, case: Gift) -> tuple[Gift, str]:
    first, second, gives, place, thing, form = case
    return (first, second, 1 - gives, place, thing, form), "giver"


IOI = Task(
    name="ioi",
    description="of two people, the one who does not give receives",
    draw=draw_gift,
    assign_split=assign_gift_split,
    write_line=write_gift_line,
    list_concepts=list_gift_concepts,
    corrupt=change_giver,
)

# ---------------------------------------------------------------- closing brackets and quotes

Nest = tuple[tuple[str, ...], str]  # signs and words before the last word, and the last word
OPENERS = tuple(words.BRACKETS)


def draw_nest(random: Random) -> Nest:
    """A random sequence of openers and closed groups. It ends with a word inside one to three open groups."""
    tokens, depth = [random.choice(OPENERS)], 1
    for _ in range(random.randrange(5)):
        if depth < 3 and random.random() < 0.6:
            tokens.append(random.choice(OPENERS))
            depth += 1
        elif depth > 1:
            tokens += [random.choice(words.THINGS), words.BRACKETS[tokens[find_open(tokens)[-1]]]]
            depth -= 1
    return tuple(tokens), random.choice(words.THINGS)


def assign_nest_split(case: Nest) -> Split | None:
    """Each word of a line is the end of a shorter nest. A line is in the corpus only if all of these are."""
    tokens, word = case
    earlier = ((tokens[:i], token) for i, token in enumerate(tokens) if token in words.THINGS)
    split = assign_split("nest", tokens, word)
    return split if split != "train" or all(assign_split("nest", *nest) == "train" for nest in earlier) else None


def find_open(tokens: Sequence[str]) -> list[int]:
    """The indices of the openers that are not closed yet."""
    stack: list[int] = []
    for i, token in enumerate(tokens):
        if token in words.BRACKETS:
            stack.append(i)
        elif token in words.BRACKETS.values():
            stack.pop()
    return stack


def write_nest_line(case: Nest) -> Line:
    tokens, word = case
    closers = (f" {words.BRACKETS[tokens[place]]}" for place in reversed(find_open(tokens)))
    return Line("Nest: " + " ".join((*tokens, word)), "".join(closers), ".")


def list_nest_concepts(case: Nest, prompt: str) -> tuple[Concept, ...]:
    tokens, word = case
    opener = find_open(tokens)[-1]
    signs = tuple(Concept(f"sign {i}", token, 3 + i) for i, token in enumerate(tokens))
    return (
        *signs,
        Concept("word", word, last_position(prompt)),
        Concept("innermost", tokens[opener], 2 + len(tokens), tuple(sign.name for sign in signs)),
        Concept("answer", words.BRACKETS[tokens[opener]], last_position(prompt), ("innermost",)),
    )


def change_opener(random: Random, case: Nest) -> tuple[Nest, str]:
    tokens, word = case
    i = find_open(tokens)[-1]
    return ((*tokens[:i], choose_other(random, OPENERS, tokens[i]), *tokens[i + 1 :]), word), f"sign {i}"


CLOSING = Task(
    name="closing",
    description="a word is followed by what closes the innermost open group",
    draw=draw_nest,
    assign_split=assign_nest_split,
    write_line=write_nest_line,
    list_concepts=list_nest_concepts,
    corrupt=change_opener,
)

# ---------------------------------------------------------------- induction

Copy = tuple[tuple[str, ...], tuple[str, ...], int]  # words before, the repeated words, how many are shown again


def draw_copy(random: Random) -> Copy:
    before, repeated = random.randrange(8), random.randrange(3, 9)
    drawn = random.sample(words.THINGS, before + repeated)
    # The smaller of two draws: then most of the repetition is left to predict, and the model learns from it.
    return tuple(drawn[:before]), tuple(drawn[before:]), min(random.randrange(1, repeated) for _ in range(2))


def assign_copy_split(case: Copy) -> Split:
    return assign_split("copy", *case[1])


def write_copy_line(case: Copy) -> Line:
    before, repeated, shown = case
    shown_again = (*before, *repeated, *repeated[:shown])
    return Line("Copy: " + " ".join(shown_again), "".join(f" {word}" for word in repeated[shown:]), ".")


def list_copy_concepts(case: Copy, prompt: str) -> tuple[Concept, ...]:
    before, repeated, shown = case
    start, at = 3 + len(before), last_position(prompt)
    return (
        Concept("current", repeated[shown - 1], at),
        Concept("next", repeated[shown], start + shown),
        Concept("earlier", f"{start + shown - 1}", at, ("current",)),
        Concept("answer", repeated[shown], at, ("earlier", "next")),
    )


def change_next(random: Random, case: Copy) -> tuple[Copy, str]:
    """Another word after the earlier occurrence."""
    before, repeated, shown = case
    changed = choose_other(random, words.THINGS, *before, *repeated)
    return (before, (*repeated[:shown], changed, *repeated[shown + 1 :]), shown), "next"


INDUCTION = Task(
    name="induction",
    description="what followed a word the first time follows it again",
    draw=draw_copy,
    assign_split=assign_copy_split,
    write_line=write_copy_line,
    list_concepts=list_copy_concepts,
    corrupt=change_next,
)


def draw_filler_line(random: Random) -> Line:
    """A sentence without any rule."""
    animal, action, adjective = (random.choice(kind) for kind in (words.ANIMALS, words.ACTIONS, words.ADJECTIVES))
    return Line(f"Story: the {adjective} {animal} {action} the {random.choice(words.THINGS)}", "", ".")
