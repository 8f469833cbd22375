"""What the case studies share: which features say a concept, their exchange, the controls.

A code is the set of features that say a concept's value at one place of a prompt: those of whose variance, over prompts
of the split `train`, enough lies between the concept's values. To exchange the value v for w, each of them is set to

    max(activation + strength (mean in prompts of w - mean in prompts of v), 0)

with the means over the train prompts. The model itself reacts: MLPs, attention and norms are free. Controls are the
same at a place where the concept is not, and the same changes of as many other features of the same layers and
position, drawn at random, active ones first. Shares and strengths were chosen on prompts of the split `choose`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple

import numpy as np

import jclt
from jclt import Add, Model, Scale, load_coder, load_model, run
from jclt.coders import Coder
from jclt.interventions.settings import Treatment
from jclt.world import TASKS, Example, Split
from jclt.world.example import last_position
from jclt.world.measure import answer_examples

TRAIN_PROMPTS = 600
ROWS, MULTIPLE = 16, 8
"""Rows of one pass, and what lengths of prompts are padded to a multiple of: few programs."""
DRAWN = 30
"""Examples drawn for each that is kept."""
DRAWS = 4
"""Random controls of a prompt."""

Read = Callable[[Example], str]
"""The value of a concept in an example."""
Place = Callable[[Example], int]
"""A position of the prompt."""
Cell = tuple[int, int, int]
"""Layer, position and number of a feature."""
Values = dict[Cell, float]
"""What features are set to."""
Shifts = Mapping[tuple[int, int], float]
"""By how much features (layer, number) change."""


@cache
def load() -> tuple[Model, Coder]:
    model = load_model("demo")
    return model, load_coder("demo", model=model)


def concept(name: str) -> Read:
    return lambda example: next(c.value for c in example.concepts if c.name == name)


def at(name: str) -> Place:
    """Where a concept can first be known."""
    return lambda example: next(c.position for c in example.concepts if c.name == name)


def at_end(example: Example) -> int:
    return last_position(example.prompt)


def before(place: Place) -> Place:
    return lambda example: place(example) - 1


def every(_: Example) -> bool:
    return True


def draw_examples(
    task: str, count: int, seed: int, keep: Callable[[Example], bool] = every, split: Split = "report"
) -> list[Example]:
    """Prompts that the model answers rightly: what features do for an answer shows only where it gives that answer."""
    drawn = [example for example in TASKS[task].examples(split, DRAWN * count, seed) if keep(example)]
    found = list[Example]()
    while drawn and len(found) < count:
        some, drawn = drawn[:count], drawn[count:]
        answers = answer_examples(load()[0], some)
        found += [example for example, answer in zip(some, answers, strict=True) if answer.right]
    return found[:count]


# ---------------------------------------------------------------- codes


def pad_tokens(model: Model, examples: Sequence[Example]) -> np.ndarray:
    """The prompts' tokens; what is added at the end changes nothing before it."""
    tokens = [model.encode(example.prompt) for example in examples]
    length = -(-max(map(len, tokens)) // MULTIPLE) * MULTIPLE
    return np.array([[*row, *[0] * (length - len(row))] for row in tokens])


def read_activations(tokens: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
    """Of all features at one position of each prompt `[n, L, F]`, or at all `[n, L, T, F]`."""
    model, coder = load()
    seen = run(model, tokens, capture=(coder.config.reads,))[1][coder.config.reads]
    rows = np.arange(len(tokens))
    reads = [seen[layer] if positions is None else seen[layer][rows, positions] for layer in coder.config.covered]
    return np.stack([np.asarray(coder.encode(i, read), np.float32) for i, read in enumerate(reads)], axis=1)


@dataclass(frozen=True, eq=False)
class Code:
    """The features that say a concept's value at a place."""

    read: Read
    place: Place
    values: list[str]
    means: np.ndarray  # [values, L, F]
    features: list[tuple[int, int]]  # layer, number
    shares: np.ndarray  # [L, F]: of each feature's variance, what lies between values

    def select(self, mask: np.ndarray) -> "Code":
        return replace(self, features=[cell for cell in self.features if mask[cell]])

    def list_shifts(self, example: Example, value: str, strength: float) -> dict[tuple[int, int], float]:
        """By how much each feature changes when the example's value is exchanged for another."""
        own, other = (self.means[self.values.index(name)] for name in (self.read(example), value))
        return {cell: float(strength * (other[cell] - own[cell])) for cell in self.features if other[cell] != own[cell]}


def fit_code(
    task: str,
    read: Read,
    place: Place,
    *,
    layers: Sequence[int] = (0, 1, 2, 3),
    share: float = 0.5,
    keep: Callable[[Example], bool] = every,
) -> Code:
    """`share`: of a feature's variance, the least part between values from which on it belongs to the code."""
    examples = [example for example in TASKS[task].examples("train", TRAIN_PROMPTS, seed=1) if keep(example)]
    positions = np.array([place(example) for example in examples])
    activations = read_activations(pad_tokens(load()[0], examples), positions)
    labels = np.array([read(example) for example in examples])
    values = sorted(set(labels.tolist()))
    means = np.stack([activations[labels == value].mean(axis=0) for value in values])
    counts = np.array([np.mean(labels == value) for value in values])
    between = np.einsum("v,vlf->lf", counts, (means - activations.mean(axis=0)) ** 2)
    total = activations.var(axis=0)
    shares = np.where(total > 1e-6, between / np.maximum(total, 1e-6), -1)
    chosen = [(layer, number) for layer, number in np.argwhere(shares >= share).tolist() if layer in layers]
    return Code(read, place, values, means, chosen, shares)


# ---------------------------------------------------------------- interventions


def make_idle_edits(changed: Collection[Cell], features: int) -> list[Scale]:
    """Edits that change nothing, so that passes with few and with many changed features share a program."""
    most = max((sum(cell[0] == layer for cell in changed) for layer in range(4)), default=0)
    in_first = sum(layer == 0 for layer, _, _ in changed)
    missing = (256 if most <= 256 else 1024) - in_first
    ends = [-1, *sorted({feature for layer, _, feature in changed if layer == 0}), features]
    edits = list[Scale]()
    for start, stop in zip(ends, ends[1:], strict=False):
        size = min(stop - start - 1, missing)
        if size > 0:
            idle = slice(start + 1, start + 1 + size)
            edits.append(Scale(np.ones(ROWS), layer=0, position=0, feature=idle))
            missing -= size
    return edits


def run_rows(
    example: Example, length: int, rows: Sequence[Values], attention: Treatment = "free"
) -> tuple[np.ndarray, np.ndarray]:
    """The next token's probabilities: the model's own `[V]`, and those with each row's features set `[rows, V]`."""
    model, coder = load()
    assert len(rows) <= ROWS
    factors: dict[Cell, np.ndarray] = {}
    values: dict[Cell, np.ndarray] = {}
    for number, row in enumerate(rows):
        for cell, value in row.items():
            factors.setdefault(cell, np.ones(ROWS))[number] = 0
            values.setdefault(cell, np.zeros(ROWS))[number] = value
    edits = []
    for (layer, position, feature), factor in factors.items():
        value = values[layer, position, feature]
        edits.append(Scale(factor, layer=layer, position=position, feature=feature))
        edits.append(Add(value, layer=layer, position=position, feature=feature))
    edits += make_idle_edits(factors, coder.config.features)
    tokens = model.encode(example.prompt)
    padded = np.array([*tokens, *[0] * (length - len(tokens))])
    found = jclt.sweep(
        model, coder, padded, edits, reference="current", attention=attention, norms="free", predict=False
    )
    end = len(tokens) - 1
    logits = np.stack([found[0].original_logits[end], *(result.logits[end] for result in found[: len(rows)])])
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return probabilities[0], probabilities[1:]


def shift(activations: np.ndarray, shifts: Shifts, position: int) -> Values:
    """The features' values after the shifts, from activations `[L, T, F]`."""
    return {
        (layer, position, number): max(0.0, float(activations[layer, position, number]) + change)
        for (layer, number), change in shifts.items()
    }


def draw_others(
    activations: np.ndarray, position: int, cells: Sequence[tuple[int, int]], random: np.random.Generator
) -> list[tuple[int, int]]:
    """For each feature another one of its layer, drawn at random, active ones first; none twice."""
    drawn: list[tuple[int, int]] = []
    for layer in range(len(activations)):
        own = [number for of, number in cells if of == layer]
        order = random.permutation(np.setdiff1d(np.arange(activations.shape[2]), own))
        order = order[np.argsort(activations[layer, position, order] <= 0, kind="stable")]
        drawn += [(layer, int(number)) for number in order[: len(own)]]
    return drawn


def give_to_others(
    activations: np.ndarray, position: int, shifts: Shifts, random: np.random.Generator
) -> dict[tuple[int, int], float]:
    """The same changes of as many other features."""
    drawn, changes = draw_others(activations, position, sorted(shifts), random), dict[tuple[int, int], float]()
    for layer in range(len(activations)):
        others, sizes = [c for c in drawn if c[0] == layer], [shifts[c] for c in sorted(shifts) if c[0] == layer]
        changes |= dict(zip(others, sizes, strict=False))  # there may be fewer others
    return changes


class Outcome(NamedTuple):
    """Of one prompt."""

    ours: float
    control: float


Outcomes = dict[str, list[Outcome]]
"""By claim."""


@dataclass(frozen=True, eq=False)
class Swap:
    """A concept whose value is exchanged."""

    name: str
    task: str
    codes: tuple[Code, ...]
    expect: Callable[[Example, str], tuple[str, ...]]  # the right answers with another value; none: it has no answer
    strength: float
    wrong: Place  # where the concept is not
    keep: Callable[[Example], bool] = field(default=every)


def choose_value(swap: Swap, example: Example, random: np.random.Generator) -> str | None:
    """Another value, with which the answer is another one."""
    own, values = swap.codes[0].read(example), swap.codes[0].values
    others = [v for v in values if v != own and swap.expect(example, v) and swap.expect(example, v) != example.answers]
    return str(random.choice(others)) if others else None


def make_rows(
    swap: Swap, example: Example, activations: np.ndarray, value: str, random: np.random.Generator
) -> list[Values]:
    """The exchange, the same at the wrong place, the active features set to 0 and with their signs flipped; then,
    `DRAWS` times each, the first, third and fourth with random features."""
    moved, elsewhere = Values(), Values()
    scaled, others = [Values(), Values()], [Values() for _ in range(3 * DRAWS)]
    for code in swap.codes:
        position, shifts = code.place(example), code.list_shifts(example, value, swap.strength)
        moved |= shift(activations, shifts, position)
        elsewhere |= shift(activations, shifts, swap.wrong(example))
        active = [cell for cell in code.features if activations[cell[0], position, cell[1]] > 0]
        for row, factor in zip(scaled, (0, -1), strict=True):
            row |= scale(activations, active, position, factor)
        for draw in range(DRAWS):
            others[draw] |= shift(activations, give_to_others(activations, position, shifts, random), position)
            drawn = draw_others(activations, position, active, random)
            others[DRAWS + draw] |= scale(activations, drawn, position, 0)
            others[2 * DRAWS + draw] |= scale(activations, drawn, position, -1)
    return [moved, elsewhere, *scaled, *others]


def scale(activations: np.ndarray, cells: Sequence[tuple[int, int]], position: int, factor: float) -> Values:
    return {(layer, position, f): factor * float(activations[layer, position, f]) for layer, f in cells}


@cache
def read_vocabulary() -> dict[int, str]:
    tokenizer = load()[0].tokenizer
    assert tokenizer is not None
    return {number: token for token, number in tokenizer.backend.get_vocab().items()}


def decode(token: int) -> str:
    return read_vocabulary()[int(token)]


def mean_of(values: Sequence[float], kind: int) -> float:
    """Over the random rows of one kind."""
    start = len(values) - (3 - kind) * DRAWS
    return float(np.mean(values[start : start + DRAWS]))


def measure_swap(swap: Swap, seed: int, count: int, split: Split = "report") -> Outcomes:
    """Claims: how often the exchange gives the other value's answer, beside the same at the wrong place and with random
    features; how much of the answer's probability is lost without the code's active features, or with their signs
    flipped, beside as many random ones."""
    model, _ = load()
    examples = draw_examples(swap.task, count, seed, swap.keep, split)
    tokens, random = pad_tokens(model, examples), np.random.default_rng(seed)
    outcomes: Outcomes = {}
    for example, activations in zip(examples, read_activations(tokens), strict=True):
        value = choose_value(swap, example, random)
        if value is None:
            continue
        rows = make_rows(swap, example, activations, value, random)
        clean, changed = run_rows(example, tokens.shape[1], rows)
        hit = [float(decode(row.argmax()) in swap.expect(example, value)) for row in changed]
        right = [number for number, token in read_vocabulary().items() if token in example.answers]
        lost = [float(clean[right].sum() - row[right].sum()) for row in changed]
        found = {
            "exchanged; at a wrong place": Outcome(hit[0], hit[1]),
            "exchanged; random features": Outcome(hit[0], mean_of(hit, 0)),
            "set to 0; random features": Outcome(lost[2], mean_of(lost, 1)),
            "sign flipped; random features": Outcome(lost[3], mean_of(lost, 2)),
        }
        for claim, outcome in found.items():
            outcomes.setdefault(f"{swap.name} {claim}", []).append(outcome)
    return outcomes
