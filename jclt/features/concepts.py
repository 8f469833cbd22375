"""Labels from the known concepts of the small world: `state = Colorado`, `ones is one of 4, 5`.

A label is a statement of `statements.py`, or the same of several values. It is pure if most of the feature's activation
is where it holds.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse

from jclt.coders import Coder
from jclt.errors import UserError
from jclt.features.labels import LONGEST_LABEL, Label, Labels
from jclt.features.statements import GENERAL, Statement, list_statements
from jclt.models import Model, read_sites
from jclt.shapes import Array, Bool, Float, Int
from jclt.world import TASKS, Example, Split, build_tokenizer
from jclt.world.measure import pad_prompts

BATCH_PROMPTS = 256
LEAST_PURITY = 0.85
"""On the prompts that explain, so that 0.8 is likely on others."""
PURE = 0.8
"""On prompts that chose nothing: labels that are less pure are not kept."""
PROMPTS = 300
"""Prompts of each task, and of each of its splits."""
LEAST_PROMPTS = 5
"""Prompts in which a feature fires where its label holds; with fewer there is no label."""
MOST_VALUES, MOST_TASKS = 4, 2
LARGEST_SHARE = 0.5
"""Of the prompts that have a concept, no more may have one of the label's values: else it would say nothing."""


class Activations(NamedTuple):
    """Where features fire in prompts. Place n of the N is a position of a prompt."""

    prompt: Int[np.ndarray, "N"]
    values: list[scipy.sparse.csc_array]  # [N, F] by covered layer


def read_activations(model: Model, coder: Coder, examples: Sequence[Example]) -> Activations:
    """Positions that the coder leaves to the model are left out, and <bos>."""
    prompts, parts = list[np.ndarray](), [list[scipy.sparse.csr_array]() for _ in coder.config.covered]
    for rows, inside, layers in run_prompts(model, coder, examples):
        prompts.append(rows[np.nonzero(inside)[0]])
        for part, (encoder, seen) in zip(parts, layers, strict=True):
            activations = np.asarray(encoder.encode(0, seen), np.float32)
            part.append(scipy.sparse.csr_array(np.maximum(activations[inside], 0)))
    return Activations(np.concatenate(prompts), [scipy.sparse.csc_array(scipy.sparse.vstack(part)) for part in parts])


def run_prompts(
    model: Model, coder: Coder, examples: Sequence[Example]
) -> Iterator[tuple[Int[np.ndarray, "B"], Bool[np.ndarray, "B T"], list[tuple[Coder, Float[Array, "B T D"]]]]]:
    """For each batch the numbers of its prompts, the positions that count, and each covered layer's encoder with what
    it reads. Rows without a prompt repeat the last one; none of their positions counts."""
    tokens, ends = pad_prompts(model, [example.prompt for example in examples])
    encoders = [coder.load_encoder(index) for index in range(len(coder.config.covered))]
    positions, size = np.arange(tokens.shape[1]), min(BATCH_PROMPTS, len(tokens))
    for start in range(0, len(tokens), size):
        rows = np.minimum(np.arange(start, start + size), len(tokens) - 1)  # one shape, one program
        new = (np.arange(start, start + size) < len(tokens))[:, None]
        inside = new & (positions <= ends[rows, None]) & (positions >= max(1, coder.config.first_position))
        seen = read_sites(model, tokens[rows], coder.config.reads, coder.config.covered)
        yield rows, inside, list(zip(encoders, seen, strict=True))


class Truth(NamedTuple):
    """Which statements hold where."""

    statements: list[Statement]
    families: dict[str, Int[np.ndarray, "m"]]  # the numbers of the statements with this name
    holds: scipy.sparse.csc_array  # [statements, places]
    prompts: scipy.sparse.csr_array  # [statements, prompts]: holds at any of its places


def find_truth(model: Model, coder: Coder, examples: Sequence[Example]) -> Truth:
    """For the places of `read_activations`."""
    first, start = max(1, coder.config.first_position), 0
    places, prompts = defaultdict[Statement, list[int]](list), defaultdict[Statement, set[int]](set)
    for number, example in enumerate(examples):
        last = len(model.encode(example.prompt)) - 1
        for statement, positions in list_statements(example, last):
            inside = [start + p - first for p in positions if p >= first]
            places[statement] += inside
            if inside:
                prompts[statement].add(number)
        start += max(0, last + 1 - first)
    statements = [statement for statement in places if places[statement]]
    families = defaultdict[str, list[int]](list)
    for number, (name, _) in enumerate(statements):
        families[name].append(number)
    holds = _make_matrix([sorted(set(places[s])) for s in statements], start)
    of_prompts = _make_matrix([sorted(prompts[s]) for s in statements], len(examples))
    return Truth(statements, {name: np.array(ids) for name, ids in families.items()}, holds.tocsc(), of_prompts)


def _make_matrix(rows: Sequence[Sequence[int]], width: int) -> scipy.sparse.csr_array:
    ends = np.cumsum([0, *map(len, rows)])
    columns = np.concatenate([np.array(row, np.int64) for row in rows])
    return scipy.sparse.csr_array((np.ones(len(columns), np.float32), columns, ends), shape=(len(rows), width))


class Firing(NamedTuple):
    """One feature: where it fires, how strongly, and the statements that hold there."""

    prompt: Int[np.ndarray, "n"]
    values: Float[np.ndarray, "n"]
    holds: scipy.sparse.csr_array  # [statements, n]


def select_firing(activations: Activations, truth: Truth, layer: int, feature: int) -> Firing:
    column = activations.values[layer]
    inside = slice(column.indptr[feature], column.indptr[feature + 1])
    places = column.indices[inside]
    return Firing(activations.prompt[places], column.data[inside], truth.holds[:, places].tocsr())


class Candidate(NamedTuple):
    name: str
    statements: tuple[int, ...]
    purity: float
    recall: float

    @property
    def rank(self) -> tuple[bool, bool, float]:
        """Concepts first, then what a token is, then tasks; among these what covers more at a higher purity."""
        balance = 2 * self.purity * self.recall / (self.purity + self.recall)
        return self.name not in GENERAL, self.name != "task", balance - 0.02 * len(self.statements)


def list_candidates(firing: Firing, truth: Truth) -> Iterator[Candidate]:
    """The pure statements of each name, of one value and of several: at each step the value is added that takes most of
    the activation that is left."""
    total = firing.values.sum()
    weights = firing.holds @ firing.values
    for name, family in truth.families.items():
        if weights[family].sum() < LEAST_PURITY * total:
            continue
        left, chosen = firing.values.copy(), list[int]()
        for _ in range(min(len(family), MOST_TASKS if name == "task" else MOST_VALUES)):
            gains = firing.holds[family] @ left
            best = int(family[gains.argmax()])
            if gains.max() < 0.02 * total:
                break
            chosen.append(best)
            left[_places_of(firing, [best])] = 0
            candidate = measure_candidate(firing, truth, name, chosen, float(1 - left.sum() / total))
            if candidate is not None:
                yield candidate


def _places_of(firing: Firing, statements: Sequence[int]) -> Int[np.ndarray, "n"]:
    parts = [firing.holds.indices[firing.holds.indptr[s] : firing.holds.indptr[s + 1]] for s in statements]
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.int64)


def measure_candidate(
    firing: Firing, truth: Truth, name: str, statements: Sequence[int], purity: float
) -> Candidate | None:
    """None if it is not pure, rests on too few prompts, or says too little."""
    fired = len(np.unique(firing.prompt[_places_of(firing, statements)]))
    having = truth.prompts[list(statements)].max(axis=0).sum()
    of_name = truth.prompts[truth.families[name]].max(axis=0).sum()
    tells = name in GENERAL or having <= LARGEST_SHARE * of_name
    if purity < LEAST_PURITY or fired < LEAST_PROMPTS or not tells:
        return None
    return Candidate(name, tuple(statements), purity, fired / float(having))


def write_concepts(name: str, values: Sequence[str]) -> str:
    if len(values) == 1:
        return f"{name} = {values[0]}"
    return f"{name} is one of {', '.join(values)}"


def score_statements(firing: Firing, truth: Truth, statements: Sequence[Statement], prompts: int) -> dict[str, float]:
    """On prompts that chose nothing. `purity` is the share of the activation where the label holds; `pure_firings` the
    same of firings, weak ones included; `detection` the balanced accuracy of "it fires in this prompt" by "the label
    holds in this prompt". Nothing if it fires in too few prompts."""
    known = {statement: number for number, statement in enumerate(truth.statements)}
    ids = [known[statement] for statement in statements if statement in known]
    fires = np.zeros(prompts, bool)
    fires[firing.prompt] = True
    if not LEAST_PROMPTS <= fires.sum() < prompts:
        return {}
    right, holds = _places_of(firing, ids), np.zeros(prompts, bool)
    if ids:
        holds = np.asarray(truth.prompts[ids].max(axis=0).todense(), bool).reshape(-1)
    return {
        "purity": float(firing.values[right].sum() / firing.values.sum()),
        "pure_firings": len(right) / len(firing.values),
        "detection": float(holds[fires].mean() + (~holds[~fires]).mean()) / 2,
    }


def draw_examples(count: int = PROMPTS) -> tuple[list[Example], list[Example]]:
    """Prompts of all tasks to explain with, and others to judge by, half of them of the split that is in no corpus."""

    def draw(split: Split, seed: int) -> list[Example]:
        return [example for task in TASKS.values() for example in task.examples(split, count, seed)]

    return draw("train", 1), [*draw("report", 0), *draw("train", 2)]


def check_world(model: Model) -> None:
    """An error unless the model reads the small world's text."""
    known = set() if model.tokenizer is None else set(model.tokenizer.backend.get_vocab())
    if len(missing := set(build_tokenizer().get_vocab()) - known):
        some = ", ".join(map(repr, sorted(missing)[:3]))
        raise UserError(f"model {model.name}: has no tokens {some} ..., expected a model of the small world")


def label_by_concepts(
    model: Model, coder: Coder, explaining: Sequence[Example], held_out: Sequence[Example], seed: int = 0
) -> Labels:
    """The best label of each feature that has one, chosen on the explaining prompts and scored on the others. The score
    `shuffled` is the purity of another feature's label, drawn among those of its layer."""
    seen = {example.prompt for example in explaining}
    held_out = [example for example in held_out if example.prompt not in seen]
    chosen: dict[tuple[int, int], list[Statement]] = {}
    activations, truth = read_activations(model, coder, explaining), find_truth(model, coder, explaining)
    for layer in range(len(coder.config.covered)):
        for feature in range(coder.config.features):
            firing = select_firing(activations, truth, layer, feature)
            if len(firing.values) and (candidates := list(list_candidates(firing, truth))):
                best = max(candidates, key=lambda candidate: candidate.rank)
                chosen[layer, feature] = [truth.statements[number] for number in best.statements]
    activations, truth = read_activations(model, coder, held_out), find_truth(model, coder, held_out)
    random, labels = np.random.default_rng(seed), Labels()
    for layer, number in enumerate(coder.config.covered):
        features = [feature for index, feature in chosen if index == layer]
        others = dict(zip(features, random.permutation(features).tolist(), strict=True))
        for feature in features:
            firing = select_firing(activations, truth, layer, feature)
            statements = chosen[layer, feature]
            text = write_concepts(statements[0][0], [value for _, value in statements])
            scores = score_statements(firing, truth, statements, len(held_out))
            if scores:
                other = score_statements(firing, truth, chosen[layer, others[feature]], len(held_out))
                scores["shuffled"] = other["purity"]
            if len(text) <= LONGEST_LABEL:
                labels[number, feature] = Label(text, "concepts", scores)
    return labels
