"""Fewer programs for the tests of the small world."""

from collections.abc import Callable

import numpy as np
import pytest

import jclt
from jclt.world import measure

LENGTH = 24


@pytest.fixture
def share_program(monkeypatch) -> Callable[[int], None]:
    """Has the prompts of all tasks padded to so many rows of one length: then a program serves all."""

    def set_rows(most: int) -> None:
        def run(model, tokens):
            rows, length = tokens.shape
            logits, seen = jclt.run(model, np.pad(tokens, ((0, most - rows), (0, LENGTH - length))))
            return np.asarray(logits)[:rows, :length], seen

        monkeypatch.setattr(measure, "run", run)

    return set_rows
