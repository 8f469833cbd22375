"""How many inputs are drawn, and from which seed."""

from typing import NamedTuple

import pytest


class Draw(NamedTuple):
    inputs: int  # damaged files; of the rest there are as many in proportion
    seed: int
    only: int | None
    large: bool


FEW, MANY = 400, 10_000


@pytest.fixture(scope="session")
def draw(pytestconfig: pytest.Config) -> Draw:
    option = pytestconfig.getoption
    given = option("--fuzz-inputs")
    large = given is not None or option("markexpr") == "fuzz"
    return Draw(given or (MANY if large else FEW), option("--fuzz-seed"), option("--fuzz-only"), large)
