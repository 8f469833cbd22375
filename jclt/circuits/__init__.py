"""Circuits: which parts of a model matter to an answer, and whether they do it without the rest.

Reading order, of nodes: `nodes.py` (what a node is), `rules.py` (rules of the backward pass), `passes.py` and
`gradients.py`, `node_scores.py` (what users call) with `saturation.py` and `exact.py`, `node_runs.py` (the model with
all nodes outside a circuit ablated). Of edges: `edges.py` (what an edge is), `edge_runs.py` (a pass along some edges),
`edge_ablations.py` (what goes along the others), `edge_gradients.py` and `edge_methods.py`, `edge_scores.py` (what
users call), `edge_circuits.py` (runs of circuits), `acdc.py`, `neuron_edges.py`, `feature_edges.py`, `edge_graphs.py`
and `edge_files.py`. `jclt.evaluation` grades circuits.
"""

from jclt.circuits.acdc import EdgeCircuit, find_circuit
from jclt.circuits.edge_circuits import run_edge_circuits
from jclt.circuits.edge_files import load_circuit, save_circuit
from jclt.circuits.edge_graphs import make_edge_graph
from jclt.circuits.edge_scores import EDGE_METHODS, EdgeScores, score_edges
from jclt.circuits.feature_edges import FeatureEdges, score_feature_edges
from jclt.circuits.neuron_edges import NeuronEdges, trace_neurons
from jclt.circuits.node_runs import run_circuits
from jclt.circuits.node_scores import NodeScores, score_nodes
from jclt.circuits.nodes import BASES, Basis, find_basis
from jclt.circuits.rules import RULE_SETS, RULES

__all__ = [
    "BASES",
    "EDGE_METHODS",
    "RULES",
    "RULE_SETS",
    "Basis",
    "EdgeCircuit",
    "EdgeScores",
    "FeatureEdges",
    "NeuronEdges",
    "NodeScores",
    "find_basis",
    "find_circuit",
    "load_circuit",
    "make_edge_graph",
    "run_circuits",
    "run_edge_circuits",
    "save_circuit",
    "score_edges",
    "score_feature_edges",
    "score_nodes",
    "trace_neurons",
]
