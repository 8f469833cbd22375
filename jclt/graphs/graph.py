"""The attribution graph of one prompt.

An edge is the contribution of its source node to the value of its target node. For every feature, head, residual
stream and output,

    value = sum of the incoming edges + bias + rest

where `bias` is the contribution of the model's and the coder's bias terms, and `rest` the contribution of features,
errors and edges that are not in the graph (not traced, or pruned).
"""

from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from jclt.errors import UserError, escape_unprintable
from jclt.graphs import npz
from jclt.graphs.adjacency import Adjacency, count_edges, is_large, split_rows, stack_blocks, sum_rows
from jclt.graphs.influence import (
    Edges,
    Scores,
    compute_cumulative_shares,
    compute_influence,
    compute_missing_share,
    measure_scores,
)
from jclt.graphs.nodes import KINDS, Kind, NodeTable
from jclt.graphs.pruning import EdgeMask, Masks, Rule, choose_nodes_and_edges
from jclt.shapes import Bool, Float, Int


@dataclass(frozen=True)
class Graph:
    """N nodes: n features, errors, T tokens, position embeddings, heads, residual streams, k outputs."""

    adjacency: Adjacency  # the edges, of a large graph without zeros; row = target, column = source
    nodes: NodeTable
    bias: Float[np.ndarray, "N"]  # contribution of all bias terms to each target
    rest: Float[np.ndarray, "N"]  # contribution of all features, errors and edges outside the graph to each target
    rest_mass: Float[np.ndarray, "N"]  # sum of the absolute values of these contributions
    activations: Float[np.ndarray, "n"]  # of the features
    token_texts: tuple[str, ...]  # of the prompt's tokens
    logit_names: tuple[str, ...]  # of the outputs
    logit_probabilities: Float[np.ndarray, "k"]  # the model's probability of each output; 0 if it is no single token
    layers: int  # number of layers of the model
    provenance: dict[str, Any] = field(default_factory=dict)  # model, coder, settings, version; JSON
    supernodes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # named sets of nodes
    annotations: dict[str, Any] = field(default_factory=dict)  # fields of a viewer's file with no place here; JSON
    logit_weights: Float[np.ndarray, "k"] | None = None  # weight of each output in influence; None: its probability
    whole_shares: Float[np.ndarray, "N"] | None = None  # in a pruned graph: `cumulative_shares` before pruning
    labels: tuple[str, ...] = ()  # of each node a text that says what it means, or ""; empty: there are none

    def __post_init__(self) -> None:
        nodes, counts = len(self.nodes), self.counts
        expected = {
            "adjacency": (nodes, nodes),
            **dict.fromkeys(("bias", "rest", "rest_mass", "whole_shares"), (nodes,)),
            "activations": (counts["feature"],),
            "token_texts": (counts["token"],),
            **dict.fromkeys(("logit_names", "logit_probabilities", "logit_weights"), (counts["output"],)),
            "labels": (nodes if self.labels else 0,),
        }
        for name, shape in expected.items():
            values = getattr(self, name)
            if values is not None and (len(values),) + np.shape(values)[1:] != shape:
                size = f"{name} of shape {list(np.shape(values))}, expected {list(shape)}"
                raise UserError(f"graph: {size}: its lists have {nodes} nodes")

    def __repr__(self) -> str:
        text = escape_unprintable("".join(self.token_texts))
        shown = text if len(text) <= 60 else text[:59] + "…"
        parts = [f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in self.counts.items() if count]
        return f"<Graph of '{shown}': {', '.join(parts)}, {count_edges(self.adjacency)} edges>"

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def counts(self) -> dict[Kind, int]:
        """The number of nodes of each kind."""
        return {kind: int(np.count_nonzero(self.nodes.kind == kind)) for kind in KINDS}

    @property
    def features(self) -> Int[np.ndarray, "n 3"]:
        """Layer, position and number of each feature node."""
        return self._stack_columns("feature", "layer", "position", "index")

    @property
    def errors(self) -> Int[np.ndarray, "e 2"]:
        """Layer and position of each error node."""
        return self._stack_columns("error", "layer", "position")

    @property
    def tokens(self) -> Int[np.ndarray, "T"]:
        """The prompt's tokens, each of which is a node; -1 for an unknown token."""
        return self._stack_columns("token", "index")[:, 0]

    @property
    def positions(self) -> Int[np.ndarray, "q"]:
        """The positions that have an embedding: all if the model learns position embeddings, else none."""
        return self._stack_columns("position", "position")[:, 0]

    @property
    def heads(self) -> Int[np.ndarray, "h 3"]:
        """Layer, position and number of each head node."""
        return self._stack_columns("head", "layer", "position", "index")

    @property
    def streams(self) -> Int[np.ndarray, "r 2"]:
        """Layer and position of each residual stream that is a node, at the layer's input."""
        return self._stack_columns("stream", "layer", "position")

    @property
    def logit_tokens(self) -> Int[np.ndarray, "k"]:
        """The token of each output; -1 for an output that is no single token."""
        return self._stack_columns("output", "index")[:, 0]

    @property
    def logit_positions(self) -> Int[np.ndarray, "k"]:
        return self._stack_columns("output", "position")[:, 0]

    def _stack_columns(self, kind: Kind, *names: str) -> Int[np.ndarray, "_ _"]:
        nodes = self.nodes.find(kind)
        return np.stack([getattr(self.nodes, name)[nodes] for name in names], axis=1)

    @property
    def values(self) -> Float[np.ndarray, "N"]:
        return self.nodes.value

    @property
    def residual(self) -> Float[np.ndarray, "N"]:
        """(incoming edges + bias + rest) - value at nodes with inputs, which is 0 up to rounding; 0 elsewhere."""
        total = sum_rows(self.adjacency) + self.bias + self.rest
        return np.where(self.nodes.is_kind("feature", "head", "stream", "output"), total - self.nodes.value, 0.0)

    @property
    def conservation_error(self) -> float:
        """The largest residual as a share of the largest value; about 1e-6 where edges are exact to float32."""
        largest = np.abs(self.values).max(initial=0.0)
        return float(np.abs(self.residual).max(initial=0.0) / largest) if largest else 0.0

    @property
    def edges(self) -> Edges:
        """The input of the functions in `influence.py`."""
        return Edges(
            adjacency=self.adjacency, rest_mass=self.rest_mass, nodes=self.nodes, output_weights=self.output_weights
        )

    @property
    def output_weights(self) -> Float[np.ndarray, "N"]:
        """The weight of each output; 0 for other nodes."""
        weights = np.zeros(len(self), self.adjacency.dtype)
        logit_weights = self.logit_probabilities if self.logit_weights is None else self.logit_weights
        weights[self.nodes.find("output")] = logit_weights
        return weights

    @property
    def influence(self) -> Float[np.ndarray, "N"]:
        """How much each node contributes to the outputs (defined in `influence.py`)."""
        return compute_influence(self.edges)

    @property
    def cumulative_shares(self) -> Float[np.ndarray, "N"]:
        """For each node, the share of all influence that this node and all stronger nodes have together; in a pruned
        graph, the share in the whole graph that was pruned."""
        return compute_cumulative_shares(self.influence) if self.whole_shares is None else self.whole_shares

    @property
    def scores(self) -> Scores:
        """How much of the outputs the graph explains (see `influence.Scores`)."""
        return measure_scores(self.edges)

    @property
    def missing(self) -> float:
        """The largest error of any node's influence, as a share of the output weights (see
        `influence.compute_missing_share`)."""
        return compute_missing_share(self.edges)

    def masks(self, node_threshold: float = 0.8, edge_threshold: float = 0.98, rule: Rule = "paper") -> Masks:
        """Which nodes and edges `prune` keeps."""
        return choose_nodes_and_edges(self.edges, node_threshold, edge_threshold, rule)

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98, rule: Rule = "paper") -> "Graph":
        """Keeps the strongest nodes that together have `node_threshold` of the influence, then the strongest edges
        among them that together have `edge_threshold`. The contributions of removed nodes and edges are added to
        `rest`.

        `whole_shares` and `provenance["whole_graph_scores"]` describe the graph before its first pruning.
        """
        masks = self.masks(node_threshold, edge_threshold, rule)
        settings = {"node_threshold": float(node_threshold), "edge_threshold": float(edge_threshold), "rule": rule}
        provenance = self.provenance | {"pruning_settings": settings}
        if "whole_graph_scores" not in provenance:
            provenance["whole_graph_scores"] = self.scores.both
        shares = masks.cumulative if self.whole_shares is None else self.whole_shares
        return replace(self, whole_shares=shares, provenance=provenance).keep(masks.nodes, masks.edges)

    def show(self, *, model: Any = None, coder: Any = None, features: Any = None, height: int = 760) -> Any:
        """The graph's page, as the last value of a notebook's cell. Where anywidget is installed, what is done on it is
        in the value: `view.graph` is the graph with it. With model and coder the page intervenes on the model; with a
        folder of described `features` it shows their examples."""
        # The page is in a package above this one, so it is looked up only here.
        return import_module("jclt.viewer").show_graph(self, model=model, coder=coder, features=features, height=height)

    def plot(self, *, title: str | None = None) -> Any:
        """The graph's picture, as the last value of a notebook's cell; `save("graph.svg")` writes it as a file. It
        needs no browser. The title is the prompt by default."""
        return import_module("jclt.viewer").plot_graph(self, title=title)

    def _repr_html_(self) -> str:
        """What a notebook shows of a graph by itself: a few lines of text."""
        return import_module("jclt.viewer").describe_in_notebook(self)

    def save(self, path: str | Path) -> None:
        """Writes the graph as one `.npz` file, which `load_graph` reads. An older file is replaced only when the new
        file is complete."""
        npz.write_file(path, {name: getattr(self, name) for name in npz.STORED_FIELDS}, self.adjacency)

    def keep(self, nodes: Bool[np.ndarray, "N"], edges: EdgeMask | None = None) -> "Graph":
        """The graph of some nodes and edges. The contributions of the others are added to `rest`. Embeddings and
        outputs are always kept."""
        nodes = np.asarray(nodes) | self.nodes.is_kind("token", "position", "output")
        kept = np.flatnonzero(nodes)
        renumbered = np.cumsum(nodes) - 1
        removed, removed_mass = np.zeros((2, len(self)), self.adjacency.dtype)

        def take_rows(rows: Int[np.ndarray, "r"]) -> Float[np.ndarray, "r _"]:
            """The edges that are kept; the others are added up."""
            block = self.adjacency[rows]
            is_kept = np.broadcast_to(nodes, block.shape) if edges is None else edges[rows] & nodes
            kept_edges = np.where(is_kept, block, 0)[:, kept]
            block[is_kept] = 0
            removed[rows] = block.sum(axis=1)
            removed_mass[rows] = np.abs(block, out=block).sum(axis=1)
            return kept_edges

        dtype = self.adjacency.dtype
        blocks = map(take_rows, split_rows(len(self), dtype.itemsize, kept))
        adjacency = stack_blocks(blocks, len(kept), dtype, is_large(len(kept), dtype.itemsize))
        annotations = self.annotations
        if "nodes" in annotations:
            annotations = annotations | {"nodes": [annotations["nodes"][node] for node in kept.tolist()]}
        return replace(
            self,
            adjacency=adjacency,
            bias=self.bias[nodes],
            rest=(self.rest + removed)[nodes],
            rest_mass=(self.rest_mass + removed_mass)[nodes],
            nodes=self.nodes.select(nodes),
            activations=self.activations[nodes[self.nodes.find("feature")]],
            supernodes={
                name: tuple(int(renumbered[node]) for node in members if nodes[node])
                for name, members in self.supernodes.items()
            },
            annotations=annotations,
            whole_shares=self.cumulative_shares[nodes],
            labels=tuple(self.labels[node] for node in kept.tolist()) if self.labels else (),
        )
