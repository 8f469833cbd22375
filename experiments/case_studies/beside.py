"""What the studies of graphs share: the coders that are compared, prompts of every task, and their graphs."""

from collections.abc import Sequence
from functools import cache

import numpy as np
from common import load
from report import PROMPTS, SEEDS

import jclt
from jclt.coders import Coder
from jclt.evaluation import threshold_neurons
from jclt.evaluation.questions import THRESHOLDED
from jclt.graphs import Graph
from jclt.world import TASKS, Example

CLT, PER_LAYER = "demo", "demo-transcoders"
NAMES = {CLT: "CLT", PER_LAYER: "per-layer transcoders", THRESHOLDED: "neurons above a threshold"}
COLORS = {CLT: "#2a6fb0", PER_LAYER: "#c8553d", THRESHOLDED: "#6b8e23"}


@cache
def load_named(name: str) -> Coder:
    """One of `NAMES`. As many neurons are above the threshold as features of the CLT are active."""
    model, clt = load()
    if name == THRESHOLDED:
        return threshold_neurons(model, clt, encode(draw_prompts(SEEDS[0], 33)))
    return clt if name == CLT else jclt.load_coder(name, model=model)


@cache
def draw_prompts(seed: int, count: int) -> tuple[Example, ...]:
    """Held-out prompts of all tasks in turn."""
    each = -(-count // len(TASKS))
    examples = [task.examples("report", each, seed) for task in TASKS.values()]
    turns = [of_task[turn] for turn in range(each) for of_task in examples if turn < len(of_task)]
    return tuple(turns[:count])


def encode(examples: Sequence[Example]) -> list[np.ndarray]:
    model, _ = load()
    return [np.asarray(model.encode(example.prompt), np.int32) for example in examples]


@cache
def make_graphs(name: str, seed: int, count: int) -> list[Graph]:
    return attribute_seeds(name, SEEDS if seed in SEEDS else (seed,), count)[seed]


@cache
def attribute_seeds(name: str, seeds: tuple[int, ...], count: int) -> dict[int, list[Graph]]:
    """All at once: prompts of similar length then share one program."""
    prompts = encode([example for seed in seeds for example in draw_prompts(seed, count)])
    graphs = jclt.attribute_batch(load()[0], load_named(name), prompts, batch=len(prompts))
    return {seed: [graphs.pop(0) for _ in draw_prompts(seed, count)] for seed in seeds}


def make_first_graphs(name: str) -> list[Graph]:
    """Of one prompt of each task."""
    return make_graphs(name, SEEDS[0], PROMPTS)[: len(TASKS)]


def show_first(task: str) -> Graph:
    """The pruned graph of a task's first prompt."""
    return jclt.attribute(*load(), TASKS[task].examples("report", 1, 0)[0].prompt).prune()
