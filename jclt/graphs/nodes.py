"""The node table: the kind, layer, position and value of each node in an attribution graph."""

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from jclt.errors import UserError
from jclt.shapes import Bool, Float, Int

Kind = Literal["feature", "error", "token", "position", "head", "stream", "output"]
KINDS: tuple[Kind, ...] = ("feature", "error", "token", "position", "head", "stream", "output")
"""
feature   an active feature of the coder
error     at one layer and position, what the coder fails to reconstruct
token     a token's embedding
position  a position's embedding, in models that learn them
head      what an attention head writes at one position
stream    the residual stream that enters a layer, at one position
output    a logit, or another linear function of the final residual stream
"""


def compute_order(layer: Int[np.ndarray, "N"], kind: np.ndarray | Kind) -> Int[np.ndarray, "N"]:
    """A node's place in the order of edges. In a layer, heads read the stream that enters it, and features read what
    heads write."""
    return 3 * layer + np.where(kind == "stream", 0, np.where(kind == "head", 1, 2))


def find_layer(order: int) -> int:
    """The layer of the nodes at this place in the order."""
    return order // 3


@dataclass(frozen=True, eq=False)
class NodeTable:
    """One column per property, one entry per node. The nodes are sorted by kind, in the order of `KINDS`."""

    kind: np.ndarray  # [N], the kind's name
    layer: Int[np.ndarray, "N"]  # -1 for embeddings; the model's number of layers for outputs
    position: Int[np.ndarray, "N"]
    index: Int[np.ndarray, "N"]  # number of a feature or head, token of an embedding or output; -1 if there is none
    value: Float[np.ndarray, "N"]  # a feature's pre-activation, an output's logit minus the mean logit, what a head or
    # the stream at a position adds to the outputs' weighted sum to first order; else 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if len(getattr(self, field.name)) != len(self.kind):
                raise UserError(f"graph: {field.name} of {len(getattr(self, field.name))} nodes, not {len(self.kind)}")

    def __len__(self) -> int:
        return len(self.kind)

    @property
    def order(self) -> Int[np.ndarray, "N"]:
        """An edge leads from a lower number to a higher one."""
        return compute_order(self.layer, self.kind)

    @property
    def steps_per_layer(self) -> int:
        """The most nodes of one layer that a path visits."""
        return 1 + bool((self.kind == "head").any()) + bool((self.kind == "stream").any())

    def is_kind(self, *kinds: Kind) -> Bool[np.ndarray, "N"]:
        """A mask: for each node, whether it is of one of these kinds."""
        return np.isin(self.kind, kinds)

    def find(self, *kinds: Kind) -> Int[np.ndarray, "_"]:
        """The numbers of all nodes of these kinds, kind after kind."""
        return np.concatenate([np.flatnonzero(self.kind == kind) for kind in kinds])

    def select(self, kept: np.ndarray) -> "NodeTable":
        """The table of the kept nodes, in the same order."""
        return NodeTable(**{field.name: getattr(self, field.name)[kept] for field in fields(self)})


def build_node_table(
    *,
    layers: int,
    values: Float[np.ndarray, "N"],
    features: Int[np.ndarray, "n 3"],
    errors: Int[np.ndarray, "e 2"],
    tokens: Int[np.ndarray, "T"],
    positions: Int[np.ndarray, "q"],
    logit_tokens: Int[np.ndarray, "k"],
    logit_positions: Int[np.ndarray, "k"],
    heads: Int[np.ndarray, "h 3"] | None = None,
    streams: Int[np.ndarray, "r 2"] | None = None,
) -> NodeTable:
    """Builds the table from one list for each kind.

    features   layer, position and number of each feature
    errors     layer and position of each error
    tokens     the tokens of the prompt, in order
    positions  the positions that have an embedding
    heads      layer, position and number of each head, if any are nodes
    streams    layer and position of each residual stream, if any are nodes
    logit_*    token and position of each output
    """
    heads = np.zeros((0, 3), np.int64) if heads is None else heads
    streams = np.zeros((0, 2), np.int64) if streams is None else streams
    lists = (features, errors, tokens, positions, heads, streams, logit_tokens)
    if len(values) != sum(map(len, lists)):
        raise UserError(f"graph: {len(values)} values, expected one for each of {sum(map(len, lists))} nodes")
    outside = (_repeat(-1, tokens), _repeat(-1, positions))
    layer = (features[:, 0], errors[:, 0], *outside, heads[:, 0], streams[:, 0], _repeat(layers, logit_tokens))
    inside = (np.arange(len(tokens)), positions, heads[:, 1], streams[:, 1])
    position = (features[:, 1], errors[:, 1], *inside, logit_positions)
    unnumbered = _repeat(-1, positions), heads[:, 2], _repeat(-1, streams)
    index = (features[:, 2], _repeat(-1, errors), tokens, *unnumbered, logit_tokens)
    return NodeTable(
        kind=np.repeat(KINDS, [len(nodes) for nodes in lists]),
        layer=np.concatenate(layer).astype(np.int64),
        position=np.concatenate(position).astype(np.int64),
        index=np.concatenate(index).astype(np.int64),
        value=values,
    )


def _repeat(number: int, nodes: np.ndarray) -> Int[np.ndarray, "n"]:
    """The number, once for each node."""
    return np.full(len(nodes), number)
