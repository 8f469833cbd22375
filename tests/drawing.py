"""How many random inputs the tests draw, and from which seed."""

from typing import NamedTuple

import pytest


class Draw(NamedTuple):
    inputs: int  # damaged files; other inputs in proportion
    seed: int
    only: int | None  # the number of the only input
    large: bool


FEW, MANY = 200, 10_000


def add_options(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzz")
    group.addoption(
        "--fuzz-inputs", type=int, metavar="N", help="damaged files to read (default: few; -m fuzz: 10,000)"
    )
    group.addoption("--fuzz-seed", type=int, default=0, metavar="S", help="draws other inputs")
    group.addoption("--fuzz-only", type=int, metavar="NUMBER", help="this input alone")


def read_options(config: pytest.Config) -> Draw:
    option = config.getoption
    inputs = option("--fuzz-inputs")
    large = inputs is not None or option("markexpr") == "fuzz"
    return Draw(inputs or (MANY if large else FEW), option("--fuzz-seed"), option("--fuzz-only"), large)
