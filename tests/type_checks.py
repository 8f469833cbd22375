"""Checks of shapes at calls of the package.

jaxtyping asks for the checks of an annotated function whenever its definition runs, with a function that has only its
signature. To make them takes beartype some milliseconds, and programs are traced with many functions that are defined
within others: their checks are made once.
"""

from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from beartype import beartype
from jaxtyping import install_import_hook

calls_checked = 100
"""Of each function. Tests that are `exhaustive` check all."""

_made: dict[Any, Callable] = {}


def check_calls() -> None:
    """Has the calls of all modules checked that have shapes and are imported from now on."""
    spec = find_spec("jclt")
    assert spec is not None and spec.origin is not None
    package = Path(spec.origin).parent
    files = [file for file in sorted(package.rglob("*.py")) if "from jclt.shapes import" in file.read_text()]
    modules = [".".join(("jclt", *file.relative_to(package).with_suffix("").parts)) for file in files]
    install_import_hook([module.removesuffix(".__init__") for module in modules], "type_checks.check_types")


def check_types(signature: Callable) -> Callable:
    """Checks a function if its annotations have shapes; other types are for `pyright`, which runs no function."""
    if not any("jaxtyping" in repr(kind) for kind in signature.__annotations__.values()):
        return signature
    if "<locals>" not in signature.__qualname__ or signature.__defaults__ or signature.__kwdefaults__:
        return check_first_calls(beartype(signature))
    annotations = tuple((name, repr(kind)) for name, kind in signature.__annotations__.items())
    key = (signature.__module__, signature.__qualname__, signature.__code__.co_varnames, annotations)
    if key not in _made:
        _made[key] = check_first_calls(beartype(signature))
    return _made[key]


def check_first_calls(check: Callable) -> Callable:
    calls = 0

    @wraps(check)
    def check_call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return check(*args, **kwargs) if calls <= calls_checked else None

    return check_call
