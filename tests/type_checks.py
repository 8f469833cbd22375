"""Checks of types and shapes at every call. The checks of a function that is defined within another one are made once.

jaxtyping asks for the checks of an annotated function whenever its definition runs, with a function that has only its
signature. To make them takes beartype some milliseconds, and programs are traced with many such definitions.
"""

from collections.abc import Callable
from typing import Any

from beartype import beartype

_made: dict[Any, Callable] = {}


def check_types(signature: Callable) -> Callable:
    if "<locals>" not in signature.__qualname__ or signature.__defaults__ or signature.__kwdefaults__:
        return beartype(signature)
    annotations = tuple((name, repr(kind)) for name, kind in signature.__annotations__.items())
    key = (signature.__module__, signature.__qualname__, signature.__code__.co_varnames, annotations)
    if key not in _made:
        _made[key] = beartype(signature)
    return _made[key]
