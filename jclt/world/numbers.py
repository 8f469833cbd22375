"""Tasks with an order: addition, years, and successors in lists that share the notion of a place."""

from random import Random

from jclt.world import words
from jclt.world.example import Concept, Line, Split, Task, after, last, other, split_of

# ---------------------------------------------------------------- addition

Sum = tuple[int, int]


def draw_sum(random: Random) -> Sum:
    """Numbers of one digit are drawn often: their sums are the table that the others build on."""
    return random.randrange(random.choice((10, 100, 100))), random.randrange(random.choice((10, 100, 100)))


def sum_split(case: Sum) -> Split:
    """Withheld in either order; never where a number has one digit, since the task is to add those of two."""
    return split_of("sum", *sorted(case)) if min(case) >= 10 else "train"


def sum_line(case: Sum) -> Line:
    a, b = case
    return Line(f"calc: {a}+{b}=", f"{a + b}")


def sum_concepts(case: Sum, prompt: str) -> tuple[Concept, ...]:
    a, b = case
    at = last(prompt) - 1
    return (
        Concept("a", f"{a}", at - 2),
        Concept("b", f"{b}", at),
        Concept("ones", f"{(a + b) % 10}", at, ("a", "b")),
        Concept("carry", f"{(a % 10 + b % 10) // 10}", at, ("a", "b")),
        Concept("tens", f"{a // 10 + b // 10}", at, ("a", "b")),
        Concept("answer", f"{a + b}", at, ("ones", "carry", "tens")),
    )


def other_sum(random: Random, case: Sum) -> tuple[Sum, str]:
    a, b = case
    changed = other(random, tuple(range(10, 100)), a, b)
    return ((changed, b), "a") if random.random() < 0.5 else ((a, changed), "b")


ADDITION = Task(
    "addition",
    "the sum of two numbers never added in training",
    draw_sum,
    sum_split,
    sum_line,
    sum_concepts,
    other_sum,
)


def digits(random: Random) -> Line:
    """How numbers are made of digits, and sums worked out on them from the ones up."""
    if random.random() < 0.4:
        # With and without a space are two tokens: one stands first in a sum, the other second and after it.
        space, number = random.choice((("", random.randrange(199)), (" ", random.randrange(100))))
        return Line(f"digits:{space}{number} =", "".join(f" {d}" for d in reversed(f"{number}")))
    a, b = ADDITION.case(random, "train")
    spelled = (" ".join(reversed(f"{n:02d}")) for n in (a, b))
    return Line("digits: {} + {} =".format(*spelled), "".join(f" {d}" for d in reversed(f"{a + b:02d}")))


def part_of_sum(random: Random) -> Line:
    """The ones or the tens of a sum alone, which are the two halves of the way to it."""
    a, b = ADDITION.case(random, "train")
    if random.random() < 0.75:  # the ones are by far the harder half
        return Line(f"ones: {a}+{b}=", f"{(a + b) % 10}")
    return Line(f"tens: {a}+{b}=", f"{(a + b) // 10}")


# ---------------------------------------------------------------- greater than

YEAR_FORMS = (
    "The {event} lasted from {century}{year} to {century}",
    "From {century}{year} a {event} went on until {century}",
)

Year = tuple[str, int, int, int]


def draw_year(random: Random) -> Year:
    return random.choice(words.EVENTS), random.randrange(11, 21), random.randrange(11, 98), random.randrange(2)


def year_split(case: Year) -> Split:
    return split_of("year", *case[:3])


def year_line(case: Year) -> Line:
    event, century, year, form = case
    # Any later year is right; which one is written follows from the case, so that a line is a function of its case.
    end = Random(repr(case)).randrange(year + 1, 100)
    return Line(YEAR_FORMS[form].format(event=event, century=century, year=year), f"{end}", ".")


def later_years(case: Year) -> tuple[str, ...]:
    return tuple(f"{year}" for year in range(case[2] + 1, 100))


def year_concepts(case: Year, prompt: str) -> tuple[Concept, ...]:
    event, century, year, _ = case
    at = after(prompt, f" {century}{year}")
    return (
        Concept("event", event, after(prompt, event)),
        Concept("century", f"{century}", at - 1),
        Concept("year", f"{year}", at),
        Concept("answer", f">{year}", last(prompt), ("year",)),
    )


def other_year(random: Random, case: Year) -> tuple[Year, str]:
    """A year on the other side of the middle, so that many answers are right for one prompt only."""
    event, century, year, form = case
    return (event, century, random.randrange(60, 98) if year < 55 else random.randrange(11, 50), form), "year"


GREATER_THAN = Task(
    "greater_than",
    "a year of two digits later than the one named",
    draw_year,
    year_split,
    year_line,
    year_concepts,
    other_year,
    later_years,
)

# ---------------------------------------------------------------- successors

LISTS = words.CYCLES | words.LADDERS
PLACE = {(name, item): i for name, items in LISTS.items() for i, item in enumerate(items)}
STEPS = (1, 2, 3)
SHOWN = 3  # always as many, or the end of a line would say that what is withheld does not follow

Step = tuple[str, int, int, int]  # list, place of the last item shown, step, how many items are shown (0: step named)


def item(name: str, place: int) -> str | None:
    """The item at a place; None beyond the end of a list that does not go round."""
    items = LISTS[name]
    return items[place % len(items)] if name in words.CYCLES else items[place] if 0 <= place < len(items) else None


def draw_step(random: Random) -> Step:
    while True:
        name, step, shown = random.choice(tuple(LISTS)), random.choice(STEPS), random.choice((0, SHOWN, SHOWN))
        place = random.randrange(len(LISTS[name]))
        if item(name, place + step) is not None and item(name, place - step * max(0, shown - 1)) is not None:
            return name, place, step, shown


def step_split(case: Step) -> Split:
    """By where it starts: no line that starts at this item goes on by this step where the three are withheld."""
    name, place, step, shown = case
    return split_of("step", name, (place - step * max(0, shown - 1)) % len(LISTS[name]), step)


def step_line(case: Step) -> Line:
    name, place, step, shown = case
    answer = f" {item(name, place + step)}"
    if not shown:
        return Line(f"Step: {step} after {item(name, place)} is", answer, ".")
    run = (f"{item(name, place - step * back)}" for back in reversed(range(shown)))
    return Line("List: " + " ".join(run), answer, ".")


def step_concepts(case: Step, prompt: str) -> tuple[Concept, ...]:
    name, place, step, shown = case
    index, answer = place % len(LISTS[name]), f"{item(name, place + step)}"
    if shown:
        start = (place - step * (shown - 1)) % len(LISTS[name])
        return (
            Concept("list", name, 3),
            Concept("start", f"{start + 1}", 3),
            Concept("step", f"{step}", 4),
            Concept("index", f"{index + 1}", last(prompt), ("start", "step")),
            Concept("answer", answer, last(prompt), ("list", "index", "step")),
        )
    at = last(prompt) - 1
    return (
        Concept("item", f"{item(name, place)}", at),
        Concept("step", f"{step}", 3),
        Concept("list", name, at, ("item",)),
        Concept("index", f"{index + 1}", at, ("item",)),
        Concept("answer", answer, at, ("list", "index", "step")),
    )


def other_step(random: Random, case: Step) -> tuple[Step, str]:
    """Another item or another step where the step is named; else the same places in another list."""
    name, place, step, shown = case
    if shown:
        alike = words.CYCLES if name in words.CYCLES else words.LADDERS
        names = tuple(n for n, items in alike.items() if len(items) == len(LISTS[name]))
        return (other(random, names, name), place, step, shown), "list"
    if random.random() < 0.5:
        steps = tuple(s for s in STEPS if item(name, place + s) is not None)
        if len(steps) > 1:
            return (name, place, other(random, steps, step), 0), "step"
    places = tuple(p for p in range(len(LISTS[name])) if item(name, p + step) is not None)
    return (name, other(random, places, place), step, 0), "item"


SUCCESSOR = Task(
    "successor",
    "what comes a step after an item, for a list, an item and a step never seen together",
    draw_step,
    step_split,
    step_line,
    step_concepts,
    other_step,
)


def place_of_item(random: Random) -> Line:
    """The place of an item in its list, and the item at a place."""
    name = random.choice(tuple(LISTS))
    place = random.randrange(len(LISTS[name]))
    if random.random() < 0.4:
        return Line(f"Place: {item(name, place)} is number", f" {place + 1}", f" of {name}.")
    return Line(f"Place: number {place + 1} of {name} is", f" {item(name, place)}", ".")


def elsewhere(random: Random) -> Line:
    """The item of one list some steps after the place of an item of another."""
    while True:
        name, target = random.sample(tuple(LISTS), 2)
        place, step = random.randrange(len(LISTS[name])), random.choice((0, *STEPS))
        if place + step < len(LISTS[target]):
            break
    return Line(f"Step: {step} after {item(name, place)} in {target} is", f" {LISTS[target][place + step]}", ".")


def mixed_run(random: Random) -> Line:
    """A run whose first items are taken from other lists: it goes by places, whatever names them."""
    while True:
        name, place, step, shown = case = SUCCESSOR.case(random, "train")
        first, second = random.sample(tuple(LISTS), 2)
        start, middle = place - 2 * step, place - step
        if shown and 0 <= start < len(LISTS[first]) and middle < len(LISTS[second]) and second != name:
            break
    run = LISTS[first][start], LISTS[second][middle], f"{item(name, place)}"
    return Line("List: " + " ".join(run), step_line(case).answer, ".")
