"""A folder of token shards for tests."""

from pathlib import Path

import numpy as np
import pytest
from golden_cases import FOLDER

from jclt.data.tokenize import tokenize


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Seven documents in four shards of at least 100 tokens."""
    root = tmp_path_factory.mktemp("tokens")
    rng = np.random.default_rng(0)
    for n in range(7):
        (root / f"{n}.txt").write_text(" ".join(f"word{i}" for i in rng.integers(10, 90, 60)))
    tokenize([str(root / "*.txt")], FOLDER / "llama3", str(root / "out"), shard_tokens=100)
    return root / "out"
