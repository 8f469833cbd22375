"""The attribution graph: who adds how much to whom on one prompt, with what does not come from any node kept beside.

An edge is the part of its target's value that its source puts there. For every feature and output,

    value = sum of the incoming edges + bias + rest
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from jclt.errors import UserError, printable
from jclt.graphs import npz
from jclt.graphs.influence import (
    Edges,
    Scores,
    cumulative_share,
    measure_scores,
    missing_share,
    node_influence,
    row_blocks,
)
from jclt.graphs.nodes import KINDS, Kind, NodeTable
from jclt.graphs.pruning import Masks, Rule, choose_nodes_and_edges
from jclt.shapes import Bool, Float, Int


@dataclass(frozen=True)
class Graph:
    adjacency: Float[np.ndarray, "N N"]  # row = target, column = source
    nodes: NodeTable
    bias: Float[np.ndarray, "N"]  # what reaches each target along paths that begin at biases, its own included
    rest: Float[np.ndarray, "N"]  # what reaches it from features, errors and edges that are not in this graph
    rest_mass: Float[np.ndarray, "N"]  # the same with each part's absolute value
    activations: Float[np.ndarray, "n"]  # of the features
    token_texts: tuple[str, ...]  # one for each position of the prompt
    logit_names: tuple[str, ...]  # one for each output
    logit_probabilities: Float[np.ndarray, "k"]  # the model's own; 0 for an output that is no single token
    layers: int  # of the model
    provenance: dict[str, Any] = field(default_factory=dict)  # model, coder, settings, version; JSON
    supernodes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # named sets of nodes
    annotations: dict[str, Any] = field(default_factory=dict)  # what a viewer's file says beyond this; JSON
    logit_weights: Float[np.ndarray, "k"] | None = None  # what each output counts in influence; None: its probability
    whole_shares: Float[np.ndarray, "N"] | None = None  # in a pruned graph: `cumulative_shares` of the whole graph

    def __post_init__(self) -> None:
        nodes, counts = len(self.nodes), self.counts
        expected = {
            "adjacency": (nodes, nodes),
            **dict.fromkeys(("bias", "rest", "rest_mass", "whole_shares"), (nodes,)),
            "activations": (counts["feature"],),
            "token_texts": (counts["token"],),
            **dict.fromkeys(("logit_names", "logit_probabilities", "logit_weights"), (counts["output"],)),
        }
        for name, shape in expected.items():
            found = getattr(self, name)
            if found is not None and (len(found),) + np.shape(found)[1:] != shape:
                size = f"{name} of shape {list(np.shape(found))}, expected {list(shape)}"
                raise UserError(f"graph: {size}: its lists have {nodes} nodes")

    def __repr__(self) -> str:
        text = printable("".join(self.token_texts))
        shown = text if len(text) <= 60 else text[:59] + "…"
        parts = [f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in self.counts.items() if count]
        return f"<Graph of '{shown}': {', '.join(parts)}, {np.count_nonzero(self.adjacency)} edges>"

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def counts(self) -> dict[Kind, int]:
        """Nodes of each kind, in their order."""
        return {kind: int(np.count_nonzero(self.nodes.kind == kind)) for kind in KINDS}

    @property
    def features(self) -> Int[np.ndarray, "n 3"]:
        """Layer, position and number of each feature node."""
        return self._columns("feature", "layer", "position", "index")

    @property
    def errors(self) -> Int[np.ndarray, "e 2"]:
        """Layer and position of each error node."""
        return self._columns("error", "layer", "position")

    @property
    def tokens(self) -> Int[np.ndarray, "T"]:
        """The prompt's tokens, each of which is a node; -1 where it is not known."""
        return self._columns("token", "index")[:, 0]

    @property
    def positions(self) -> Int[np.ndarray, "q"]:
        """Positions that have an embedding of their own: all where the model learns them, else none."""
        return self._columns("position", "position")[:, 0]

    @property
    def logit_tokens(self) -> Int[np.ndarray, "k"]:
        """The token of each output; -1 for an output that is no single token."""
        return self._columns("output", "index")[:, 0]

    @property
    def logit_positions(self) -> Int[np.ndarray, "k"]:
        return self._columns("output", "position")[:, 0]

    def _columns(self, kind: Kind, *names: str) -> Int[np.ndarray, "_ _"]:
        nodes = self.nodes.of(kind)
        return np.stack([getattr(self.nodes, name)[nodes] for name in names], axis=1)

    @property
    def values(self) -> Float[np.ndarray, "N"]:
        return self.nodes.value

    @property
    def residual(self) -> Float[np.ndarray, "N"]:
        """value - (incoming edges + bias + rest) at features and outputs, with its sign turned: rounding."""
        found = self.adjacency.sum(axis=1, dtype=np.float64) + self.bias + self.rest
        return np.where(self.nodes.is_of("feature", "output"), found - self.nodes.value, 0.0)

    @property
    def edges(self) -> Edges:
        """What influence is computed from."""
        return Edges(self.adjacency, self.rest_mass, self.nodes, self.output_weights)

    @property
    def output_weights(self) -> Float[np.ndarray, "N"]:
        """What each node counts by itself: outputs their weight, others nothing."""
        weights = np.zeros(len(self), self.adjacency.dtype)
        given = self.logit_probabilities if self.logit_weights is None else self.logit_weights
        weights[self.nodes.of("output")] = given
        return weights

    @property
    def influence(self) -> Float[np.ndarray, "N"]:
        """How much each node counts for the outputs (see `influence.node_influence`)."""
        return node_influence(self.edges)

    @property
    def cumulative_shares(self) -> Float[np.ndarray, "N"]:
        """Each node's cumulative share of the influence in the whole graph, from which this one may have been
        pruned."""
        return cumulative_share(self.influence) if self.whole_shares is None else self.whole_shares

    @property
    def scores(self) -> Scores:
        """What part of the outputs the graph explains (see `influence.measure_scores`)."""
        return measure_scores(self.edges)

    @property
    def missing(self) -> float:
        """The part of the walks from the outputs that leaves the graph (see `influence.missing_share`)."""
        return missing_share(self.edges)

    def masks(self, node_threshold: float = 0.8, edge_threshold: float = 0.98, rule: Rule = "paper") -> Masks:
        """Which nodes and edges `prune` keeps."""
        return choose_nodes_and_edges(self.edges, node_threshold, edge_threshold, rule)

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98, rule: Rule = "paper") -> "Graph":
        """The graph of the nodes, then of the edges among them, that make up these shares of the influence; what the
        others brought is added to `rest`. Nodes' `whole_shares` and the scores in `provenance` are those of the whole
        graph, also where that was pruned before."""
        found = self.masks(node_threshold, edge_threshold, rule)
        settings = {"node_threshold": float(node_threshold), "edge_threshold": float(edge_threshold), "rule": rule}
        known = self.provenance | {"pruning_settings": settings}
        if "whole_graph_scores" not in known:
            known["whole_graph_scores"] = self.scores.both
        shares = found.cumulative if self.whole_shares is None else self.whole_shares
        return replace(self, whole_shares=shares, provenance=known).keep(found.nodes, found.edges)

    def save(self, path: str | Path) -> None:
        """Writes all of the graph in one file, which replaces an older one when it is complete; `load_graph` reads
        it."""
        npz.write_file(path, {name: getattr(self, name) for name in npz.STORED}, self.adjacency)

    def keep(self, nodes: Bool[np.ndarray, "N"], edges: Bool[np.ndarray, "N N"] | None = None) -> "Graph":
        """The graph of some nodes and edges; what the others brought is added to `rest`. Embeddings and outputs
        stay."""
        nodes = np.asarray(nodes) | self.nodes.is_of("token", "position", "output")
        kept = np.flatnonzero(nodes)
        renumbered = np.cumsum(nodes) - 1
        adjacency = np.zeros((len(kept), len(kept)), self.adjacency.dtype)
        lost, lost_mass = np.zeros(len(self), adjacency.dtype), np.zeros(len(self), adjacency.dtype)
        for rows in row_blocks(len(self), self.adjacency.itemsize, kept):
            block = self.adjacency[rows]
            inside = np.broadcast_to(nodes, block.shape) if edges is None else edges[rows] & nodes
            adjacency[renumbered[rows]] = np.where(inside, block, 0)[:, kept]
            block[inside] = 0
            lost[rows] = block.sum(axis=1)
            lost_mass[rows] = np.abs(block, out=block).sum(axis=1)
        kept_nodes = None
        if "nodes" in self.annotations:
            kept_nodes = [note for note, kept in zip(self.annotations["nodes"], nodes, strict=True) if kept]
        return replace(
            self,
            adjacency=adjacency,
            bias=self.bias[nodes],
            rest=(self.rest + lost)[nodes],
            rest_mass=(self.rest_mass + lost_mass)[nodes],
            nodes=self.nodes.select(nodes),
            activations=self.activations[nodes[self.nodes.of("feature")]],
            supernodes={
                name: tuple(int(renumbered[node]) for node in members if nodes[node])
                for name, members in self.supernodes.items()
            },
            annotations=self.annotations if kept_nodes is None else self.annotations | {"nodes": kept_nodes},
            whole_shares=self.cumulative_shares[nodes],
        )
