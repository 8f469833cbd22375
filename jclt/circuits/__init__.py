"""Circuits: which parts of a model matter to an answer, and whether they do it without the rest.

Reading order, of nodes: `nodes.py` (what a node is), `rules.py` (rules of the backward pass), `passes.py` and
`gradients.py`, `node_scores.py` (what users call) with `saturation.py` and `exact.py`, `node_runs.py` (the model with
all nodes outside a circuit ablated). `jclt.evaluation` grades circuits.
"""

from jclt.circuits.node_runs import run_circuits
from jclt.circuits.node_scores import NodeScores, score_nodes
from jclt.circuits.nodes import BASES, Basis, find_basis
from jclt.circuits.rules import RULE_SETS, RULES

__all__ = [
    "BASES",
    "RULES",
    "RULE_SETS",
    "Basis",
    "NodeScores",
    "find_basis",
    "run_circuits",
    "score_nodes",
]
