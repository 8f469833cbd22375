"""Figures of graphs over a set of prompts: how much they explain, how long their paths are, how small pruning makes
them; of any coder, so that a coder's graphs stand beside those of the model's neurons."""

from collections.abc import Sequence

import numpy as np

from jclt.attribution import attribute_batch
from jclt.coders import Coder, Neurons, neurons
from jclt.evaluation.intervals import Figure, average_prompts, divide_sums
from jclt.graphs import Graph, curve, path_lengths
from jclt.graphs.adjacency import count_edges
from jclt.models import Model, run
from jclt.shapes import Int

THRESHOLDS = (0.9, 0.8, 0.7)
"""Shares of the influence that pruning keeps; 0.8 is the paper's."""


def measure_graphs(
    model: Model, coder: Coder, prompts: Sequence[Int[np.ndarray, "_"]], *, seed: int = 0
) -> dict[str, Figure]:
    return summarize_graphs(attribute_batch(model, coder, prompts), seed=seed)


def summarize_graphs(graphs: Sequence[Graph], *, seed: int = 0) -> dict[str, Figure]:
    """The means over prompts. The paper's figures are of other models: of one prompt each, for 10 million features."""
    scores = [graph.scores for graph in graphs]
    points = [curve(graph, THRESHOLDS) for graph in graphs]
    kept = np.array([[count_features(graph, share) for share in THRESHOLDS] for graph in graphs])
    features = np.array([len(graph.features) for graph in graphs])
    edges = np.array([count_edges(graph.adjacency) for graph in graphs])

    def average(values: Sequence[float] | np.ndarray, paper: str = "") -> Figure:
        return average_prompts(values, paper=paper, seed=seed)

    figures = {
        "completeness": average([s.completeness for s in scores], "0.80; per layer 0.78"),
        "replacement score": average([s.replacement for s in scores], "0.61; per layer 0.37"),
        "path length from embeddings": average([measure_path(graph) for graph in graphs], "2.3; per layer 3.7"),
        "features": average(features.astype(np.float64)),
    }
    for column, share in enumerate(THRESHOLDS):
        of_share = [of_graph[column] for of_graph in points]
        figures[f"features kept at {share}"] = average(kept[:, column].astype(np.float64))
        figures[f"edges kept at {share}"] = average([float(point.edges) for point in of_share])
        figures[f"completeness at {share}"] = average([point.scores.completeness for point in of_share])
    at_paper = THRESHOLDS.index(0.8)
    kept_edges = [of_graph[at_paper].edges for of_graph in points]
    return figures | {
        "all features / those kept at 0.8": divide_sums(features, kept[:, at_paper], paper="about 10", seed=seed),
        "all edges / those kept at 0.8": divide_sums(edges, kept_edges, paper="about 500", seed=seed),
    }


def count_features(graph: Graph, share: float) -> int:
    return int(np.count_nonzero(graph.masks(node_threshold=share).nodes[: len(graph.features)]))


def measure_path(graph: Graph) -> float:
    """The mean number of edges of the walks from the outputs that end at embeddings."""
    lengths = path_lengths(graph, ("token", "position"))
    return float(lengths @ np.arange(len(lengths))) if lengths.any() else float("nan")


def threshold_neurons(model: Model, coder: Coder, prompts: Sequence[Int[np.ndarray, "_"]]) -> Neurons:
    """The model's neurons, set to zero below the threshold at which as many are active on these prompts as features of
    the coder: the paper's baseline, at equal sparsity."""
    values, active, tokens = [], 0, 0
    basis = neurons(model)
    sites = (coder.config.reads, basis.config.reads)
    for prompt in prompts:
        _, seen = run(model, prompt, capture=sites)
        for index, layer in enumerate(coder.config.covered):
            active += int(np.count_nonzero(np.asarray(coder.encode(index, seen[coder.config.reads][layer]))))
            neuron_values = np.abs(np.asarray(basis.encode(layer, seen[basis.config.reads][layer])))
            values.append(neuron_values.ravel())
        tokens += len(prompt)
    flat = np.sort(np.concatenate(values))[::-1]
    return neurons(model, threshold=float(flat[min(active, len(flat) - 1)]))
