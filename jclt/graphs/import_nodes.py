"""Nodes and links as a viewer's file lists them."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jclt.errors import UserError
from jclt.graphs.nodes import Kind
from jclt.graphs.viewer_json import FEATURE_TYPES
from jclt.shapes import Float, Int

BY_ID: dict[str, Kind] = {"P": "position", "H": "head", "R": "stream"}
"""Kinds of nodes whose ids begin with this letter; they have the feature_type of another kind, or share one."""


class FileNode:
    """A node of a file, and the meaning of its fields."""

    def __init__(self, path: Path, fields: Any, length: int):
        if not isinstance(fields, dict) or not isinstance(fields.get("node_id"), str):
            raise UserError(f"{path}: a node has no node_id, expected an object with one")
        self.path, self.fields, self.id = path, fields, fields["node_id"]
        kinds: dict[Any, Kind] = {name: kind for kind, name in FEATURE_TYPES.items() if kind not in BY_ID.values()}
        kind = kinds.get(str(fields.get("feature_type")))
        special = BY_ID.get(self.id[:1]) if re.match(r"P_|[HR]\d", self.id) else None
        if special is not None and FEATURE_TYPES[special] == fields.get("feature_type"):
            kind = special
        if kind is None:
            types = ", ".join(f"'{name}'" for name in kinds)
            unknown = repr(fields.get("feature_type"))[:80]
            raise UserError(f"{path}: node '{self.id}' is of feature_type {unknown}, expected one of {types}")
        self.kind: Kind = kind
        position = fields.get("ctx_idx")
        if type(position) is not int or not 0 <= position < length:
            raise UserError(
                f"{path}: node '{self.id}' has ctx_idx {str(position)[:80]}, expected one of {length} positions"
            )
        self.position: int = position
        # The feature's number is taken from the id. The field `feature` has another meaning in each schema version.
        parts = re.fullmatch(r"(E|[HR]?\d{1,9})_(-?\d{1,18})_\d{1,18}", self.id)
        if kind == "feature" and (parts is None or not parts[1].isdecimal() or int(parts[2]) < 0):
            raise UserError(f"{path}: node '{self.id}' is a feature, expected an id like layer_feature_position")
        self.feature = max(int(parts[2]), -1) if parts else -1
        self.layer = -1
        if kind == "feature" and parts is not None:
            self.layer = int(parts[1])
        elif kind in ("head", "stream"):
            if parts is None or not parts[1][1:].isdecimal() or int(parts[2]) < 0:
                raise UserError(f"{path}: node '{self.id}' is a {kind}, expected an id like {self.id[:1]}3_5_7")
            self.layer = int(parts[1][1:])
        elif kind in ("error", "output"):
            layer = str(fields.get("layer"))
            if not re.fullmatch(r"\d{1,9}", layer, re.ASCII):
                raise UserError(f"{path}: node '{self.id}' has layer {fields.get('layer')!r}, expected a number")
            self.layer = int(layer)

    @property
    def sort_key(self) -> tuple[int, ...]:
        """The order of nodes of one kind; outputs keep the order of the file."""
        return (0,) if self.kind == "output" else (self.layer, self.position, self.feature)

    @property
    def text(self) -> str:
        return str(self.fields.get("clerp") or "")

    def parse_number(self, name: str) -> float:
        """The number in this field; 0 if it is empty."""
        value = self.fields.get(name)
        if value is not None and type(value) not in (int, float):
            raise UserError(f"{self.path}: node '{self.id}' has {name} {str(value)[:80]!r}, expected a number")
        return to_float(value or 0)


class Links(NamedTuple):
    """Sources and targets are indices into the file's list of nodes."""

    sources: Int[np.ndarray, "n"]
    targets: Int[np.ndarray, "n"]
    weights: Float[np.ndarray, "n"]


def to_float(number: int | float) -> float:
    """Infinity for an integer that is too large."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def read_links(path: Path, nodes: Sequence[FileNode], links: Sequence[Any]) -> Links:
    """Reads the links, and gives a new id to each error that shares its id with a feature."""
    indices = _separate_shared_ids(path, nodes)
    sources, targets, weights = [], [], []
    last_source: dict[int, int] = {}  # of each target, in the links so far
    for source_id, target_id, weight in _parse_links(path, links):
        if target_id not in indices or source_id not in indices:
            unknown = source_id if source_id not in indices else target_id
            raise UserError(f"{path}: a link names the node '{unknown}', expected the id of one in its list")
        (source, *error), target = indices[source_id], indices[target_id][0]
        previous = last_source.get(target, -1)
        if error:
            # Two nodes share this id: which one is the source? circuit-tracer writes the links of each target in the
            # order of its nodes, errors after features, so the source must come after the previous one. This decides
            # all 79 such links of the one published file that has them, and all links from its error lead into higher
            # layers, as they must.
            source = source if previous < source else error[0]
            if previous >= source:
                raise UserError(
                    f"{path}: two nodes are '{source_id}' and the order of links does not tell which is which"
                )
        last_source[target] = source
        sources.append(source)
        targets.append(target)
        weights.append(weight)
    parsed = Links(np.array(sources, np.int64), np.array(targets, np.int64), np.array(weights, np.float64))
    _check_links(path, nodes, parsed)
    return parsed


def _parse_links(path: Path, links: Sequence[Any]) -> list[tuple[str, str, float]]:
    """The ids of source and target, and the weight, of each link."""
    parsed = []
    for link in links:
        try:
            source_id, target_id, weight = link["source"], link["target"], link["weight"]
        except (TypeError, KeyError, IndexError):
            raise UserError(f"{path}: a link is {str(link)[:80]}, expected source, target and weight") from None
        if not isinstance(source_id, str) or not isinstance(target_id, str):
            raise UserError(f"{path}: a link is {str(link)[:80]}, expected ids of nodes as source and target")
        number = to_float(weight) if type(weight) is int else weight
        if type(number) is not float or not math.isfinite(number):
            value = str(number)[:80]
            raise UserError(f"{path}: the link {source_id} -> {target_id} has weight {value}, expected a number")
        parsed.append((source_id, target_id, number))
    return parsed


def _check_links(path: Path, nodes: Sequence[FileNode], links: Links) -> None:
    """Raises an error if two links have the same source and target."""
    pairs, counts = np.unique(links.targets * len(nodes) + links.sources, return_counts=True)
    if len(pairs) < len(links.sources):
        target, source = divmod(int(pairs[np.argmax(counts)]), len(nodes))
        raise UserError(f"{path}: the link {nodes[source].id} -> {nodes[target].id} is there twice, expected once")


def _separate_shared_ids(path: Path, nodes: Sequence[FileNode]) -> dict[str, list[int]]:
    """The indices of the nodes of each id. If a feature and an error share an id, the error gets another."""
    indices: dict[str, list[int]] = {}
    for index, node in enumerate(nodes):
        indices.setdefault(node.id, []).append(index)
    for node_id, shared in list(indices.items()):
        if len(shared) > 1:
            if [nodes[index].kind for index in shared] != ["feature", "error"]:
                raise UserError(f"{path}: {len(shared)} nodes are '{node_id}', expected one")
            error = nodes[shared[1]]
            error.id = f"err_{error.layer}_{error.position}"
            if error.id in indices:
                raise UserError(f"{path}: 2 nodes are '{node_id}', expected one")
            indices[error.id] = shared[1:]
    return indices
