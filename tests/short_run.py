"""What tests of runs share: the settings of a run of a few seconds, one device here or elsewhere, a log's losses."""

import os
from pathlib import Path

import numpy as np
import pytest

from jclt.coders import CoderConfig
from jclt.mesh import make_mesh
from jclt.training.config import TrainConfig
from jclt.training.metrics import read_metrics

CONFIG = TrainConfig(
    CoderConfig(features=64, layers=(0, 2)),
    steps=50,
    batch=8,
    length=16,
    warmup=5,
    learning_rate=1e-3,
    sparsity_weight=0.1,
    save_every=50,
    log_every=1,
    evaluate_every=-1,
)

ONE = make_mesh(1, 1)
"""Here, the mesh of one device."""

ONE_DEVICE = {"XLA_FLAGS": os.environ["XLA_FLAGS"].partition(" ")[2]}
"""The environment of a process that has one device unless told otherwise: conftest's flags but for the first."""

LOADS_LEFT = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""If one array cannot be loaded, Orbax leaves the loads of the others, whose event loop is then closed."""


def read_losses(folder: Path) -> np.ndarray:
    return np.array([entry["loss"] for entry in read_metrics(folder / "metrics.jsonl") if "loss" in entry])
