"""Faithfulness by depth: do influences say what ablations do, one, two and three layers further on?

    python experiments/case_studies/depth.py

Prompts of all tasks. Each feature of a graph is set to zero in the true model, attention and norms frozen, written in
its layer and the next two (`jclt/evaluation/faithfulness.py`). A claim is the rank correlation, over the pairs of a
prompt, of the influence on a later feature and the share by which it changes, by the number of layers between them; or,
over the features of a layer, of the influence on the outputs and the change of their logits. The control is a
permutation of the effects. Beside the claims: the same of per-layer transcoders, and how far from a push between two
layers the local replacement model goes the model's way, with the control of MLPs that do not react (`distances.py`).
Expected: see README.md. Cost: two minutes on two CPU cores, mostly to compile; in all.py graphs are made once.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from beside import CLT, COLORS, NAMES, PER_LAYER, draw_prompts, encode, load_named, make_graphs, show_first
from common import Outcome, Outcomes, load
from report import PROMPTS, SEEDS, Claim, Study, main

from jclt.evaluation import measure_distances
from jclt.evaluation.faithfulness import find_later, find_outputs, measure_ablations, predict_ablations
from jclt.evaluation.intervals import average_prompts, correlate_ranks
from jclt.graphs import Graph

OWN, NEXT_TWO = 1, 3
"""Layers in which an ablated feature is written."""


class Effects(NamedTuple):
    """Of one prompt: what the graph says and what the ablations do."""

    influence: np.ndarray  # [g] on the outputs
    changes: np.ndarray  # [g] of the outputs' logits, by their weights
    source_layers: np.ndarray  # [g]
    on_features: np.ndarray  # [g n]
    feature_changes: np.ndarray  # [g n], as shares of the activations
    distances: np.ndarray  # [g n], in layers; 0 where the target is not after the source


def ablate_features(name: str, graph: Graph, clamped: int) -> Effects:
    said = predict_ablations(graph)
    found = measure_ablations(load()[0], load_named(name), graph, said.sources, clamped=clamped)
    weights, before = graph.output_weights[find_outputs(graph)], found.original_activations
    layers = graph.features[:, 0]
    distances = np.where(find_later(graph, said.sources), layers - layers[said.sources, None], 0)
    changes = np.abs(found.activations - before) / np.where(before != 0, np.abs(before), np.inf)
    effects = np.abs(found.effects) @ weights
    return Effects(said.influence, effects, layers[said.sources], said.on_features, changes, distances)


def correlate_by_depth(effects: Effects, random: np.random.Generator) -> dict[str, Outcome]:
    """NaN where a prompt has fewer than ten pairs, or five features."""
    found = {}
    for distance in (1, 2, 3):
        pairs = effects.distances == distance
        claim = f"to features {distance} layer{'s' * (distance > 1)} later; permuted"
        found[claim] = correlate(effects.on_features[pairs], effects.feature_changes[pairs], 10, random)
    for layer in range(4):
        own = effects.source_layers == layer
        claim = f"to the outputs, from layer {layer}; permuted"
        found[claim] = correlate(effects.influence[own], effects.changes[own], 5, random)
    return found


def correlate(said: np.ndarray, found: np.ndarray, least: int, random: np.random.Generator) -> Outcome:
    if len(said) < least:
        return Outcome(float("nan"), float("nan"))
    return Outcome(correlate_ranks(said, found), correlate_ranks(said, random.permutation(found)))


def measure_coder(name: str, seed: int, count: int, clamped: int = NEXT_TWO) -> Outcomes:
    random = np.random.default_rng(seed)
    graphs = [graph for graph in make_graphs(name, seed, count) if len(graph.features) > 1]
    found = [correlate_by_depth(ablate_features(name, graph, clamped), random) for graph in graphs]
    return {claim: [outcomes[claim] for outcomes in found if not np.isnan(outcomes[claim]).any()] for claim in found[0]}


def measure(seed: int, count: int) -> Outcomes:
    return measure_coder(CLT, seed, count)


def write_details(folder: Path) -> str:
    """The correlations of both coders, and the pushes; as a table and as a picture."""
    variants = {f"{NAMES[CLT]}, paper's way": (CLT, NEXT_TWO)}
    variants |= {f"{NAMES[name]}, own layer": (name, OWN) for name in (CLT, PER_LAYER)}
    found = {label: measure_coder(name, SEEDS[0], PROMPTS, layers) for label, (name, layers) in variants.items()}
    lines = [f"{'rank correlation':38}" + "".join(f"{label:>34}" for label in found)]
    for claim in next(iter(found.values())):
        values = [average_prompts([ours for ours, _ in outcomes[claim]]) for outcomes in found.values()]
        lines.append(f"{claim.split(';')[0]:38}" + "".join(f"{value!s:>34}" for value in values))
    prompts = encode(draw_prompts(SEEDS[0], PROMPTS))
    pushes = {name: measure_distances(load()[0], load_named(name), prompts) for name in (CLT, PER_LAYER)}
    lines += ["", f"{'local replacement model':38}" + "".join(f"{NAMES[x]:>34}{'MLPs fixed':>12}" for x in pushes)]
    for key in pushes[CLT]:
        values = [of_coder[key] for of_coder in pushes.values()]
        lines.append(f"{key:38}" + "".join(f"{value!s:>34}{value.control or 0:12.3f}" for value in values))
    draw(found, pushes, folder / "depth.png")
    return "\n".join(lines)


def draw(found: dict[str, Outcomes], pushes: dict[str, dict], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    distances = (1, 2, 3)
    for label, outcomes in found.items():
        claims = [claim for claim in outcomes if claim.startswith("to features")]
        values = [np.mean([ours for ours, _ in outcomes[claim]]) for claim in claims]
        color = COLORS[PER_LAYER if label.startswith(NAMES[PER_LAYER]) else CLT]
        left.plot(distances, values, "o-" if "own" in label else "s--", color=color, label=label)
    left.axhline(0.72, color="k", ls=":", label="paper")
    left.set_title("rank correlation of influence and ablation", fontsize=9)
    left.set_ylim(0.5, 1)
    left.legend(frameon=False, fontsize=7)
    for axes, what in ((middle, "cosine"), (right, "error")):
        for kind, line in (("encoder", "-"), ("random", "--"), ("upstream", ":")):
            for name, figures in pushes.items():
                keys = [f"{kind}, {d} layer{'s' * (d > 1)} later: {what}" for d in distances]
                label = f"{NAMES[name]}, {kind}"
                axes.plot(distances, [figures[key].value for key in keys], f"o{line}", color=COLORS[name], label=label)
        axes.set_title(f"local replacement model and model: {what}", fontsize=9)
    right.set_yscale("log")
    middle.legend(frameon=False, fontsize=7)
    for axes in (left, middle, right):
        axes.set(xlabel="layers later", xticks=distances)
    figure.savefig(path)
    plt.close(figure)


def show() -> Graph:
    return show_first("addition")


STUDY = Study(
    "depth",
    (
        Claim("to features 1 layer later; permuted", "0.72, all distances", 0.72, 0.1),
        Claim("to features 2 layers later; permuted", "″", 0.72, 0.1),
        Claim("to features 3 layers later; permuted", "″", 0.72, 0.1),
        Claim("to the outputs, from layer 0; permuted", "in a figure only", 0.75, 0.2),
        *(Claim(f"to the outputs, from layer {layer}; permuted", "in a figure only", 0.85, 0.2) for layer in (1, 2, 3)),
    ),
    measure,
    show,
    write_details,
)

if __name__ == "__main__":
    main(STUDY)
