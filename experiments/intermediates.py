"""How many pruned graphs show the intermediate concepts from which the prompt's answer follows?

    python experiments/intermediates.py                      # the table in README.md
    python experiments/intermediates.py --small              # a few prompts, to see that everything runs
    python experiments/intermediates.py --json found.json    # every figure, unrounded

Expected on held-out prompts, with features that were selected on other prompts: where a task needs the concept, groups
of at most 16 features show a city's state in 98%, the letters of an acronym in 95%, 82% and 90%, a sum's carry in 87%,
its ones and tens to within 1 in 92% and 92%; with permuted values none. No graph shows who gives (ioi) or what came
earlier (induction).
Cost: 5 minutes on one CPU core; --small half a minute on two.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jclt import Graph, Model, UserError, attribute_batch, load_coder, load_model, run
from jclt.coders import Coder
from jclt.world import TASKS, Concept, Example, Split
from jclt.world.measure import pad_prompts

PURITY, SUPPORT, MEMBERS = 0.8, 5, 16
"""Chosen before the first measurement. A feature or group is selective for a value if it fires in at least 5 of the
other prompts, and at least 80% of these have the value. A group has at most 16 features."""
ODDS = 2
"""If a member of a group fires, the odds of the value are at least this many times as high."""
NEAR = ("ones", "tens", "index")
"""Numbers. For these, values within 1 are counted too."""

# ---------------------------------------------------------------- when features fire


def intermediates(example: Example) -> dict[str, Concept]:
    """The concepts that follow from the prompt, without the answer, by name."""
    return {c.name: c for c in example.concepts if c.parents and c.name != "answer"}


def select_having(examples: Sequence[Example], name: str) -> tuple[list[Example], np.ndarray, np.ndarray]:
    """The examples that have a concept, its value in each, and the position where it begins."""
    having = [example for example in examples if name in intermediates(example)]
    concepts = [intermediates(example)[name] for example in having]
    return having, np.array([c.value for c in concepts]), np.array([c.position for c in concepts])


def run_in_parts(
    model: Model, tokens: np.ndarray, sites: tuple[str, ...]
) -> Iterator[tuple[np.ndarray, Mapping[str, Any]]]:
    """The values at some sites, for 256 prompts at a time, with the numbers of these."""
    for numbers in np.array_split(np.arange(len(tokens)), -(-len(tokens) // 256)):
        yield numbers, run(model, tokens[numbers], capture=sites)[1]


def find_firings(model: Model, coder: Coder, examples: Sequence[Example], starts: np.ndarray) -> np.ndarray:
    """Which features fire in each prompt at its start, and which after it: `[N, 2 l F]`."""
    config, found = coder.config, []
    tokens, ends = pad_prompts(model, [example.prompt for example in examples])
    positions = np.arange(tokens.shape[1])
    for numbers, seen in run_in_parts(model, tokens, (config.reads,)):
        reads = seen[config.reads]
        fires = [np.asarray(coder.encode(i, reads[layer])) > 0 for i, layer in enumerate(config.covered)]
        first, last = starts[numbers, None], ends[numbers, None]
        places = positions == first, (positions > first) & (positions <= last)
        found.append(np.concatenate([(f & at[:, :, None]).any(axis=1) for at in places for f in fires], axis=1))
    return np.concatenate(found)


# ---------------------------------------------------------------- which features are selective


class Prompts(NamedTuple):
    """Prompts other than those tested, for one concept."""

    examples: list[Example]
    values: np.ndarray  # [R]
    fires: np.ndarray  # [R, 2 l F], at the position from which the concept can be known, and after it


def select_prompts(model: Model, coder: Coder, examples: Sequence[Example], name: str) -> Prompts:
    having, values, starts = select_having(examples, name)
    return Prompts(having, values, find_firings(model, coder, having, starts))


def find_independent(others: Sequence[Example], example: Example, name: str) -> np.ndarray:
    """Which prompts differ from the tested one in the concept's parents, in the answer, and in the answer's other
    parents: features of these three cannot fire in both. If the answer follows from the concept alone, only the first
    counts."""

    def keys(other: Example) -> list[object]:
        values = {c.name: c.value for c in other.concepts}
        parents = [values[parent] for parent in intermediates(other)[name].parents]
        beside = [values[parent] for parent in other.concepts[-1].parents if parent != name]
        return [parents, beside, other.answers] if beside else [parents]

    of_example = keys(example)
    return np.array([all(a != b for a, b in zip(keys(other), of_example, strict=True)) for other in others])


def list_accepted(name: str, value: str, near: bool) -> list[str]:
    """The values that count as this one."""
    numbers = [int(value) + step for step in (-1, 0, 1)] if near else []
    return [f"{number % 10 if name == 'ones' else number}" for number in numbers] or [value]


def find_pure(fires: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Which columns of `fires` are selective for what the rows `right` have in common."""
    count = fires.sum(axis=0)
    return (count >= SUPPORT) & (right @ fires >= PURITY * count)


def find_selective_group(fires: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The features that show the value together: those most correlated with it. The group fires when at least m of them
    do, with the smallest m that is pure. Members and m come from every second prompt; on the others it must be pure."""
    count = len(right[::2])
    rate, share, joint = fires[::2].mean(axis=0), right[::2].mean(), right[::2] @ fires[::2] / count
    correlation = (joint - rate * share) / np.sqrt(np.maximum(rate * (1 - rate) * share * (1 - share), 1e-9))
    telling = (rate * count >= SUPPORT) & (joint * (1 - share) >= ODDS * (rate - joint) * share)
    members = [i for i in np.argsort(-correlation, kind="stable") if telling[i]][:MEMBERS]
    enough = (fires[:, members].sum(axis=1)[:, None] > np.arange(len(members))).astype(np.float32)
    fitted, checked = find_pure(enough[::2], right[::2]), find_pure(enough[1::2], right[1::2])
    good = fitted.any() and checked[fitted.argmax()]
    return np.array(members if good else [], int)


# ---------------------------------------------------------------- what the graphs show


class KeptFeatures(NamedTuple):
    """The features that pruning leaves in a graph: their nodes, columns among all features, and positions."""

    graph: Graph
    nodes: np.ndarray
    columns: np.ndarray
    positions: np.ndarray


def select_kept_features(coder: Coder, graph: Graph) -> KeptFeatures:
    nodes = np.flatnonzero(graph.masks().nodes[: len(graph.features)])
    layers, positions, features = graph.features[nodes].T
    columns = np.searchsorted(coder.config.covered, layers) * coder.config.features + features
    return KeptFeatures(graph, nodes, columns, positions)


def measure_walks(graph: Graph, nodes: np.ndarray) -> float:
    """The share of the walks from the outputs, in the whole graph, that reach at least one of the nodes. A walk ends at
    the first such node, so that it is counted once."""
    adjacency = np.array(graph.adjacency)
    adjacency[nodes] = 0
    first = replace(graph, adjacency=adjacency).influence[nodes].sum()
    return float(first / graph.output_weights.sum())


class Finding(NamedTuple):
    """For one prompt and value: whether the graph has a selective feature and a selective group, and the shares of
    walks through them and through as many other features (0 if there are none)."""

    base: float  # the share of the other prompts that have the value
    feature: float
    group: float
    feature_walks: float
    group_walks: float
    drawn_walks: float


def measure_prompt(
    pruned: KeptFeatures, start: int, fires: np.ndarray, right: np.ndarray, random: np.random.Generator
) -> Finding:
    known = pruned.positions >= start
    placed = pruned.columns + (pruned.positions > start) * (fires.shape[1] // 2)  # columns of `Prompts.fires`
    columns = np.unique(placed[known])
    fires, right = fires[:, columns].astype(np.float32), right.astype(np.float32)

    def select_nodes(columns_of_group: np.ndarray) -> np.ndarray:
        return pruned.nodes[known & np.isin(placed, columns_of_group)]

    singles = [select_nodes(column) for column in columns[find_pure(fires, right)]]
    group = select_nodes(columns[find_selective_group(fires, right)])
    random_group = random.permutation(np.setdiff1d(pruned.nodes, group))[: len(group)]
    best_walks = max([0.0, *(measure_walks(pruned.graph, single) for single in singles)])
    walks = best_walks, measure_walks(pruned.graph, group), measure_walks(pruned.graph, random_group)
    return Finding(float(right.mean()), float(len(singles) > 0), float(len(group) > 0), *walks)


# ---------------------------------------------------------------- the table


def measure_concept(
    task: str, name: str, near: bool, among: Prompts, tested: Sequence[tuple[Example, KeptFeatures]]
) -> dict[str, Any]:
    """The means over the prompts: for the prompt's value, for a value that the prompt does not have, and with the other
    prompts' values permuted."""
    random = np.random.default_rng(0)
    permuted = random.permutation(among.values)
    findings: list[list[Finding]] = []
    for example, graph in tested:
        concept, rows = intermediates(example)[name], find_independent(among.examples, example, name)
        values = list_accepted(name, concept.value, near)
        other_values = [
            value for value in set(among.values) if set(values).isdisjoint(list_accepted(name, value, near))
        ]
        other = list_accepted(name, random.choice(among.values[np.isin(among.values, other_values)]), near)
        labels = ((among.values, values), (among.values, other), (permuted, values))
        rights = [np.isin(actual, accepted_values)[rows] for actual, accepted_values in labels]
        findings.append([measure_prompt(graph, concept.position, among.fires[rows], right, random) for right in rights])
    true, other, mixed = (Finding(*figures) for figures in np.mean(findings, axis=0).tolist())
    return {
        **{"task": task, "concept": name + ", within 1" * near, "prompts": len(tested), "base": true.base},
        **{"feature": true.feature, "feature_other": other.feature, "feature_permuted": mixed.feature},
        **{"group": true.group, "group_other": other.group, "group_permuted": mixed.group},
        **{"feature_walks": true.feature_walks, "group_walks": true.group_walks, "drawn_walks": true.drawn_walks},
    }


def measure_task(
    model: Model, coder: Coder, task: str, others: int, count: int, split: Split = "report"
) -> Iterator[dict[str, Any]]:
    tested = TASKS[task].examples(split, count, seed=0)
    names = list(dict.fromkeys(name for example in tested for name in intermediates(example)))
    if not names:  # athlete and greater_than: the answer follows from the prompt at once
        return
    examples = TASKS[task].examples("train", others, seed=1)
    graphs = attribute_batch(model, coder, [example.prompt for example in tested])
    pairs = [(example, select_kept_features(coder, graph)) for example, graph in zip(tested, graphs, strict=True)]
    for name in names:
        among = select_prompts(model, coder, examples, name)
        having = [(example, graph) for example, graph in pairs if name in intermediates(example)]
        for near in (False, True) if name in NEAR else (False,):
            yield measure_concept(task, name, near, among, having)


KINDS = "base | feature | other value | permuted | group | other value | permuted"
HEAD = f"| task | concept | prompts | {KINDS} | walks: feature | group | drawn |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--coder", default="demo")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), metavar="TASK")
    parser.add_argument("--split", choices=("choose", "report"), default="report", help="default report")
    parser.add_argument("--small", action="store_true", help="8 prompts of two tasks")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    count, others = (8, 500) if options.small else (100, 4000)
    tasks = options.tasks or (["addition", "two_hop"] if options.small else list(TASKS))
    model = load_model(options.model)
    coder, start, rows = load_coder(options.coder, model=model), time.perf_counter(), []
    print(HEAD, "|---" * (HEAD.count("|") - 1) + "|", sep="\n")
    for task in tasks:
        for cells in measure_task(model, coder, task, others, count, options.split):
            print(
                "|", " | ".join(f"{x:.0%}" if isinstance(x, float) else str(x) for x in cells.values()), "|", flush=True
            )
            rows.append(cells)
    print(f"{time.perf_counter() - start:.0f} seconds")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as reason:
        sys.exit(str(reason))
