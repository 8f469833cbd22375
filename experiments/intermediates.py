"""In how many graphs does a pruned graph show the concepts that a prompt's answer must be worked out from?

    python experiments/intermediates.py                      # the table in README.md
    python experiments/intermediates.py --small              # a few prompts, to see that everything runs
    python experiments/intermediates.py --json found.json    # every figure, unrounded

Expected, on held-out prompts and with features judged on others: where a task has to know it, groups of at most 16
features say a city's state in two prompts of three, a sum's carry in 88%, its ones and tens to within 1 in 92% and 82%;
with permuted values none does. Who gives and what came earlier (ioi, induction) shows in no graph.
Cost: 2 minutes on 2 CPU cores that have other work; --small half a minute.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jclt import Graph, Model, UserError, attribute_batch, load_coder, load_model, run
from jclt.coders import Coder
from jclt.world import TASKS, Concept, Example
from jclt.world.measure import pad_prompts

PURITY, SUPPORT, MEMBERS = 0.8, 5, 16
"""Stated before anything was measured: of the other prompts in which a feature or group fires, at least 5, at least 80%
have the value that it is then called selective for; a group has at most 16 features."""
ODDS = 2
"""Firing of each member alone makes the value's odds at least so many times what they were."""
NEAR = ("ones", "tens", "index")
"""Numbers, of which it is also asked whether they are known to within 1."""

# ---------------------------------------------------------------- when features fire


def intermediates(example: Example) -> dict[str, Concept]:
    """What follows from the prompt and is not the answer."""
    return {c.name: c for c in example.concepts if c.parents and c.name != "answer"}


def last_places(model: Model, coder: Coder, examples: Sequence[Example]) -> np.ndarray:
    """The last position `[N, l F]` at which each feature fires in each prompt, -1 where it does not."""
    own, found = coder.config, []
    tokens, ends = pad_prompts(model, [example.prompt for example in examples])
    positions = np.arange(tokens.shape[1])
    for numbers in np.array_split(np.arange(len(tokens)), -(-len(tokens) // 256)):
        seen = run(model, tokens[numbers], capture=(own.reads,))[1][own.reads]
        fires = [np.asarray(coder.encode(i, seen[layer])) > 0 for i, layer in enumerate(own.covered)]
        within = (positions <= ends[numbers, None])[:, :, None]
        places = [np.where(f & within, positions[:, None], -1).max(axis=1) for f in fires]
        found.append(np.concatenate(places, axis=1).astype(np.int16))
    return np.concatenate(found)


# ---------------------------------------------------------------- which features are selective


class Known(NamedTuple):
    """Prompts other than those tested, for one concept."""

    examples: list[Example]
    values: np.ndarray  # [R]
    fires: np.ndarray  # [R, l F], at or after the position from which the concept can be known


def known(examples: Sequence[Example], places: np.ndarray, name: str) -> Known:
    having = [i for i, example in enumerate(examples) if name in intermediates(example)]
    concepts = [intermediates(examples[i])[name] for i in having]
    starts = np.array([concept.position for concept in concepts])
    values = np.array([concept.value for concept in concepts])
    return Known([examples[i] for i in having], values, places[having] >= starts[:, None])


def apart(among: Known, example: Example, name: str) -> np.ndarray:
    """The prompts that share with the tested one neither what the concept follows from, nor the answer, nor all else
    that the answer follows from: features of just these have nothing to fire on. Where the answer follows from the
    concept alone, only the first counts."""

    def keys(e: Example) -> list[object]:
        values = {c.name: c.value for c in e.concepts}
        before = [values[parent] for parent in intermediates(e)[name].parents]
        beside = [values[parent] for parent in e.concepts[-1].parents if parent != name]
        return [before, beside, e.answers] if beside else [before]

    mine = keys(example)
    return np.array([all(a != b for a, b in zip(keys(e), mine, strict=True)) for e in among.examples])


def accepted(name: str, value: str, near: bool) -> list[str]:
    """The values that count as this one."""
    numbers = [int(value) + step for step in (-1, 0, 1)] if near else []
    return [f"{number % 10 if name == 'ones' else number}" for number in numbers] or [value]


def pure(fires: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Which columns of `fires` are selective for what the rows `right` have in common."""
    count = fires.sum(axis=0)
    return (count >= SUPPORT) & (right @ fires >= PURITY * count)


def selective_group(fires: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Which features say the value together: those most correlated with it, firing when at least m of them do, m as
    small as purity allows. Members and m come from every second prompt; on the others the group must be pure."""
    count = len(right[::2])
    rate, share, joint = fires[::2].mean(axis=0), right[::2].mean(), right[::2] @ fires[::2] / count
    correlation = (joint - rate * share) / np.sqrt(np.maximum(rate * (1 - rate) * share * (1 - share), 1e-9))
    telling = (rate * count >= SUPPORT) & (joint * (1 - share) >= ODDS * (rate - joint) * share)
    members = [i for i in np.argsort(-correlation, kind="stable") if telling[i]][:MEMBERS]
    enough = (fires[:, members].sum(axis=1)[:, None] > np.arange(len(members))).astype(np.float32)
    fitted, checked = pure(enough[::2], right[::2]), pure(enough[1::2], right[1::2])
    good = fitted.any() and checked[fitted.argmax()]
    return np.array(members if good else [], int)


# ---------------------------------------------------------------- what the graphs hold


class Held(NamedTuple):
    """The features that pruning leaves in a graph: their nodes, columns of `Known.fires`, and positions."""

    graph: Graph
    nodes: np.ndarray
    columns: np.ndarray
    positions: np.ndarray


def held(coder: Coder, graph: Graph) -> Held:
    nodes = np.flatnonzero(graph.masks().nodes[: len(graph.features)])
    layers, positions, features = graph.features[nodes].T
    columns = np.searchsorted(coder.config.covered, layers) * coder.config.features + features
    return Held(graph, nodes, columns, positions)


def through(graph: Graph, nodes: np.ndarray) -> float:
    """The share of the walks from the outputs, in the whole graph, that come to at least one of the nodes: there they
    end, so that each is counted once."""
    adjacency = graph.adjacency.copy()
    adjacency[nodes] = 0
    first = replace(graph, adjacency=adjacency).influence[nodes].sum()
    return float(first / graph.output_weights.sum())


class Finding(NamedTuple):
    """Of one prompt and value: whether its graph holds a selective feature, a selective group, and the shares of walks
    through them and through as many other features; 0 where there are none."""

    base: float  # how many of the other prompts have the value
    feature: float
    group: float
    feature_walks: float
    group_walks: float
    drawn_walks: float


def finding(own: Held, start: int, fires: np.ndarray, right: np.ndarray, random: np.random.Generator) -> Finding:
    columns = np.unique(own.columns[own.positions >= start])
    fires, right = fires[:, columns].astype(np.float32), right.astype(np.float32)

    def nodes(chosen: np.ndarray) -> np.ndarray:
        return own.nodes[(own.positions >= start) & np.isin(own.columns, chosen)]

    singles = [nodes(column) for column in columns[pure(fires, right)]]
    group = nodes(columns[selective_group(fires, right)])
    drawn = random.permutation(np.setdiff1d(own.nodes, group))[: len(group)]
    best = max([0.0, *(through(own.graph, single) for single in singles)])
    walks = best, through(own.graph, group), through(own.graph, drawn)
    return Finding(float(right.mean()), float(len(singles) > 0), float(len(group) > 0), *walks)


# ---------------------------------------------------------------- the table


def row(task: str, name: str, near: bool, among: Known, tested: Sequence[tuple[Example, Held]]) -> dict[str, Any]:
    """The means over the prompts; beside them those for a value that the prompt does not have, and those with the
    other prompts' values permuted."""
    random = np.random.default_rng(0)
    permuted = random.permutation(among.values)
    found: list[list[Finding]] = []
    for example, graph in tested:
        concept, rows = intermediates(example)[name], apart(among, example, name)
        values = accepted(name, concept.value, near)
        far = [value for value in set(among.values) if set(values).isdisjoint(accepted(name, value, near))]
        other = accepted(name, random.choice(among.values[np.isin(among.values, far)]), near)
        labels = ((among.values, values), (among.values, other), (permuted, values))
        rights = [np.isin(of, wanted)[rows] for of, wanted in labels]
        found.append([finding(graph, concept.position, among.fires[rows], right, random) for right in rights])
    true, other, mixed = (Finding(*figures) for figures in np.mean(found, axis=0).tolist())
    return {
        **{"task": task, "concept": name + ", within 1" * near, "prompts": len(tested), "base": true.base},
        **{"feature": true.feature, "feature_other": other.feature, "feature_permuted": mixed.feature},
        **{"group": true.group, "group_other": other.group, "group_permuted": mixed.group},
        **{"feature_walks": true.feature_walks, "group_walks": true.group_walks, "drawn_walks": true.drawn_walks},
    }


def rows_of(model: Model, coder: Coder, task: str, others: int, count: int) -> Iterator[dict[str, Any]]:
    tested = TASKS[task].examples("report", count, seed=0)
    names = list(dict.fromkeys(name for example in tested for name in intermediates(example)))
    if not names:  # athlete and greater_than: the answer follows from the prompt at once
        return
    examples = TASKS[task].examples("train", others, seed=1)
    places = last_places(model, coder, examples)
    graphs = attribute_batch(model, coder, [example.prompt for example in tested])
    pairs = [(example, held(coder, graph)) for example, graph in zip(tested, graphs, strict=True)]
    for name in names:
        among = known(examples, places, name)
        having = [(example, graph) for example, graph in pairs if name in intermediates(example)]
        for near in (False, True) if name in NEAR else (False,):
            yield row(task, name, near, among, having)


KINDS = "base | feature | other value | permuted | group | other value | permuted"
HEAD = f"| task | concept | prompts | {KINDS} | walks: feature | group | drawn |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--coder", default="demo")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), metavar="TASK")
    parser.add_argument("--small", action="store_true", help="8 prompts of two tasks")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    count, others = (8, 500) if options.small else (100, 4000)
    tasks = options.tasks or (["addition", "two_hop"] if options.small else list(TASKS))
    model = load_model(options.model)
    coder, start, found = load_coder(options.coder, model=model), time.perf_counter(), []
    print(HEAD, "|---" * (HEAD.count("|") - 1) + "|", sep="\n")
    for task in tasks:
        for made in rows_of(model, coder, task, others, count):
            print(
                "|", " | ".join(f"{x:.0%}" if isinstance(x, float) else str(x) for x in made.values()), "|", flush=True
            )
            found.append(made)
    print(f"{time.perf_counter() - start:.0f} seconds")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as reason:
        sys.exit(str(reason))
