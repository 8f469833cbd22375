"""Edges between heads and MLPs as a graph, which can be pruned, saved and shown as those of features are.

Scores are summed over positions, so the graph has one column, named "all positions". Its features are the MLPs, which
are labelled so, its one token is the input, and its output is the metric. An edge into a head is the sum of those into
its queries, keys and values; of keys and values that heads share each has an equal part. Weights are minus the scores:
positive where the edge supports the answer. A node's value is the sum of its edges; those not kept are its rest.
"""

import numpy as np

from jclt.circuits.edge_scores import EdgeScores
from jclt.circuits.edges import find_readers, list_edges
from jclt.graphs import Graph, build_node_table
from jclt.shapes import Bool, Float


def make_edge_graph(scores: EdgeScores, kept: Bool[np.ndarray, "s r"] | None = None) -> Graph:
    """The graph of all edges, or of those that are kept."""
    config, edges = scores.config, list_edges(scores.config)
    kept = edges if kept is None else edges & kept
    weights = -scores.values.astype(np.float64)
    readers = find_readers(config)
    shares = readers / np.maximum(readers.sum(axis=0), 1)
    is_head = np.array([name.startswith("a") for name in scores.senders])
    heads, mlps = np.flatnonzero(is_head), np.flatnonzero(~is_head)[1:]
    order = [*mlps, 0, *heads]  # of the graph's nodes; the output comes last

    def gather(by_edge: Float[np.ndarray, "s r"]) -> Float[np.ndarray, "N N"]:
        """By target and source."""
        into_parts, into_output = shares @ by_edge.T, by_edge[:, -1]
        return np.pad(np.concatenate([into_parts[order], into_output[None]])[:, order], ((0, 0), (0, 1)))

    adjacency = gather(np.where(kept, weights, 0))
    left_out, mass = (gather(np.where(kept, 0, part)).sum(axis=1) for part in (weights, np.abs(weights)))
    values = adjacency.sum(axis=1) + left_out
    layers, numbers = np.repeat(np.arange(config.layers), config.heads), np.tile(np.arange(config.heads), config.layers)
    nodes = build_node_table(
        layers=config.layers,
        values=values,
        features=np.stack(
            [np.arange(config.layers), np.zeros(config.layers, int), np.zeros(config.layers, int)], axis=1
        ),
        errors=np.zeros((0, 2), np.int64),
        tokens=np.array([-1]),
        positions=np.zeros(0, np.int64),
        heads=np.stack([layers, np.zeros_like(layers), numbers], axis=1),
        logit_tokens=np.array([-1]),
        logit_positions=np.array([0]),
    )
    settings = {
        "method": scores.method,
        "rules": list(scores.rules),
        "metric": scores.metric,
        "ablation": scores.ablation,
        "source": scores.source,
    }
    return Graph(
        adjacency=adjacency,
        nodes=nodes,
        bias=np.zeros_like(values),
        rest=left_out,
        rest_mass=mass,
        activations=values[: config.layers],
        token_texts=("all positions",),
        logit_names=(scores.metric,),
        logit_probabilities=np.zeros(1),
        logit_weights=np.ones(1),
        layers=config.layers,
        provenance={"basis": "heads and MLPs", **settings},
        labels=("MLP",) * config.layers + ("",) * (len(nodes) - config.layers),
    )
