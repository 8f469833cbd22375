"""What the JSON of published graph viewers says, for writing and for reading it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jclt.graphs.graph import Graph
from jclt.graphs.nodes import Kind
from jclt.shapes import Float

Json = dict[str, Any]


Labels = Mapping[tuple[int, int], str]
"""What a feature is called, by its layer and number."""


TYPES: dict[Kind, str] = {
    "feature": "cross layer transcoder",  # the viewers know no other name, also for transcoders of one layer
    "error": "mlp reconstruction error",
    "token": "embedding",
    "position": "embedding",
    "output": "logit",
}


FIELDS = ("metadata", "qParams", "nodes", "links")


def notes_of(graph: Graph) -> list[Json]:
    return graph.annotations.get("nodes") or [{}] * len(graph)


def shortest_decimals(values: Float[np.ndarray, "n"]) -> list[float]:
    """The numbers as Python's, those of single precision as the shortest decimals that read back as the same."""
    if values.dtype == np.float64:
        return values.tolist()
    return values.astype(np.float32).astype("U32").astype(np.float64).tolist()


def are_groups(groups: Any) -> bool:
    return isinstance(groups, list) and all(
        isinstance(group, list) and group and all(isinstance(text, str) for text in group) for group in groups
    )


def named_groups(groups: Sequence[Sequence[str]], number: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Named sets of nodes; a name that is there already is numbered, an id that names no node is left out."""
    named: dict[str, tuple[int, ...]] = {}
    for name, *members in groups:
        free = next(new for i in range(1, 2 + len(named)) if (new := name if i == 1 else f"{name} ({i})") not in named)
        named[free] = tuple(number[node_id] for node_id in members if node_id in number)
    return named
