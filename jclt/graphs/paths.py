"""The graph in words: its nodes, its strongest paths, how long paths are, and groups of nodes."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jclt.errors import UserError, printable
from jclt.graphs.graph import Graph
from jclt.graphs.influence import FLOOR, normalize
from jclt.graphs.nodes import Kind
from jclt.shapes import Float


@dataclass(frozen=True)
class Path:
    """From a source to an output; the share of all walks from the outputs that goes this way, and its sign (1, -1)."""

    nodes: tuple[int, ...]
    share: float
    sign: int


def name_of(graph: Graph, node: int) -> str:
    """The node in plain words."""
    _check_node(graph, node)
    nodes = graph.nodes
    kind, layer, position, index = (
        str(nodes.kind[node]),
        nodes.layer[node],
        int(nodes.position[node]),
        nodes.index[node],
    )
    match kind:
        case "feature":
            return f"layer {layer} feature {index} at {_token(graph, position)}"
        case "error":
            return f"error of layer {layer} at {_token(graph, position)}"
        case "token":
            return _token(graph, position)
        case "position":
            return f"position {position}"
        case _:
            name = graph.logit_names[node - int(nodes.of("output")[0])]
            return printable(name) if index < 0 else _quoted(name, int(index))


def describe(graph: Graph, path: Path, labels: Mapping[tuple[int, int], str] | None = None) -> str:
    """The path's nodes and share in one line; `labels` say what features stand for, by layer and feature."""
    names = []
    for node in path.nodes:
        name = name_of(graph, node)
        if labels and graph.nodes.kind[node] == "feature":
            label = labels.get((int(graph.nodes.layer[node]), int(graph.nodes.index[node])))
            name = name.replace(" at ", f" ({printable(label)}) at ", 1) if label else name
        names.append(name)
    return f"{' -> '.join(names)} {path.share:.1%}{', against it' if path.sign < 0 else ''}"


def path_lengths(graph: Graph, kinds: Sequence[Kind] = ("token", "position", "error")) -> Float[np.ndarray, "l"]:
    """Of the walks from the outputs that end at nodes of these kinds, the share of each number of edges, from 0 on."""
    shares, ends = normalize(graph.edges), graph.nodes.of(*kinds)
    lengths = np.zeros(graph.layers + 2)
    walkers = graph.output_weights
    for length in range(1, len(lengths)):
        walkers = walkers @ shares
        lengths[length] = walkers[ends].sum(dtype=np.float64)
    return lengths / (lengths.sum() or 1)


def strongest_paths(
    graph: Graph, count: int = 5, target: int | None = None, kinds: Sequence[Kind] = ("token",)
) -> list[Path]:
    """The paths from nodes of these kinds to the outputs, or to one target node, that carry most: the product of each
    edge's share of its target and, among outputs, of the output's share of their weight. Exact, the strongest first."""
    if count < 1:
        raise UserError(f"count={count}: expected at least 1 path")
    start = _start(graph, target)
    shares, layers = normalize(graph.edges), graph.nodes.layer
    best = np.zeros((len(graph), count))  # of the paths down to each node the strongest, in order
    best[:, 0] = start
    above = np.full((len(graph), count), -1)  # the node before on each of these, and which of its paths it continues
    rank = np.zeros((len(graph), count), int)
    for layer in np.unique(layers[layers < layers[start > 0].max(initial=-1)])[::-1]:
        columns = np.flatnonzero(layers == layer)
        targets = np.flatnonzero((best[:, 0] > 0) & (layers > layer))
        # The strongest few paths pass through no other targets than those that have the strongest first path.
        first = best[targets, 0][:, None] * shares[np.ix_(targets, columns)]
        few = min(count, len(targets))
        via = targets[np.argpartition(-first, few - 1, axis=0)[:few]].T
        products = best[via] * shares[via, columns[:, None]][:, :, None]
        products = products.reshape(len(columns), few * count)
        order = np.argsort(-products, axis=1, kind="stable")[:, :count]
        found = np.take_along_axis(products, order, axis=1)
        fresh = np.where(found > 0, np.take_along_axis(via, order // count, axis=1), -1)
        best[columns], above[columns], rank[columns] = found, fresh, order % count
    sources = graph.nodes.of(*kinds)
    values = np.where(above[sources] >= 0, best[sources], 0).ravel()
    return [
        _traced(graph, best, above, rank, int(sources[place // count]), place % count)
        for place in np.argsort(-values, kind="stable")[:count].tolist()
        if values[place] > 0
    ]


def with_supernodes(graph: Graph, groups: Mapping[str, Iterable[int]]) -> Graph:
    """The graph with these named sets of nodes in place of those it had."""
    owner: dict[int, str] = {}
    members = {name: tuple(int(node) for node in nodes) for name, nodes in groups.items()}
    for name, nodes in members.items():
        for node in nodes:
            _check_node(graph, node, f"supernode '{name}': ")
            if node in owner:
                raise UserError(f"supernode '{name}': node {node} is in '{owner[node]}' already, expected it once")
            owner[node] = name
    return replace(graph, supernodes=members)


def between_supernodes(graph: Graph, others: bool = False) -> tuple[list[str], Float[np.ndarray, "S S"]]:
    """The supernodes' names and the edges between them, row = target; with `others` each remaining node is one too.

    An edge is what the source's members bring to a member of the target, signs kept, as a share of all absolute values
    that reach this member; averaged over the target's members by their influence. So a row's absolute values sum to at
    most 1, and with one node a group it is the row of signed shares.
    """
    groups = dict(graph.supernodes)
    if others:
        grouped = {node for members in groups.values() for node in members}
        alone = [node for node in range(len(graph)) if node not in grouped]
        names, sets = [*groups, *(name_of(graph, node) for node in alone)], [*groups.values(), *((n,) for n in alone)]
    else:
        names, sets = list(groups), list(groups.values())
    member = np.zeros((len(sets), len(graph)))
    for row, nodes in zip(member, sets, strict=True):
        row[list(nodes)] = 1
    weights = member * (graph.influence + graph.output_weights)
    # Where no walk comes, all members count the same.
    weights = np.where(weights.sum(axis=1, keepdims=True) > 0, weights, member)
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), FLOOR)
    signed = np.copysign(normalize(graph.edges), graph.adjacency)
    return names, weights @ (signed @ member.T)


def _start(graph: Graph, target: int | None) -> np.ndarray:
    """Where walks start: at the outputs by their weight, or at the one target."""
    if target is None:
        weights = graph.output_weights.astype(np.float64)
        return weights / (weights.sum() or 1)
    _check_node(graph, target)
    start = np.zeros(len(graph))
    start[target] = 1
    return start


def _traced(graph: Graph, best: np.ndarray, above: np.ndarray, rank: np.ndarray, node: int, place: int) -> Path:
    share, nodes = float(best[node, place]), [node]
    while (target := int(above[node, place])) >= 0:
        place = int(rank[node, place])
        node = target
        nodes.append(node)
    negative = sum(int(graph.adjacency[b, a] < 0) for a, b in zip(nodes, nodes[1:], strict=False))
    return Path(tuple(nodes), share, -1 if negative % 2 else 1)


def _check_node(graph: Graph, node: int, where: str = "") -> None:
    if not 0 <= node < len(graph):
        raise UserError(f"{where}node {node}: expected a number from 0 to {len(graph) - 1}")


def _token(graph: Graph, position: int) -> str:
    return f"{_quoted(graph.token_texts[position], int(graph.tokens[position]))} ({position})"


def _quoted(text: str, token: int) -> str:
    """The text as it would be written in a program, or the token's number where no text is known."""
    return printable(json.dumps(text, ensure_ascii=False)) if text else f"token {token}"
