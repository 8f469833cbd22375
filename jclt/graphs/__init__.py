"""Attribution graphs as objects: nodes, edges, influence, pruning, paths and files. numpy alone."""

from jclt.graphs.circuit_tracer_pt import read_circuit_tracer
from jclt.graphs.combine import average_graphs, find_shared_features, subtract_graphs, tabulate_influence
from jclt.graphs.curve import CurvePoint, curve
from jclt.graphs.export_json import export_json, slug_of
from jclt.graphs.graph import Graph
from jclt.graphs.import_json import import_json
from jclt.graphs.influence import Scores
from jclt.graphs.load import load_graph
from jclt.graphs.names import label_nodes, list_labels, name_of
from jclt.graphs.nodes import KINDS, Kind, NodeTable, build_node_table
from jclt.graphs.paths import (
    Path,
    between_supernodes,
    describe,
    path_lengths,
    strongest_paths,
    with_supernodes,
)
from jclt.graphs.pruning import Masks
from jclt.graphs.supernodes import Supernode, add_supernodes, suggest_supernodes
from jclt.graphs.viewer_index import write_index

__all__ = [
    "KINDS",
    "CurvePoint",
    "Graph",
    "Kind",
    "Masks",
    "NodeTable",
    "Path",
    "Scores",
    "Supernode",
    "add_supernodes",
    "average_graphs",
    "between_supernodes",
    "curve",
    "describe",
    "export_json",
    "find_shared_features",
    "import_json",
    "label_nodes",
    "list_labels",
    "load_graph",
    "name_of",
    "build_node_table",
    "path_lengths",
    "read_circuit_tracer",
    "slug_of",
    "strongest_paths",
    "subtract_graphs",
    "suggest_supernodes",
    "tabulate_influence",
    "with_supernodes",
    "write_index",
]
