"""Supernodes of a graph: edits that scale their members alike or swap them between prompts, and how active they are."""

from collections.abc import Iterable

import numpy as np

from jclt.errors import UserError, suggest_name
from jclt.graphs import Graph
from jclt.interventions.result import Intervention
from jclt.models import Scale, Set, SiteEdit

Members = str | Iterable[int]
"""A supernode's name, or numbers of nodes."""


def scale_nodes(graph: Graph, members: Members, factor: float) -> list[SiteEdit]:
    """Edits that multiply the activation of every feature, and every error, among these nodes."""
    edits: list[SiteEdit] = []
    for node in find_members(graph, members):
        kind, layer, position = graph.nodes.kind[node], int(graph.nodes.layer[node]), int(graph.nodes.position[node])
        if kind == "feature":
            feature = int(graph.nodes.index[node])
            edits.append(Scale(factor, layer=layer, position=position, feature=feature))
        elif kind == "error":
            edits.append(Scale(factor, site="errors", layer=layer, position=position))
        else:
            raise UserError(f"node {node}: a {kind}, expected a feature or an error")
    return edits


def swap_nodes(graph: Graph, members: Members, other: Graph, other_members: Members) -> list[SiteEdit]:
    """Edits, for the prompt of `graph`, that replace the features of its supernode by those of the other graph's.

    The features among `members` are set to 0, and those among `other_members` to their activations on the other prompt,
    at positions as far from the end of this prompt as they are from the end of the other one.
    """
    shift = len(graph.tokens) - len(other.tokens)
    values = {cell: 0.0 for cell, _ in list_features(graph, members)}
    for (layer, position, feature), activation in list_features(other, other_members):
        if position + shift < 0:
            raise UserError(f"node at position {position} of the other prompt: there is no such place in this one")
        values[layer, position + shift, feature] = activation
    edits: list[SiteEdit] = []
    for (layer, position, feature), value in values.items():
        edits.append(Set(value, layer=layer, position=position, feature=feature))
    return edits


def list_features(graph: Graph, members: Members) -> list[tuple[tuple[int, int, int], float]]:
    """Layer, position and number of each feature among the nodes, and its activation."""
    features = graph.nodes.find("feature")
    listed = []
    for node in find_members(graph, members):
        if graph.nodes.kind[node] != "feature":
            raise UserError(f"node {node}: a {graph.nodes.kind[node]}, expected a feature")
        number = int(np.flatnonzero(features == node)[0])
        layer, position, feature = graph.features[number].tolist()
        listed.append(((layer, position, feature), float(graph.activations[number])))
    return listed


def find_members(graph: Graph, members: Members) -> list[int]:
    """The numbers of the nodes; an error if one does not exist."""
    if isinstance(members, str):
        if members not in graph.supernodes:
            raise UserError(
                f"supernode '{members}': the graph has none of this name; {suggest_name(members, graph.supernodes)}"
            )
        members = graph.supernodes[members]
    numbers = [int(node) for node in members]
    for node in numbers:
        if not 0 <= node < len(graph):
            raise UserError(f"node {node}: expected 0 to {len(graph) - 1}")
    return numbers


def measure_shares(graph: Graph, result: Intervention) -> dict[str, float]:
    """For each supernode with active features, its activation after the intervention as a share of the original: the
    sum over its features after, divided by the sum before."""
    f = result.features
    after = dict(zip(zip(f.layer, f.position, f.feature, strict=True), f.after, strict=True))
    shares = {}
    for name, members in graph.supernodes.items():
        features = [node for node in members if graph.nodes.kind[node] == "feature"]
        cells = list_features(graph, features)
        before = sum(activation for _, activation in cells)
        if before > 0:
            shares[name] = float(sum(after.get(cell, 0.0) for cell, _ in cells) / before)
    return shares
