"""The node table: the kind, layer, position and value of each node in an attribution graph."""

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from jclt.errors import UserError
from jclt.shapes import Bool, Float, Int

Kind = Literal["feature", "error", "token", "position", "output"]
KINDS: tuple[Kind, ...] = ("feature", "error", "token", "position", "output")
"""
feature   an active feature of the coder
error     at one layer and position, what the coder fails to reconstruct
token     a token's embedding
position  a position's embedding, in models that learn them
output    a logit, or another linear function of the final residual stream
"""


@dataclass(frozen=True, eq=False)
class NodeTable:
    """One column per property, one entry per node. The nodes are sorted by kind, in the order of `KINDS`."""

    kind: np.ndarray  # [N], the kind's name
    layer: Int[np.ndarray, "N"]  # -1 for embeddings; the model's number of layers for outputs
    position: Int[np.ndarray, "N"]
    index: Int[np.ndarray, "N"]  # the feature's number, or the token of an embedding or output; -1 if there is none
    value: Float[np.ndarray, "N"]  # a feature's pre-activation, an output's logit minus the mean logit; else 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if len(getattr(self, field.name)) != len(self.kind):
                raise UserError(f"graph: {field.name} of {len(getattr(self, field.name))} nodes, not {len(self.kind)}")

    def __len__(self) -> int:
        return len(self.kind)

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
) -> NodeTable:
    """Builds the table from one list for each kind.

    features   layer, position and number of each feature
    errors     layer and position of each error
    tokens     the tokens of the prompt, in order
    positions  the positions that have an embedding
    logit_*    token and position of each output
    """
    lists = (features, errors, tokens, positions, logit_tokens)
    if len(values) != sum(map(len, lists)):
        raise UserError(f"graph: {len(values)} values, expected one for each of {sum(map(len, lists))} nodes")
    layer = (features[:, 0], errors[:, 0], _repeat(-1, tokens), _repeat(-1, positions), _repeat(layers, logit_tokens))
    position = (features[:, 1], errors[:, 1], np.arange(len(tokens)), positions, logit_positions)
    index = (features[:, 2], _repeat(-1, errors), tokens, _repeat(-1, positions), logit_tokens)
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
