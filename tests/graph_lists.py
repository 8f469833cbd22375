"""Graphs of which the nodes are given kind by kind."""

from dataclasses import replace
from typing import Any

from jclt.graphs import Graph, node_table

LISTS = ("features", "errors", "tokens", "positions", "logit_tokens", "logit_positions", "values")


def listed_graph(**given: Any) -> Graph:
    table = node_table(layers=given["layers"], **{name: given.pop(name) for name in LISTS})
    return Graph(nodes=table, **given)


def with_lists(graph: Graph, **changes: Any) -> Graph:
    """The graph with other lists of nodes, or of anything else."""
    lists = {name: changes.pop(name, getattr(graph, name)) for name in LISTS}
    table = node_table(layers=changes.get("layers", graph.layers), **lists)
    return replace(graph, nodes=table, **changes)
