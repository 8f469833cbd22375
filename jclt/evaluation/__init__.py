"""Measures of a sparse coder: its reconstruction, its replacement model, how it does on the small world; and of its
graphs: whether they say what interventions find.

Reading order, of graphs: `intervals.py` (figures), `faithfulness.py`, `graph_figures.py`, `circuits.py`,
`perturbations.py` with `distances.py` and `verdict.py`; `questions.py` (the command line's), `global_weights.py` and
`operand_grids.py` (weights, and addition). Of circuits of nodes: `circuit_grades.py`.
"""

from jclt.evaluation.circuit_grades import (
    CircuitGrades,
    area_under_roc,
    compute_faithfulness,
    grade_nodes,
    measure_minimality,
)
from jclt.evaluation.circuits import measure_circuits
from jclt.evaluation.distances import measure_distances
from jclt.evaluation.edge_grades import grade_edges, list_sizes
from jclt.evaluation.exchange import StateExchange, exchange_states
from jclt.evaluation.faithfulness import measure_faithfulness
from jclt.evaluation.global_weights import GlobalWeights, measure_global_weights
from jclt.evaluation.graph_figures import measure_graphs, threshold_neurons
from jclt.evaluation.intervals import Figure
from jclt.evaluation.operand_grids import OperandGrids, measure_operand_grids
from jclt.evaluation.reconstruction import Reconstruction, evaluate_reconstruction
from jclt.evaluation.replacement import (
    Replacement,
    check_replaceable,
    compute_replaced_logits,
    evaluate_replacement,
    measure_mean_writes,
)
from jclt.evaluation.verdict import Verdict, verify
from jclt.evaluation.world import TaskAgreement, WorldAgreement, measure_world_agreement

__all__ = [
    "CircuitGrades",
    "Figure",
    "GlobalWeights",
    "OperandGrids",
    "Verdict",
    "area_under_roc",
    "compute_faithfulness",
    "grade_edges",
    "grade_nodes",
    "list_sizes",
    "measure_circuits",
    "measure_minimality",
    "measure_distances",
    "measure_faithfulness",
    "measure_global_weights",
    "measure_graphs",
    "measure_operand_grids",
    "threshold_neurons",
    "verify",
    "Reconstruction",
    "Replacement",
    "StateExchange",
    "TaskAgreement",
    "WorldAgreement",
    "check_replaceable",
    "evaluate_reconstruction",
    "evaluate_replacement",
    "measure_mean_writes",
    "compute_replaced_logits",
    "exchange_states",
    "measure_world_agreement",
]
