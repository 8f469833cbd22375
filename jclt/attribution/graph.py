"""The attribution graph: who adds how much to whom on one prompt, with what does not come from any node kept beside.

Nodes stand in the order features, errors, token embeddings, position embeddings, outputs. An edge is the part of its
target's value that its source puts there; the law that ties everything together is, for every feature and output,

    value = sum of the incoming edges + bias + rest
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jclt.errors import UserError, printable
from jclt.shapes import Bool, Float, Int

if TYPE_CHECKING:
    from jclt.attribution.influence import Scores

Kind = Literal["feature", "error", "token", "position", "output"]
KINDS: tuple[Kind, ...] = ("feature", "error", "token", "position", "output")


@dataclass(frozen=True)
class Graph:
    adjacency: Float[np.ndarray, "N N"]  # row = target, column = source
    bias: Float[np.ndarray, "N"]  # what reaches each target along paths that begin at biases, its own included
    rest: Float[np.ndarray, "N"]  # what reaches it from features, errors and edges that are not in this graph
    rest_mass: Float[np.ndarray, "N"]  # the same with each part's absolute value
    values: Float[np.ndarray, "N"]  # a feature's pre-activation, an output's logit less the mean one; of sources 0
    features: Int[np.ndarray, "n 3"]  # layer, position, feature; in this order
    activations: Float[np.ndarray, "n"]
    errors: Int[np.ndarray, "e 2"]  # layer, position; layer-major
    tokens: Int[np.ndarray, "T"]  # each has a node
    token_texts: tuple[str, ...]
    positions: Int[np.ndarray, "q"]  # those whose embedding is a node: all where the model learns them, else none
    logit_tokens: Int[np.ndarray, "k"]  # -1: an output that is no single token
    logit_names: tuple[str, ...]
    logit_positions: Int[np.ndarray, "k"]
    logit_probabilities: Float[np.ndarray, "k"]  # the model's own; 0 for an output that is no single token
    layers: int  # of the model
    provenance: dict[str, Any] = field(default_factory=dict)  # model, coder, settings, version; JSON
    supernodes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # named sets of nodes
    annotations: dict[str, Any] = field(default_factory=dict)  # what a viewer's file says beyond this; JSON
    logit_weights: Float[np.ndarray, "k"] | None = None  # what each output counts in influence; None: its probability
    whole_shares: Float[np.ndarray, "N"] | None = None  # in a pruned graph: `cumulative_share` in the whole graph

    def __post_init__(self) -> None:
        counts = self.counts
        nodes, features, outputs = sum(counts.values()), counts["feature"], counts["output"]
        expected = {
            "adjacency": (nodes, nodes),
            **dict.fromkeys(("bias", "rest", "rest_mass", "values", "whole_shares"), (nodes,)),
            "features": (features, 3),
            "activations": (features,),
            "errors": (counts["error"], 2),
            "token_texts": (counts["token"],),
            **dict.fromkeys(("logit_names", "logit_positions", "logit_probabilities", "logit_weights"), (outputs,)),
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

    @property
    def counts(self) -> dict[Kind, int]:
        """Nodes of each kind, in their order."""
        lists = (self.features, self.errors, self.tokens, self.positions, self.logit_tokens)
        return {kind: len(nodes) for kind, nodes in zip(KINDS, lists, strict=True)}

    def __len__(self) -> int:
        return len(self.adjacency)

    def nodes(self, *kinds: Kind) -> Int[np.ndarray, "_"]:
        """The numbers of all nodes of these kinds."""
        ends = np.cumsum([0, *self.counts.values()])
        return np.concatenate([np.arange(ends[KINDS.index(kind)], ends[KINDS.index(kind) + 1]) for kind in kinds])

    @property
    def kinds(self) -> Int[np.ndarray, "N"]:
        """Each node's place in `KINDS`."""
        return np.repeat(np.arange(len(KINDS)), list(self.counts.values()))

    @property
    def node_layers(self) -> Int[np.ndarray, "N"]:
        """-1 for embeddings, the number of layers for outputs."""
        outside = [np.full(len(self.tokens) + len(self.positions), -1), np.full(len(self.logit_tokens), self.layers)]
        return np.concatenate([self.features[:, 0], self.errors[:, 0], *outside]).astype(np.int64)

    @property
    def node_positions(self) -> Int[np.ndarray, "N"]:
        places = (np.arange(len(self.tokens)), self.positions, self.logit_positions)
        return np.concatenate([self.features[:, 1], self.errors[:, 1], *places]).astype(np.int64)

    @property
    def residual(self) -> Float[np.ndarray, "N"]:
        """By how much the law is missed, at features and outputs: rounding, if all is well."""
        found = self.adjacency.sum(axis=1, dtype=np.float64) + self.bias + self.rest
        return np.where(np.isin(self.kinds, (0, 4)), found - self.values, 0.0)

    def prune(
        self,
        node_threshold: float = 0.8,
        edge_threshold: float = 0.98,
        rule: Literal["paper", "circuit-tracer"] = "paper",
    ) -> "Graph":
        """See `pruning.prune`."""
        from jclt.attribution.pruning import prune

        return prune(self, node_threshold, edge_threshold, rule)

    @property
    def scores(self) -> "Scores":
        """See `influence.scores`."""
        from jclt.attribution.influence import scores

        return scores(self)

    def save(self, path: str | Path) -> None:
        """See `files.save_graph`; `load_graph` reads it."""
        from jclt.attribution.files import save_graph

        save_graph(self, path)

    def keep(self, nodes: Bool[np.ndarray, "N"], edges: Bool[np.ndarray, "N N"] | None = None) -> "Graph":
        """The graph of some nodes and edges; what the others brought is added to `rest`. Embeddings and outputs
        stay."""
        from jclt.attribution.influence import row_blocks, whole_shares

        nodes = np.asarray(nodes) | np.isin(self.kinds, (2, 3, 4))
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
        features, errors = nodes[self.nodes("feature")], nodes[self.nodes("error")]
        kept_nodes = None
        if "nodes" in self.annotations:
            kept_nodes = [note for note, kept in zip(self.annotations["nodes"], nodes, strict=True) if kept]
        return replace(
            self,
            adjacency=adjacency,
            bias=self.bias[nodes],
            rest=(self.rest + lost)[nodes],
            rest_mass=(self.rest_mass + lost_mass)[nodes],
            values=self.values[nodes],
            features=self.features[features],
            activations=self.activations[features],
            errors=self.errors[errors],
            supernodes={
                name: tuple(int(renumbered[node]) for node in members if nodes[node])
                for name, members in self.supernodes.items()
            },
            annotations=self.annotations if kept_nodes is None else self.annotations | {"nodes": kept_nodes},
            whole_shares=whole_shares(self)[nodes],
        )
