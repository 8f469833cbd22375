"""What a sparse coder is worth: its reconstruction, its replacement model, and what it keeps of the small world."""

from jclt.evaluation.exchange import StateExchange, state_exchange
from jclt.evaluation.reconstruction import Reconstruction, evaluate_reconstruction
from jclt.evaluation.replacement import (
    Replacement,
    check_replaceable,
    evaluate_replacement,
    mean_writes,
    replaced_logits,
)
from jclt.evaluation.world import TaskAgreement, WorldAgreement, world_agreement

__all__ = [
    "Reconstruction",
    "Replacement",
    "StateExchange",
    "TaskAgreement",
    "WorldAgreement",
    "check_replaceable",
    "evaluate_reconstruction",
    "evaluate_replacement",
    "mean_writes",
    "replaced_logits",
    "state_exchange",
    "world_agreement",
]
