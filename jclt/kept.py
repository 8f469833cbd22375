"""Results that are kept as long as the object that they were computed from."""

import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

Kept = TypeVar("Kept")


def keep_result(function: Callable[[Any], Kept]) -> Callable[[Any], Kept]:
    """A function of one object that does not change: it computes its result at the first call with the object only.

    An object that cannot be referenced weakly, such as a plain dictionary, has its result computed at each call.
    """
    known: dict[int, tuple[weakref.ref[Any], Kept]] = {}  # by the object's identity

    @wraps(function)
    def compute_once(x: Any) -> Kept:
        key = id(x)
        if key in known and known[key][0]() is x:
            return known[key][1]
        result = function(x)
        try:
            known[key] = weakref.ref(x, lambda _: known.pop(key, None)), result
        except TypeError:
            pass
        return result

    return compute_once
