"""Settings: frozen dataclasses. Presets are functions that return them, and overrides refuse unknown names."""

import ast
import os
import runpy
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jclt.errors import UserError, first_line, reason_of, suggest_name

Settings = TypeVar("Settings")


def cache_folder() -> Path:
    """The folder on this host for files that can be made or fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jclt"


def load_settings(name: str, kind: type[Settings], presets: Mapping[str, Callable[[], Settings]]) -> Settings:
    """The preset of this name, or the `config` that a Python file of this name defines."""
    if name in presets:
        return presets[name]()
    if not name.endswith(".py"):
        raise UserError(f"config '{name}': neither a preset nor a .py file; {suggest_name(name, presets)}")
    config = run_settings_file(name).get("config")
    if not isinstance(config, kind):
        raise UserError(f"{name}: expected it to define `config`, a {kind.__name__}")
    return config


def run_settings_file(name: str) -> dict[str, Any]:
    """Runs a Python file of settings and returns what it defines, by name."""
    path = Path(name)
    try:
        if not path.exists():
            raise UserError(f"{path}: not found, expected a Python file that defines `config`")
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "no plain file"
            raise UserError(f"{path}: is {kind}, expected a Python file that defines `config`")
        path.open("rb").close()
    except (OSError, ValueError) as error:
        reason = reason_of(error)
        raise UserError(f"{path}: cannot be read ({reason}), expected a Python file that defines `config`") from None
    try:
        return runpy.run_path(name)
    except (UserError, KeyboardInterrupt):
        raise
    except SystemExit as error:
        raise UserError(
            f"{path}: ends the program{_describe_place(error, name)}, expected it to define `config`"
        ) from None
    except BaseException as error:  # whatever the user's code raises
        message = error.msg if isinstance(error, SyntaxError) else first_line(error)
        raise UserError(f"{path}: {type(error).__name__}{_describe_place(error, name)}: {message}") from None


def _describe_place(error: BaseException, name: str) -> str:
    """The line of the settings file that failed, and the line of another file if the error was raised there."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [(frame.filename, frame.lineno) for frame in frames if not frame.filename.startswith("<frozen ")]
    in_settings = [line for line in lines if line[0] == name][-1:]
    deepest = lines[-1:] if in_settings else []
    if isinstance(error, SyntaxError) and error.lineno:  # the file has not run, so it is in no frame
        deepest = [(error.filename or name, error.lineno)]
    places = dict.fromkeys(in_settings + deepest)
    texts = [f"line {line}" if file == name else f"line {line} of {file}" for file, line in places]
    return f" in {', '.join(texts)}" if texts else ""


def override(config: Settings, settings: Sequence[str]) -> Settings:
    """The settings with `name=value` overrides applied; a dotted name is a setting of a nested dataclass."""
    for setting in settings:
        name, separator, value = setting.partition("=")
        if not separator:
            raise UserError(f"setting '{setting}': expected name=value")
        config = _override_one(config, name.strip().split("."), value.strip(), name.strip())
    return config


def _override_one(config: Any, path: list[str], value: str, name: str) -> Any:
    """`path` is what is left of the dotted name `name` at this level of nesting."""
    known = {field.name for field in fields(config)}
    if path[0] not in known:
        raise UserError(f"setting '{name}': unknown; {suggest_name(path[0], known)}")
    if len(path) > 1:
        inner: Any = getattr(config, path[0])
        if not hasattr(inner, "__dataclass_fields__"):
            raise UserError(f"setting '{name}': '{path[0]}' has no settings of its own")
        return replace(config, **{path[0]: _override_one(inner, path[1:], value, name)})
    expected = get_type_hints(config.__class__)[path[0]]
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # text, or nested too deeply
        parsed = {"true": True, "false": False, "none": None}.get(value.lower(), value)
    converted = convert_type(parsed, expected)
    if converted is MISFIT:
        converted = convert_type(value, expected)  # a text that looks like a number, for instance
    if converted is MISFIT:
        shown = value if len(value) <= 80 else f"{value[:80]}..."
        raise UserError(f"setting '{name}': got {shown}, expected {describe_type(expected)}")
    return replace(config, **{path[0]: converted})


MISFIT = object()
"""Returned for a value that is not of the expected type."""


def convert_type(value: Any, expected: Any) -> Any:
    """The value as an instance of the expected type (such as a float for a whole number), or `MISFIT`."""
    origin, options = get_origin(expected), get_args(expected)
    if origin in (Union, types.UnionType):
        return next((x for option in options if (x := convert_type(value, option)) is not MISFIT), MISFIT)
    if origin is Literal:
        return value if value in options else MISFIT
    if origin is tuple:
        items: list[Any] = list(value) if isinstance(value, tuple | list) else [value]  # pyright: ignore[reportUnknownArgumentType]
        converted = tuple(convert_type(item, options[0]) for item in items)
        return MISFIT if MISFIT in converted else converted
    if expected is float:
        try:
            return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else MISFIT
        except OverflowError:  # a whole number of hundreds of digits
            return MISFIT
    return value if isinstance(value, expected) and not (expected is int and isinstance(value, bool)) else MISFIT


def describe_type(expected: Any) -> str:
    """The expected type in words, for error messages."""
    if get_origin(expected) is Literal:
        return "one of: " + ", ".join(map(str, get_args(expected)))
    if get_origin(expected) in (Union, types.UnionType):
        return " or ".join(describe_type(option) for option in get_args(expected))
    if get_origin(expected) is tuple:
        return f"a list of {describe_type(get_args(expected)[0]).removeprefix('a ')}s"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}.get(
        expected, getattr(expected, "__name__", str(expected))
    )
