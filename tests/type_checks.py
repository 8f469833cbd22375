"""Checks of shapes at every call of the package.

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
        return beartype(signature)
    annotations = tuple((name, repr(kind)) for name, kind in signature.__annotations__.items())
    key = (signature.__module__, signature.__qualname__, signature.__code__.co_varnames, annotations)
    if key not in _made:
        _made[key] = beartype(signature)
    return _made[key]
