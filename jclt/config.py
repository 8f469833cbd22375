"""Settings are frozen dataclasses; presets are functions that return them; overrides refuse what they do not know."""

import ast
import os
import runpy
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jclt.errors import UserError, first_line, nearest, reason_of

Settings = TypeVar("Settings")


def cache_folder() -> Path:
    """Where what can be made or fetched again is kept on this host."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jclt"


def load_settings(name: str, kind: type[Settings], presets: Mapping[str, Callable[[], Settings]]) -> Settings:
    """A preset by its name, or the `config` that a Python file defines."""
    if name in presets:
        return presets[name]()
    if not name.endswith(".py"):
        raise UserError(f"config '{name}': neither a preset nor a .py file; {nearest(name, presets)}")
    found = read_file(name).get("config")
    if not isinstance(found, kind):
        raise UserError(f"{name}: expected it to define `config`, a {kind.__name__}")
    return found


def read_file(name: str) -> dict[str, Any]:
    """What a configuration's file defines, by name. The file is run, as any Python program is."""
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
        raise UserError(f"{path}: ends the program{_place(error, name)}, expected it to define `config`") from None
    except BaseException as error:  # whatever the user's own code does
        message = error.msg if isinstance(error, SyntaxError) else first_line(error)
        raise UserError(f"{path}: {type(error).__name__}{_place(error, name)}: {message}") from None


def _place(error: BaseException, name: str) -> str:
    """The line of the configuration's file that failed, and that of another file where the error lies there."""
    frames = traceback.extract_tb(error.__traceback__)
    found = [(frame.filename, frame.lineno) for frame in frames if not frame.filename.startswith("<frozen ")]
    own = [place for place in found if place[0] == name][-1:]
    deepest = found[-1:] if own else []
    if isinstance(error, SyntaxError) and error.lineno:  # what Python cannot read has not run: it is in no frame
        deepest = [(error.filename or name, error.lineno)]
    places = dict.fromkeys(own + deepest)
    said = [f"line {line}" if file == name else f"line {line} of {file}" for file, line in places]
    return f" in {', '.join(said)}" if said else ""


def override(config: Settings, settings: Sequence[str]) -> Settings:
    """The configuration with `name=value` settings applied; dots reach into nested ones."""
    for setting in settings:
        name, separator, value = setting.partition("=")
        if not separator:
            raise UserError(f"setting '{setting}': expected name=value")
        config = _set(config, name.strip().split("."), value.strip(), name.strip())
    return config


def _set(config: Any, path: list[str], value: str, whole: str) -> Any:
    known = {field.name for field in fields(config)}
    if path[0] not in known:
        raise UserError(f"setting '{whole}': unknown; {nearest(path[0], known)}")
    if len(path) > 1:
        inner: Any = getattr(config, path[0])
        if not hasattr(inner, "__dataclass_fields__"):
            raise UserError(f"setting '{whole}': '{path[0]}' has no settings of its own")
        return replace(config, **{path[0]: _set(inner, path[1:], value, whole)})
    expected = get_type_hints(config.__class__)[path[0]]
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # text, or nested more deeply than Python reads
        parsed = {"true": True, "false": False, "none": None}.get(value.lower(), value)
    fitted = fit_type(parsed, expected)
    if fitted is MISFIT:
        fitted = fit_type(value, expected)  # a number where text is meant, say
    if fitted is MISFIT:
        shown = value if len(value) <= 80 else f"{value[:80]}..."
        raise UserError(f"setting '{whole}': got {shown}, expected {describe_type(expected)}")
    return replace(config, **{path[0]: fitted})


MISFIT = object()


def fit_type(value: Any, expected: Any) -> Any:
    """The value as the expected type has it (a whole number where a float is expected, say), or `MISFIT`."""
    origin, options = get_origin(expected), get_args(expected)
    if origin in (Union, types.UnionType):
        return next((got for option in options if (got := fit_type(value, option)) is not MISFIT), MISFIT)
    if origin is Literal:
        return value if value in options else MISFIT
    if origin is tuple:
        items: list[Any] = list(value) if isinstance(value, tuple | list) else [value]  # pyright: ignore[reportUnknownArgumentType]
        fitted = tuple(fit_type(item, options[0]) for item in items)
        return MISFIT if MISFIT in fitted else fitted
    if expected is float:
        try:
            return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else MISFIT
        except OverflowError:  # a whole number of hundreds of digits
            return MISFIT
    return value if isinstance(value, expected) and not (expected is int and isinstance(value, bool)) else MISFIT


def describe_type(expected: Any) -> str:
    if get_origin(expected) is Literal:
        return "one of: " + ", ".join(map(str, get_args(expected)))
    if get_origin(expected) in (Union, types.UnionType):
        return " or ".join(describe_type(option) for option in get_args(expected))
    if get_origin(expected) is tuple:
        return f"a list of {describe_type(get_args(expected)[0]).removeprefix('a ')}s"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}.get(
        expected, getattr(expected, "__name__", str(expected))
    )
