"""Tasks about order: addition, years, and successors in lists whose items have numbered places."""

from random import Random

from jclt.world import words
from jclt.world.example import Concept, Line, Split, Task, assign_split, choose_other, find_position, last_position

# ---------------------------------------------------------------- addition

Sum = tuple[int, int]


def draw_sum(random: Random) -> Sum:
    """Numbers with one digit are frequent, because all other sums are built from theirs."""
    return random.randrange(random.choice((10, 100, 100))), random.randrange(random.choice((10, 100, 100)))


def assign_sum_split(case: Sum) -> Split:
    """The same split for both orders. Only sums of numbers with two digits, which the task is about, are withheld."""
    return assign_split("sum", *sorted(case)) if min(case) >= 10 else "train"


def write_sum_line(case: Sum) -> Line:
    a, b = case
    return Line(f"calc: {a}+{b}=", f"{a + b}")


def list_sum_concepts(case: Sum, prompt: str) -> tuple[Concept, ...]:
    a, b = case
    at = last_position(prompt) - 1
    return (
        Concept("a", f"{a}", at - 2),
        Concept("b", f"{b}", at),
        Concept("ones", f"{(a + b) % 10}", at, ("a", "b")),
        Concept("carry", f"{(a % 10 + b % 10) // 10}", at, ("a", "b")),
        Concept("tens", f"{a // 10 + b // 10}", at, ("a", "b")),
        Concept("answer", f"{a + b}", at, ("ones", "carry", "tens")),
    )


def change_sum(random: Random, case: Sum) -> tuple[Sum, str]:
    a, b = case
    changed = choose_other(random, tuple(range(10, 100)), a, b)
    return ((changed, b), "a") if random.random() < 0.5 else ((a, changed), "b")


ADDITION = Task(
    name="addition",
    description="the sum of two numbers never added in training",
    draw=draw_sum,
    assign_split=assign_sum_split,
    write_line=write_sum_line,
    list_concepts=list_sum_concepts,
    corrupt=change_sum,
)


def draw_digits_line(random: Random) -> Line:
    """The digits of a number, or a sum digit by digit from the ones up."""
    if random.random() < 0.4:
        # A number with a space before it and one without are two tokens, and both occur in sums.
        space, number = random.choice((("", random.randrange(199)), (" ", random.randrange(100))))
        return Line(f"digits:{space}{number} =", "".join(f" {d}" for d in reversed(f"{number}")))
    a, b = ADDITION.draw_case(random, "train")
    spelled = (" ".join(reversed(f"{n:02d}")) for n in (a, b))
    return Line("digits: {} + {} =".format(*spelled), "".join(f" {d}" for d in reversed(f"{a + b:02d}")))


def draw_part_of_sum_line(random: Random) -> Line:
    """Only the ones or only the tens of a sum: the two intermediate results."""
    a, b = ADDITION.draw_case(random, "train")
    if random.random() < 0.75:  # the ones are much harder
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


def assign_year_split(case: Year) -> Split:
    return assign_split("year", *case[:3])


def write_year_line(case: Year) -> Line:
    event, century, year, form = case
    # Any later year is right. The case determines the one that is written, so that a line is a function of its case.
    end = Random(repr(case)).randrange(year + 1, 100)
    return Line(YEAR_FORMS[form].format(event=event, century=century, year=year), f"{end}", ".")


def list_later_years(case: Year) -> tuple[str, ...]:
    return tuple(f"{year}" for year in range(case[2] + 1, 100))


def list_year_concepts(case: Year, prompt: str) -> tuple[Concept, ...]:
    event, century, year, _ = case
    at = find_position(prompt, f" {century}{year}")
    return (
        Concept("event", event, find_position(prompt, event)),
        Concept("century", f"{century}", at - 1),
        Concept("year", f"{year}", at),
        Concept("answer", f">{year}", last_position(prompt), ("year",)),
    )


def change_year(random: Random, case: Year) -> tuple[Year, str]:
    """A year in the other half of the century, so that many answers are right for only one of the two prompts."""
    event, century, year, form = case
    return (event, century, random.randrange(60, 98) if year < 55 else random.randrange(11, 50), form), "year"


GREATER_THAN = Task(
    name="greater_than",
    description="a year of two digits later than the one named",
    draw=draw_year,
    assign_split=assign_year_split,
    write_line=write_year_line,
    list_concepts=list_year_concepts,
    corrupt=change_year,
    list_answers=list_later_years,
)

# ---------------------------------------------------------------- successors

LISTS = words.CYCLES | words.LADDERS
STEPS = (1, 2, 3)
SHOWN = 3  # always the same number; otherwise the end of a line would give away that a withheld line does not follow

Step = tuple[str, int, int, int]  # list, place of the last item shown, step, how many items are shown (0: step named)


def item_at(name: str, place: int) -> str | None:
    """The item at a place; None beyond the ends of a ladder."""
    items = LISTS[name]
    return items[place % len(items)] if name in words.CYCLES else items[place] if 0 <= place < len(items) else None


def draw_step(random: Random) -> Step:
    while True:
        name, step, shown = random.choice(tuple(LISTS)), random.choice(STEPS), random.choice((0, SHOWN, SHOWN))
        place = random.randrange(len(LISTS[name]))
        if item_at(name, place + step) is not None and item_at(name, place - step * max(0, shown - 1)) is not None:
            return name, place, step, shown


def assign_step_split(case: Step) -> Split:
    """By list, first item and step. If these are withheld, no line of the corpus starts with this item and step."""
    name, place, step, shown = case
    return assign_split("step", name, (place - step * max(0, shown - 1)) % len(LISTS[name]), step)


def write_step_line(case: Step) -> Line:
    name, place, step, shown = case
    answer = f" {item_at(name, place + step)}"
    if not shown:
        return Line(f"Step: {step} after {item_at(name, place)} is", answer, ".")
    run = (f"{item_at(name, place - step * back)}" for back in reversed(range(shown)))
    return Line("List: " + " ".join(run), answer, ".")


def list_step_concepts(case: Step, prompt: str) -> tuple[Concept, ...]:
    name, place, step, shown = case
    index, answer = place % len(LISTS[name]), f"{item_at(name, place + step)}"
    if shown:
        start = (place - step * (shown - 1)) % len(LISTS[name])
        return (
            Concept("list", name, 3),
            Concept("start", f"{start + 1}", 3),
            Concept("step", f"{step}", 4),
            Concept("index", f"{index + 1}", last_position(prompt), ("start", "step")),
            Concept("answer", answer, last_position(prompt), ("list", "index", "step")),
        )
    at = last_position(prompt) - 1
    return (
        Concept("item", f"{item_at(name, place)}", at),
        Concept("step", f"{step}", 3),
        Concept("list", name, at, ("item",)),
        Concept("index", f"{index + 1}", at, ("item",)),
        Concept("answer", answer, at, ("list", "index", "step")),
    )


def change_step(random: Random, case: Step) -> tuple[Step, str]:
    """If the prompt names the step, another item or another step; otherwise the same places in another list."""
    name, place, step, shown = case
    if shown:
        alike = words.CYCLES if name in words.CYCLES else words.LADDERS
        names = tuple(n for n, items in alike.items() if len(items) == len(LISTS[name]))
        return (choose_other(random, names, name), place, step, shown), "list"
    if random.random() < 0.5:
        steps = tuple(s for s in STEPS if item_at(name, place + s) is not None)
        if len(steps) > 1:
            return (name, place, choose_other(random, steps, step), 0), "step"
    places = tuple(p for p in range(len(LISTS[name])) if item_at(name, p + step) is not None)
    return (name, choose_other(random, places, place), step, 0), "item"


SUCCESSOR = Task(
    name="successor",
    description="what comes a step after an item, for a list, an item and a step never seen together",
    draw=draw_step,
    assign_split=assign_step_split,
    write_line=write_step_line,
    list_concepts=list_step_concepts,
    corrupt=change_step,
)


def draw_place_line(random: Random) -> Line:
    """The place of an item in its list, and the item at a place."""
    name = random.choice(tuple(LISTS))
    place = random.randrange(len(LISTS[name]))
    if random.random() < 0.4:
        return Line(f"Place: {item_at(name, place)} is number", f" {place + 1}", f" of {name}.")
    return Line(f"Place: number {place + 1} of {name} is", f" {item_at(name, place)}", ".")


def draw_elsewhere_line(random: Random) -> Line:
    """The item of one list that comes some steps after the place of an item of another list."""
    while True:
        name, target = random.sample(tuple(LISTS), 2)
        place, step = random.randrange(len(LISTS[name])), random.choice((0, *STEPS))
        if place + step < len(LISTS[target]):
            break
    return Line(f"Step: {step} after {item_at(name, place)} in {target} is", f" {LISTS[target][place + step]}", ".")


def draw_mixed_run_line(random: Random) -> Line:
    """A run whose first items come from other lists: only their places matter."""
    while True:
        name, place, step, shown = case = SUCCESSOR.draw_case(random, "train")
        first, second = random.sample(tuple(LISTS), 2)
        start, middle = place - 2 * step, place - step
        if shown and 0 <= start < len(LISTS[first]) and middle < len(LISTS[second]) and second != name:
            break
    run = LISTS[first][start], LISTS[second][middle], f"{item_at(name, place)}"
    return Line("List: " + " ".join(run), write_step_line(case).answer, ".")
