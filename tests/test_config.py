"""Overrides set what they name, in the type it has, and refuse the rest in one line."""

from dataclasses import dataclass
from typing import Literal

import pytest

from jclt.config import load_settings, override
from jclt.errors import UserError


@dataclass(frozen=True)
class Inner:
    width: int = 4
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    rate: float = 1.0
    name: str = "a"
    kind: Literal["x", "y"] = "x"
    limit: int | None = None
    on: bool = False


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("rate=3", Outer(rate=3.0)),
        ("rate=1e-4", Outer(rate=1e-4)),
        ("inner.width=8", Outer(inner=Inner(width=8))),
        ("inner.layers=1,3", Outer(inner=Inner(layers=(1, 3)))),
        ("inner.layers=2", Outer(inner=Inner(layers=(2,)))),
        ("name=7", Outer(name="7")),
        ("kind=y", Outer(kind="y")),
        ("limit=5", Outer(limit=5)),
        ("limit=none", Outer()),
        ("on=true", Outer(on=True)),
    ],
)
def test_override(setting, expected):
    assert override(Outer(), [setting]) == expected


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("rat=3", "setting 'rat': unknown; did you mean 'rate'?"),
        ("inner.widht=3", "setting 'inner.widht': unknown; did you mean 'width'?"),
        ("inner.width=3.5", "setting 'inner.width': got 3.5, expected a whole number"),
        ("inner.width=true", "setting 'inner.width': got true, expected a whole number"),
        ("rate=fast", "setting 'rate': got fast, expected a number"),
        ("kind=z", "setting 'kind': got z, expected one of: x, y"),
        ("limit=no", "setting 'limit': got no, expected a whole number or none"),
        ("rate.x=1", "setting 'rate.x': 'rate' has no settings of its own"),
        ("rate", "setting 'rate': expected name=value"),
    ],
)
def test_refusals(setting, line):
    with pytest.raises(UserError) as error:
        override(Outer(), [setting])
    assert str(error.value) == line


def test_settings_come_from_a_preset_or_a_file(tmp_path):
    presets = {"small": lambda: Outer(rate=2.0)}
    assert load_settings("small", Outer, presets) == Outer(rate=2.0)
    file = tmp_path / "mine.py"
    file.write_text("config = 3\n")
    with pytest.raises(UserError, match="expected it to define `config`, a Outer"):
        load_settings(str(file), Outer, presets)
    with pytest.raises(UserError, match="did you mean 'small'?"):
        load_settings("smal", Outer, presets)
    with pytest.raises(UserError, match="not found"):
        load_settings(str(tmp_path / "none.py"), Outer, presets)
