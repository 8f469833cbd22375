"""Whether a graph's influences are those that ablation finds, feature by feature.

For each prompt every feature of the graph is set to zero, one at a time, in the true model. With s the ablated feature,
t a later feature at the same position or after it, and k the outputs with weights w:

    to the outputs      influence of s               beside  sum over k of w[k] |change of k's logit|, and the KL
    to features         influence of s on t          beside  |change of t's activation| / t's activation
    predicted           the linear prediction        beside  the change of the first output's logit

The rank correlations are those of one prompt; the figures are means over prompts. A feature is written in its own layer
and the next two, which are clamped (constrained patching), and the model reacts after them; other ranges are beside it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jclt.attribution import attribute_batch
from jclt.coders import Coder
from jclt.errors import UserError
from jclt.evaluation.intervals import Figure, average_prompts, correlate, correlate_ranks
from jclt.graphs import Graph
from jclt.graphs.influence import compute_edge_shares
from jclt.interventions.groups import GroupEffects, change_groups
from jclt.interventions.settings import Treatment
from jclt.models import Model
from jclt.shapes import Bool, Float, Int

CLAMPED = 3
"""The layers of constrained patching in the paper's test: the feature's own and the next two."""
MOST_SOURCES = 2000
"""Features of a prompt that are ablated, those with the most influence."""


class Prediction(NamedTuple):
    """What a graph says of its features when one of them, a source, is taken away."""

    sources: Int[np.ndarray, "g"]  # numbers of features
    influence: Float[np.ndarray, "g"]  # on the outputs
    direct: Float[np.ndarray, "g"]  # the same, by the edges to the outputs alone
    on_features: Float[np.ndarray, "g n"]  # influence of each source on each feature
    direct_on_features: Float[np.ndarray, "g n"]  # the shares of the edges alone
    relative: Float[np.ndarray, "g n"]  # by what share of itself each feature changes: by all paths, with signs
    changes: Float[np.ndarray, "g k"]  # of the outputs' values, likewise


def predict_ablations(graph: Graph, most: int = MOST_SOURCES) -> Prediction:
    """Of the `most` features with the highest influence. With S the edge shares and R = edges / values of the targets,
    both among features, the influences are (1 - S)^-1 - 1, the relative changes -(1 - R)^-1, and the outputs' changes
    the edges times these."""
    n = len(graph.features)
    outputs, influence = find_outputs(graph), graph.influence[:n]
    sources = np.sort(np.argsort(-influence, kind="stable")[:most])
    shares = compute_edge_shares(graph.edges)
    among = shares[:n, :n].astype(np.float64)
    unit = np.eye(n)[:, sources]
    values = graph.values[:n].astype(np.float64)
    edges = graph.adjacency[:n][:, :n] / np.where(values != 0, values, np.inf)[:, None]
    relative = -np.linalg.solve(np.eye(n) - edges, unit)
    weights = graph.output_weights[outputs]
    return Prediction(
        sources=sources,
        influence=influence[sources],
        direct=weights @ shares[np.ix_(outputs, sources)],
        on_features=(np.linalg.solve(np.eye(n) - among, unit) - unit).T,
        direct_on_features=among[:, sources].T,
        relative=relative.T,
        changes=(graph.adjacency[outputs][:, :n] @ relative).T,
    )


def find_outputs(graph: Graph) -> Int[np.ndarray, "k"]:
    """The nodes of the outputs that are tokens at the last position, the one with most weight first."""
    usable = (graph.logit_tokens >= 0) & (graph.logit_positions == len(graph.tokens) - 1)
    if not usable.any():
        raise UserError("graph: explains no token at the last position, expected at least one")
    nodes = graph.nodes.find("output")[usable]
    return nodes[np.argsort(-graph.output_weights[nodes], kind="stable")]


def find_later(graph: Graph, sources: Int[np.ndarray, "g"]) -> Bool[np.ndarray, "g n"]:
    """For each source the features that it may reach: in later layers, at its position or after it."""
    layer, position, _ = graph.features.T
    return (layer > layer[sources, None]) & (position >= position[sources, None])


def measure_ablations(
    model: Model,
    coder: Coder,
    graph: Graph,
    sources: Int[np.ndarray, "g"],
    *,
    clamped: int = CLAMPED,
    attention: Treatment = "frozen",
    norms: Treatment = "frozen",
) -> GroupEffects:
    changes = np.zeros((len(sources), len(graph.features)), np.float32)
    changes[np.arange(len(sources)), sources] = -1
    return change_groups(
        model,
        coder,
        graph.tokens,
        graph.features,
        changes,
        tokens=graph.nodes.index[find_outputs(graph)],
        clamped=clamped,
        attention=attention,
        norms=norms,
    )


def compare_outputs(graph: Graph, said: Prediction, found: GroupEffects) -> dict[str, float]:
    """How the graph orders features by their effect on the outputs, beside the orders by edges, by activation, and of a
    permutation."""
    outputs = find_outputs(graph)
    weights = graph.output_weights[outputs]
    size = np.abs(found.effects) @ weights / weights.sum()
    shuffled = np.random.default_rng(0).permutation(said.influence)
    predicted, measured = said.changes[:, 0], found.effects[:, 0]
    power = float(predicted @ predicted)
    return {
        "logit": correlate_ranks(said.influence, size),
        "logit, by direct edges": correlate_ranks(said.direct, size),
        "logit, by activation": correlate_ranks(graph.activations[said.sources], size),
        "logit, permuted": correlate_ranks(shuffled, size),
        "KL": correlate_ranks(said.influence, found.kl),
        "KL, permuted": correlate_ranks(shuffled, found.kl),
        "slope": float(predicted @ measured) / power if power else float("nan"),
        "correlation": correlate(predicted, measured),
        "error": float(np.sum((measured - predicted) ** 2) / np.sum(measured**2)),
    }


def compare_features(graph: Graph, said: Prediction, found: GroupEffects) -> dict[str, float]:
    """The same for later features: over all pairs of a prompt, and within each source."""
    before = found.original_activations
    effects = np.abs(found.activations - before) / np.where(before != 0, np.abs(before), np.inf)
    later = find_later(graph, said.sources)
    rows = [row for row in range(len(later)) if later[row].sum() >= 10]
    within = [correlate_ranks(said.on_features[row, later[row]], effects[row, later[row]]) for row in rows]
    permuted = np.random.default_rng(0).permutation(effects[later])
    return {
        "pairs": correlate_ranks(said.on_features[later], effects[later]),
        "pairs, by direct edges": correlate_ranks(said.direct_on_features[later], effects[later]),
        "pairs, permuted": correlate_ranks(said.on_features[later], permuted),
        "within": float(np.nanmean(within)) if np.isfinite(within).any() else float("nan"),
    }


def measure_prompt(model: Model, coder: Coder, graph: Graph, most: int = MOST_SOURCES) -> dict[str, float]:
    """All figures of one prompt. `moved` is by how much effects on the first output differ, summed up as a share of
    those with patterns and norms frozen, when patterns, or norms too, may change."""
    said = predict_ablations(graph, most)

    def measure(**setting: Any) -> GroupEffects:
        return measure_ablations(model, coder, graph, said.sources, **setting)

    frozen = measure()
    others = {
        "own layer": measure(clamped=1),
        "all layers": measure(clamped=0),
        "patterns free": measure(attention="free"),
        "norms free": measure(attention="free", norms="free"),
    }
    figures = compare_outputs(graph, said, frozen) | compare_features(graph, said, frozen)
    size = np.abs(frozen.effects[:, 0]).sum()
    for name, other in others.items():
        figures[f"logit, {name}"] = compare_outputs(graph, said, other)["logit"]
        figures[f"pairs, {name}"] = compare_features(graph, said, other)["pairs"]
        figures[f"moved, {name}"] = float(np.abs(other.effects[:, 0] - frozen.effects[:, 0]).sum() / size)
    return figures


def measure_faithfulness(
    model: Model, coder: Coder, prompts: Sequence[Int[np.ndarray, "_"]], *, most: int = MOST_SOURCES, seed: int = 0
) -> dict[str, Figure]:
    """The means over prompts, with bootstrap intervals."""
    measured = [measure_prompt(model, coder, graph, most) for graph in iterate_graphs(model, coder, prompts)]
    if not measured:
        raise UserError("prompts: no graph has two features, expected at least one")

    def average(name: str, control: str | float | None = None, paper: str = "") -> Figure:
        by = [figures[control] for figures in measured] if isinstance(control, str) else control
        return average_prompts([figures[name] for figures in measured], control=by, paper=paper, seed=seed)

    return {
        "to outputs: rank correlation of influence and |logit change|": average("logit", "logit, permuted"),
        "to outputs, by KL": average("KL", "KL, permuted"),
        "to outputs, direct edges in place of influence": average("logit, by direct edges"),
        "to outputs, activation in place of influence": average("logit, by activation"),
        "to outputs, written to its own layer alone": average("logit, own layer"),
        "to outputs, written to all layers": average("logit, all layers"),
        "to outputs, attention patterns free": average("logit, patterns free"),
        "to outputs, patterns and norms free": average("logit, norms free"),
        "to features: rank correlation over pairs": average("pairs", "pairs, permuted", "0.72"),
        "to features, within each ablated feature": average("within"),
        "to features, direct edges in place of influence": average("pairs, by direct edges"),
        "to features, written to its own layer alone": average("pairs, own layer"),
        "to features, written to all layers": average("pairs, all layers"),
        "to features, attention patterns free": average("pairs, patterns free"),
        "to features, patterns and norms free": average("pairs, norms free"),
        "predicted and measured logit change: slope (1 is right)": average("slope"),
        "predicted and measured: correlation": average("correlation"),
        "predicted and measured: squared error / squared change": average("error", 1.0),
        "change of the effects with patterns free, as a share": average("moved, patterns free"),
        "change of the effects with patterns and norms free": average("moved, norms free"),
    }


def iterate_graphs(model: Model, coder: Coder, prompts: Sequence[Int[np.ndarray, "_"]]) -> Iterator[Graph]:
    """The graphs with at least two features."""
    return (graph for graph in attribute_batch(model, coder, prompts) if len(graph.features) > 1)
