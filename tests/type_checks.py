"""Checks of types and shapes at every call of the package.

jaxtyping asks for the checks of an annotated function whenever its definition runs, with a function that has only its
signature. To make them takes beartype some milliseconds, and programs are traced with many functions that are defined
within others: their checks are made once.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from beartype import beartype
from jaxtyping import install_import_hook

UNCHECKED = "world"
"""The small world's generator is plain Python, checked by `pyright`. With checked calls it takes four times as long."""

_made: dict[Any, Callable] = {}


def check_calls() -> None:
    """Has the calls of all modules checked that are imported from now on."""
    spec = find_spec("jclt")
    assert spec is not None and spec.origin is not None
    names = {path.stem for path in Path(spec.origin).parent.iterdir() if not path.name.startswith("__")}
    modules = [f"jclt.{name}" for name in sorted(names - {UNCHECKED})] + ["jclt.world.measure", "jclt.world.handmade"]
    install_import_hook(modules, "type_checks.check_types")


def check_types(signature: Callable) -> Callable:
    if "<locals>" not in signature.__qualname__ or signature.__defaults__ or signature.__kwdefaults__:
        return beartype(signature)
    annotations = tuple((name, repr(kind)) for name, kind in signature.__annotations__.items())
    key = (signature.__module__, signature.__qualname__, signature.__code__.co_varnames, annotations)
    if key not in _made:
        _made[key] = beartype(signature)
    return _made[key]
