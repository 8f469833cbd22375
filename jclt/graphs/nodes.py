"""The node table: what each node of an attribution graph is, where it stands and its value."""

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from jclt.errors import UserError
from jclt.shapes import Bool, Float, Int

Kind = Literal["feature", "error", "token", "position", "output"]
KINDS: tuple[Kind, ...] = ("feature", "error", "token", "position", "output")
"""Token and position are embeddings."""


@dataclass(frozen=True, eq=False)
class NodeTable:
    """Columns with one entry per node. Nodes of one kind stand together, in the order of `KINDS`."""

    kind: np.ndarray  # [N], the kind's name
    layer: Int[np.ndarray, "N"]  # -1 for embeddings; for outputs the number of layers
    position: Int[np.ndarray, "N"]
    index: Int[np.ndarray, "N"]  # a feature's number, an embedding's or output's token; -1 where there is none
    value: Float[np.ndarray, "N"]  # a feature's pre-activation, an output's logit less the mean logit; else 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if len(getattr(self, field.name)) != len(self.kind):
                raise UserError(f"graph: {field.name} of {len(getattr(self, field.name))} nodes, not {len(self.kind)}")

    def __len__(self) -> int:
        return len(self.kind)

    def is_of(self, *kinds: Kind) -> Bool[np.ndarray, "N"]:
        """For each node whether it is of one of these kinds."""
        return np.isin(self.kind, kinds)

    def of(self, *kinds: Kind) -> Int[np.ndarray, "_"]:
        """The numbers of all nodes of these kinds, kind after kind."""
        return np.concatenate([np.flatnonzero(self.kind == kind) for kind in kinds])

    def select(self, kept: np.ndarray) -> "NodeTable":
        """The table of some of its nodes, in the same order."""
        return NodeTable(*(getattr(self, field.name)[kept] for field in fields(self)))


def node_table(
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
    """The table of nodes that are listed kind by kind: features as layer, position, number; errors as layer, position;
    the tokens of the prompt, in order; positions that have an embedding of their own; outputs."""
    lists = (features, errors, tokens, positions, logit_tokens)
    if len(values) != sum(map(len, lists)):
        raise UserError(f"graph: {len(values)} values, expected one for each of {sum(map(len, lists))} nodes")
    layer = (features[:, 0], errors[:, 0], _all(-1, tokens), _all(-1, positions), _all(layers, logit_tokens))
    position = (features[:, 1], errors[:, 1], np.arange(len(tokens)), positions, logit_positions)
    index = (features[:, 2], _all(-1, errors), tokens, _all(-1, positions), logit_tokens)
    return NodeTable(
        np.repeat(KINDS, [len(nodes) for nodes in lists]),
        *(np.concatenate(parts).astype(np.int64) for parts in (layer, position, index)),
        value=values,
    )


def _all(number: int, nodes: np.ndarray) -> Int[np.ndarray, "n"]:
    return np.full(len(nodes), number)
