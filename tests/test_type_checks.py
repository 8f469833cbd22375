"""Calls of the package are checked, and those of a nested function whenever it is defined, though its checks are made
once."""

import jax.numpy as jnp
import pytest
import type_checks
from jaxtyping import Array, Float, TypeCheckError, jaxtyped
from type_checks import check_types

from jclt.numerics import kl_divergence


@jaxtyped(typechecker=check_types)
def double(x: Float[Array, "A"], wrong: bool) -> Array:
    @jaxtyped(typechecker=check_types)
    def add(y: Float[Array, "A"]) -> Float[Array, "A"]:
        return x + y

    return add(jnp.ones((len(x), 1)) if wrong else x)


def test_nested_functions_are_checked_every_time():
    for wrong in (False, True, False, True):
        if wrong:
            with pytest.raises(TypeCheckError):
                double(jnp.ones(3), wrong)
        else:
            assert (double(jnp.ones(3), wrong) == 2).all()
    assert sum("double.<locals>.add" in key[1] for key in type_checks._made) == 2  # of its arguments and of its result


def test_calls_of_the_package_are_checked():
    logits = jnp.zeros((2, 3))
    assert (kl_divergence(logits, logits) == 0).all()
    with pytest.raises(TypeCheckError):
        kl_divergence(logits, logits[:, :1])
