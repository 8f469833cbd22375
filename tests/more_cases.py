"""A claim is tested by default on a few cases that differ most, and by `pytest -m exhaustive` on the others."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def mark_others(cases: Iterable[Any], few: Collection[Any]) -> list[Any]:
    """The cases for `parametrize`; those that are not among the few are marked `exhaustive`."""
    cases = list(cases)
    assert set(few) <= set(cases)
    others = pytest.mark.exhaustive
    return [
        case if case in few else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=others)
        for case in cases
    ]
