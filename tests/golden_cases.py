"""The reference checkpoints in `golden/`: a random model for each family and option."""

from functools import cache
from pathlib import Path

import numpy as np

from jclt.models import Model, load_model

FOLDER = Path(__file__).parent / "golden"
CASES = sorted(path.name for path in FOLDER.iterdir() if (path / "reference.npz").exists())


@cache
def golden_model(case: str) -> Model:
    return load_model(FOLDER / case)


@cache
def reference(case: str) -> dict[str, np.ndarray]:
    return dict(np.load(FOLDER / case / "reference.npz"))
