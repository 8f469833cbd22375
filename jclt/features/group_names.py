"""Names of supernodes from the known concepts of the small world: `state = Colorado` where members say it together.

A value that the model works out is mostly shared by several features, each of which also means other things. A group
fires in a prompt if at least three quarters of its members do, as strongly as the weakest of these, in units of the
activations in the graph. On other prompts of the same task: which statement that is true of the graph's prompt best
tells in which of them the group fires? On yet other prompts its purity is measured, beside random groups.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from jclt.coders import Coder
from jclt.features.concepts import LARGEST_SHARE, LEAST_PROMPTS, LEAST_PURITY, PURE, run_prompts, write_concepts
from jclt.features.statements import GENERAL, Statement, list_statements
from jclt.graphs import Graph, Supernode
from jclt.graphs.names import name_apart
from jclt.models import Model
from jclt.shapes import Array, Bool, Float
from jclt.world import TASKS, Example
from jclt.world.example import last_position

LEAST_MEMBERS = 0.75
"""The share of a group's members that fire where the group does."""
RANDOM_GROUPS = 20
EXPLAINING, HELD_OUT = 100, 60
"""Prompts of each task, and of each of its splits."""


class KnownPrompts(NamedTuple):
    """Prompts of one task: what is true of each, and the strongest activation of each feature in it."""

    true: list[set[Statement]]
    strongest: Float[np.ndarray, "n L F"]


def draw_prompts(task: str, without: str) -> tuple[list[Example], list[Example]]:
    """Examples of the task to explain with, and others to judge by, half of them of the split that the model never saw;
    without a prompt."""
    explaining = [x for x in TASKS[task].examples("train", EXPLAINING, seed=1) if x.prompt != without]
    seen = {without, *(example.prompt for example in explaining)}
    others = [*TASKS[task].examples("report", HELD_OUT, seed=0), *TASKS[task].examples("train", HELD_OUT, seed=2)]
    return explaining, [example for example in others if example.prompt not in seen]


def read_known_prompts(model: Model, coder: Coder, groups: Sequence[Sequence[Example]]) -> list[KnownPrompts]:
    """In one pass over the prompts of all groups."""
    examples = [example for group in groups for example in group]
    strongest = np.zeros((len(examples), len(coder.config.covered), coder.config.features), np.float32)
    for rows, inside, layers in run_prompts(model, coder, examples):
        found = [find_strongest(encoder, seen, jnp.asarray(inside)) for encoder, seen in layers]
        counted = inside.any(axis=1)
        strongest[rows[counted]] = np.stack(found, axis=1)[counted]
    ends = np.cumsum([len(group) for group in groups])
    true = [[set(list_known(example, last_position(example.prompt))) for example in group] for group in groups]
    return list(map(KnownPrompts, true, np.split(strongest, ends[:-1])))


@eqx.filter_jit
def find_strongest(encoder: Coder, x: Float[Array, "B T D"], inside: Bool[Array, "B T"]) -> Float[Array, "B F"]:
    return jnp.max(jnp.where(inside[..., None], encoder.encode(0, x).astype(jnp.float32), 0.0), axis=1)


def name_by_concepts(
    coder: Coder,
    graph: Graph,
    supernodes: Sequence[Supernode],
    example: Example,
    explaining: KnownPrompts,
    held_out: KnownPrompts,
    *,
    seed: int = 0,
) -> list[Supernode]:
    """The supernodes of an example's graph, with other names where one is pure, and its scores.

    purity      the share of the group's strength in prompts of which the statement is true
    detection   the balanced accuracy of "it fires in this prompt" by "the statement is true of it"
    random      the share of random groups of active features at the same layers and positions that are as pure
    """
    random, named = np.random.default_rng(seed), list[Supernode]()
    units = list_units(coder, graph)
    for group in supernodes:
        members = [units[place] for place in group.features]
        known = list_known(example, min(position for _, position, _ in group.features))
        statement = choose_statement(explaining, members, known)
        scores = statement and score_name(held_out, members, statement)
        if not statement or not scores or scores["purity"] < PURE:
            named.append(group)
            continue
        drawn = [draw_group(list(units), group, random) for _ in range(RANDOM_GROUPS)]
        others = [score_name(held_out, [units[place] for place in places], statement) for places in drawn]
        as_pure = np.mean([other.get("purity", 0) >= scores["purity"] for other in others])
        name = write_concepts(statement[0], [statement[1]])
        named.append(group._replace(name=name, scores={**scores, "random": float(as_pure)}))
    names = name_apart([group.name for group in named])
    return [group._replace(name=name) for group, name in zip(named, names, strict=True)]


def list_known(example: Example, position: int) -> list[Statement]:
    """The concepts that can be known at a position of the prompt, with their values."""
    statements = list_statements(example, last_position(example.prompt))
    return [statement for statement, places in statements if statement[0] not in GENERAL and places.start <= position]


Unit = tuple[int, int, float]
"""The index of a covered layer, a feature's number, and its activation in the graph."""


def list_units(coder: Coder, graph: Graph) -> dict[tuple[int, int, int], Unit]:
    """By layer, position and feature."""
    places = map(tuple, graph.features.tolist())
    return {
        (layer, position, number): (coder.config.covered.index(layer), number, value)
        for (layer, position, number), value in zip(places, graph.activations.tolist(), strict=True)
    }


def measure_strength(prompts: KnownPrompts, members: Sequence[Unit]) -> Float[np.ndarray, "n"]:
    """How strongly a group fires in each prompt; 0 where it does not."""
    shares = np.stack([prompts.strongest[:, layer, number] / value for layer, number, value in members], axis=1)
    return np.sort(shares, axis=1)[:, -math.ceil(LEAST_MEMBERS * len(members))]


def choose_statement(prompts: KnownPrompts, members: Sequence[Unit], known: Sequence[Statement]) -> Statement | None:
    """The pure statement that covers most at the highest purity; None if none is pure, rests on enough prompts and is
    false of enough others."""
    strength, ranks = measure_strength(prompts, members), dict[Statement, float]()
    for statement in dict.fromkeys(known):
        holds = find_holding(prompts, statement)
        right = (strength > 0) & holds
        if right.sum() < LEAST_PROMPTS or holds.mean() > LARGEST_SHARE:
            continue
        purity, recall = float(strength[holds].sum() / strength.sum()), right.sum() / holds.sum()
        if purity >= LEAST_PURITY:
            ranks[statement] = 2 * purity * recall / (purity + recall)
    return max(ranks, key=lambda statement: ranks[statement], default=None)


def find_holding(prompts: KnownPrompts, statement: Statement) -> Bool[np.ndarray, "n"]:
    """Of which prompts the statement is true."""
    return np.array([statement in true for true in prompts.true], bool)


def score_name(prompts: KnownPrompts, members: Sequence[Unit], statement: Statement) -> dict[str, float]:
    """Nothing if the group fires in too few prompts, or in all."""
    if not members:
        return {}
    strength, holds = measure_strength(prompts, members), find_holding(prompts, statement)
    fires = strength > 0
    if not LEAST_PROMPTS <= fires.sum() < len(fires):
        return {}
    return {
        "purity": float(strength[holds].sum() / strength.sum()),
        "detection": float(holds[fires].mean() + (~holds[~fires]).mean()) / 2,
    }


def draw_group(
    places: Sequence[tuple[int, int, int]], group: Supernode, random: np.random.Generator
) -> list[tuple[int, int, int]]:
    """Other active features, as many of each layer and position as the group has, where there are as many."""
    drawn = list[tuple[int, int, int]]()
    for layer, position in dict.fromkeys((layer, position) for layer, position, _ in group.features):
        wanted = [place[:2] for place in group.features].count((layer, position))
        others = [x for x in places if x[:2] == (layer, position) and x not in group.features]
        drawn += [others[i] for i in random.permutation(len(others))[:wanted].tolist()]
    return drawn
