"""How many of a graph's claims interventions confirm, and whether the pruned graph is necessary and sufficient.

Claims are about the true model, in which a change is written in its layer and the next two (constrained patching), with
patterns and norms frozen, as in `faithfulness.py`:

    node    the ten features with the most influence: taking one away changes the first output's logit by so much
    edge    the ten edges between features with the most influence: taking the source away changes the target by so much
    supernode    a suggested group: taking it away moves the outputs more than 95% of random groups of the same layers

A node or edge is confirmed if the change has the sign that the graph predicts, and from half to twice its size. The
control predicts what the graph says of another feature of the layer, or of another source of the same target.

Necessity and sufficiency are about the answer's probability p. Features are set to zero in the true model, whose MLPs,
patterns and norms react; what the coder computes in the changed pass is taken away (`reference="current"`):

    necessity      p - p(without the kept features)                  sufficiency   p(without all others) / p

The controls keep as many features, drawn at random, as many of each layer and position as pruning keeps. The worst
choice takes away a part of the others: first those that support the answer most, by the graph; of 1, 2, 4 and so on up
to all of them, it is the number that leaves the answer least probable.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jclt.coders import Coder
from jclt.errors import UserError
from jclt.evaluation.faithfulness import (
    MOST_SOURCES,
    find_later,
    find_outputs,
    iterate_graphs,
    measure_ablations,
    predict_ablations,
)
from jclt.evaluation.intervals import Figure, average_prompts, divide_sums
from jclt.graphs import Graph, suggest_supernodes
from jclt.graphs.influence import compute_edge_influence
from jclt.interventions import measure_supernodes
from jclt.interventions.settings import Setting
from jclt.interventions.supernodes import set_to_zero
from jclt.models import Model, run
from jclt.shapes import Float, Int

CLAIMS = 10
"""Nodes, and paths, of a graph that are tested."""
WITHIN = 2.0
"""By what factor a measured change may differ from the predicted one."""
RANDOM_SETS = 5
"""Random sets of each prompt."""
ENOUGH = 0.9
"""A circuit is sufficient if the answer keeps this share of its probability."""
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Of circuits that grow."""


def count_confirmed(predicted: Sequence[float] | np.ndarray, measured: Sequence[float] | np.ndarray) -> int:
    """How many changes have the predicted sign, and from half to twice the predicted size."""
    predicted, measured = np.asarray(predicted, np.float64), np.asarray(measured, np.float64)
    ratio = np.where(predicted != 0, measured, 0) / np.where(predicted != 0, predicted, 1)
    return int(np.count_nonzero((ratio >= 1 / WITHIN) & (ratio <= WITHIN)))


def check_claims(model: Model, coder: Coder, graph: Graph, generator: np.random.Generator) -> dict[str, int]:
    """The number of each kind of claim, of those confirmed, and of those that the control confirms."""
    said = predict_ablations(graph, MOST_SOURCES)
    found = measure_ablations(model, coder, graph, said.sources)
    effects, before = found.effects[:, 0], found.original_activations
    relative = (found.activations - before) / np.where(before != 0, before, np.inf)
    row = {int(source): number for number, source in enumerate(said.sources)}
    top = np.argsort(-said.influence, kind="stable")[:CLAIMS]
    layers = graph.features[said.sources, 0]
    others = [int(generator.choice(np.flatnonzero(layers == layers[i]))) for i in top]
    edges = [(row[s], t) for s, t in list_edges(graph) if s in row]
    later = find_later(graph, said.sources)
    swapped = [(int(generator.choice(np.flatnonzero(later[:, t]))), t) for _, t in edges]
    of_edges, of_others = (np.array([said.relative[edge] for edge in pairs]) for pairs in (edges, swapped))
    measured = np.array([relative[edge] for edge in edges])
    return {
        "nodes": len(top),
        "nodes confirmed": count_confirmed(said.changes[top, 0], effects[top]),
        "nodes by chance": count_confirmed(said.changes[others, 0], effects[top]),
        "edges": len(edges),
        "edges confirmed": count_confirmed(of_edges, measured),
        "edges by chance": count_confirmed(of_others, measured),
    }


def list_edges(graph: Graph) -> list[tuple[int, int]]:
    """The edges between features with the most influence: source and target."""
    n = len(graph.features)
    influence = compute_edge_influence(graph.edges)[:n, :n]
    strongest = np.argsort(-influence, axis=None, kind="stable")[:CLAIMS]
    return [(int(place % n), int(place // n)) for place in strongest if influence.flat[place] > 0]


def check_supernodes(model: Model, coder: Coder, graph: Graph, seed: int) -> dict[str, int]:
    """The suggested supernodes of the pruned graph, and how many move the outputs more than 95% of random groups; by
    chance it is one of twenty."""
    suggested = suggest_supernodes(graph.prune())
    effects = measure_supernodes(model, coder, graph.tokens, graph, suggested, seed=seed)
    beating = sum(effect.beaten >= 0.95 * len(effect.random) for effect in effects)
    return {"supernodes": len(effects), "supernodes confirmed": beating}


def draw_matched(graph: Graph, kept: Int[np.ndarray, "m"], generator: np.random.Generator) -> Int[np.ndarray, "m"]:
    """As many features of each layer and position as are kept, drawn from all of them."""
    places = graph.features[:, 0] * len(graph.tokens) + graph.features[:, 1]
    drawn = [
        generator.permutation(np.flatnonzero(places == place))[:count]
        for place, count in zip(*np.unique(places[kept], return_counts=True), strict=True)
    ]
    return np.concatenate([np.zeros(0, int), *drawn])


def measure_circuit(
    model: Model, coder: Coder, graph: Graph, generator: np.random.Generator, setting: Setting
) -> dict[str, float]:
    """Of the features that pruning keeps, beside random sets; and of circuits that grow by influence, by activation and
    at random, the least size that is sufficient, as a share of all features."""
    n = len(graph.features)
    everything, influence = np.arange(n), graph.influence[:n]
    kept = np.flatnonzero(graph.masks().nodes[:n])
    said = predict_ablations(graph, n)
    others = np.setdiff1d(everything, kept)
    supporting = others[np.argsort(said.changes[others, 0], kind="stable")]
    drawn = [draw_matched(graph, kept, generator) for _ in range(RANDOM_SETS)]
    sizes = [size for size in SIZES if size < n]
    orders = {
        "influence": np.argsort(-influence, kind="stable"),
        "activation": np.argsort(-graph.activations, kind="stable"),
        "random": generator.permutation(n),
    }
    grown = [np.setdiff1d(everything, order[:size]) for order in orders.values() for size in sizes]
    removed = {
        "kept": [kept],
        "others": [others],
        "worst": [supporting[:size] for size in SIZES if size < len(others)],
        "drawn": drawn,
        "not drawn": [np.setdiff1d(everything, other) for other in drawn],
        "all": [everything],
        "grown": grown,
    }
    after = measure_probabilities(
        model, coder, graph, [group for groups in removed.values() for group in groups], setting
    )
    ends = np.cumsum([len(of_kind) for of_kind in removed.values()])
    shares = dict(zip(removed, np.split(after[1:] / after[0], ends[:-1]), strict=True))
    enough = shares["grown"].reshape(len(orders), len(sizes)) >= ENOUGH
    return {
        "necessity": float(1 - shares["kept"][0]),
        "sufficiency": float(shares["others"][0]),
        "worst choice": float(min([*shares["worst"], shares["others"][0]])),
        "necessity, random": float(1 - shares["drawn"].mean()),
        "sufficiency, random": float(shares["not drawn"].mean()),
        "nothing kept": float(shares["all"][0]),
        "kept": len(kept) / n,
    } | {
        f"size by {name}": (sizes[int(row.argmax())] if row.any() else n) / n
        for name, row in zip(orders, enough, strict=True)
    }


def measure_probabilities(
    model: Model, coder: Coder, graph: Graph, removed: Sequence[Int[np.ndarray, "_"]], setting: Setting
) -> Float[np.ndarray, "g"]:
    """The probability of the first output's token: first with nothing removed, then without each set of features."""
    groups = [(), *(tuple(int(node) for node in group) for group in removed)]
    changes, _ = set_to_zero(model, coder, graph.tokens, graph, groups, setting)
    logits = changes - changes[0] + read_logits(model, graph)
    token = graph.nodes.index[find_outputs(graph)[0]]
    largest = logits.max(axis=1, keepdims=True)
    return np.exp(logits[:, token] - largest[:, 0]) / np.exp(logits - largest).sum(axis=1)


def read_logits(model: Model, graph: Graph) -> Float[np.ndarray, "V"]:
    logits = np.asarray(run(model, graph.tokens)[0][-1], np.float64)
    return logits - logits.mean()


def measure_circuits(
    model: Model, coder: Coder, prompts: Sequence[Int[np.ndarray, "_"]], *, seed: int = 0
) -> dict[str, Figure]:
    """The means over prompts, and shares of all claims, with bootstrap intervals."""
    generator = np.random.default_rng(seed)
    setting = Setting(None, "free", "free", "current", "kept")
    measured: list[dict[str, Any]] = []
    for graph in iterate_graphs(model, coder, prompts):
        claims = check_claims(model, coder, graph, generator) | check_supernodes(model, coder, graph, seed)
        measured.append(claims | measure_circuit(model, coder, graph, generator, setting))
    if not measured:
        raise UserError("prompts: no graph has two features, expected at least one")

    def column(name: str) -> list[float]:
        return [figures[name] for figures in measured]

    def share(name: str, control: float | None = None) -> Figure:
        by = control if control is not None else sum(column(f"{name} by chance")) / max(sum(column(name)), 1)
        return divide_sums(column(f"{name} confirmed"), column(name), control=by, seed=seed)

    def average(name: str, control: str | None = None, paper: str = "") -> Figure:
        by = None if control is None else column(control)
        return average_prompts(column(name), control=by, paper=paper, seed=seed)

    return {
        "claims confirmed: nodes": share("nodes"),
        "claims confirmed: edges between features": share("edges"),
        "claims confirmed: supernodes": share("supernodes", 0.05),
        "necessity of the pruned graph (share of p lost)": average("necessity", "necessity, random"),
        "sufficiency of the pruned graph (share of p kept)": average("sufficiency", "sufficiency, random"),
        "sufficiency, worst choice of what is taken away": average("worst choice", "nothing kept"),
        "share of the features that pruning keeps": average("kept"),
        "share that is sufficient, by influence": average("size by influence", "size by random"),
        "share that is sufficient, by activation": average("size by activation", "size by random"),
    }
