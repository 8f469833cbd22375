"""Reading the graph files that `Graph.save` writes."""

from pathlib import Path

from jclt.graphs import npz
from jclt.graphs.check import check_graph, check_layers
from jclt.graphs.graph import Graph
from jclt.graphs.nodes import build_node_table

OUTPUT_LISTS = ("logit_tokens", "logit_positions")
NODE_LISTS = ("features", "errors", "tokens", "positions", *OUTPUT_LISTS, "values", *npz.OPTIONAL_NODES)
"""The stored lists from which the node table is built."""


def load_graph(path: str | Path) -> Graph:
    """Reads a graph that `Graph.save` wrote. No code in the file is executed."""
    path = Path(path)
    stored, adjacency = npz.read_file(path)
    check_layers(stored["layers"], path)
    table = build_node_table(layers=stored["layers"], **{name: stored.pop(name) for name in NODE_LISTS})
    stored["supernodes"] = {name: tuple(nodes) for name, nodes in stored["supernodes"].items()}
    graph = Graph(adjacency=adjacency, nodes=table, **stored)
    check_graph(graph, path)
    return graph
