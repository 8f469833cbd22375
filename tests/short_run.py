"""What tests of training share: a run of a few seconds, a mesh of one device, what a run's folder holds."""

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

ONE_DEVICE_MESH = make_mesh(1, 1)

IGNORE_ABANDONED_LOADS = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""Where one array cannot be loaded, Orbax abandons the loads of the others, and Python warns when it collects them."""


def read_losses(folder: Path) -> np.ndarray:
    return np.array([entry["loss"] for entry in read_metrics(folder / "metrics.jsonl") if "loss" in entry])


def list_array_files(checkpoint: Path) -> list[Path]:
    """The files with the arrays of a checkpoint."""
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.parent.name == "d")
