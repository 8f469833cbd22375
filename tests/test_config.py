"""Overrides set the named setting, in its type; wrong ones are refused in one line."""

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
        ("rate=" + "9" * 400, f"setting 'rate': got {'9' * 80}..., expected a number"),
        ("limit=" + "(" * 5000, f"setting 'limit': got {'(' * 80}..., expected a whole number or none"),
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


BROKEN = {
    "a = (1,\nb =\n": "SyntaxError in line 1: '(' was never closed",
    "a = 1\nimport beside\n": "SyntaxError in line 2, line 3 of {}/beside.py: invalid syntax",
    "import sys\nsys.exit(1)\n": "ends the program in line 2, expected it to define `config`",
    "def f():\n    return f()\nf()\n": "RecursionError in line 2: maximum recursion depth exceeded",
    "import json\n\njson.loads('x')\n": "JSONDecodeError in line 3, line ",
    "raise ValueError('a\\nb')\n": "ValueError in line 1: a",
    "raise BaseException\n": "BaseException in line 1: BaseException",
}


@pytest.mark.parametrize("source", BROKEN)
def test_what_fails_in_a_file_is_said_with_its_line(source, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "beside.py").write_text("x = 1\n\ny = = 2\n")
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(UserError) as error:
        load_settings(str(tmp_path / "mine.py"), Outer, {})
    assert str(error.value).startswith(f"{tmp_path}/mine.py: {BROKEN[source].replace('{}', str(tmp_path))}")


def test_what_is_no_file_is_not_run(tmp_path):
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "folder.py" / "__main__.py").write_text("config = 3\n")
    for name, line in (("folder.py", "is a folder"), ("a\0.py", "not found")):
        with pytest.raises(UserError, match=line):
            load_settings(str(tmp_path / name), Outer, {})
