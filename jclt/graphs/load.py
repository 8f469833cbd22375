"""Reading our own graph files."""

from pathlib import Path

from jclt.graphs import npz
from jclt.graphs.check import check_graph, check_layers
from jclt.graphs.graph import Graph
from jclt.graphs.nodes import node_table

LISTS = ("features", "errors", "tokens", "positions", "logit_tokens", "logit_positions", "values")
"""What the file holds of the node table, kind by kind."""


def load_graph(path: str | Path) -> Graph:
    """Reads what `Graph.save` wrote; nothing in the file is run."""
    path = Path(path)
    found, adjacency = npz.read_file(path)
    check_layers(found["layers"], path)
    table = node_table(layers=found["layers"], **{name: found.pop(name) for name in LISTS})
    found["supernodes"] = {name: tuple(nodes) for name, nodes in found["supernodes"].items()}
    graph = Graph(adjacency=adjacency, nodes=table, **found)
    check_graph(graph, path)
    return graph
