"""Measures of a sparse coder: its reconstruction, its replacement model, and how it does on the small world."""

from jclt.evaluation.exchange import StateExchange, exchange_states
from jclt.evaluation.reconstruction import Reconstruction, evaluate_reconstruction
from jclt.evaluation.replacement import (
    Replacement,
    check_replaceable,
    compute_replaced_logits,
    evaluate_replacement,
    measure_mean_writes,
)
from jclt.evaluation.world import TaskAgreement, WorldAgreement, measure_world_agreement

__all__ = [
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
