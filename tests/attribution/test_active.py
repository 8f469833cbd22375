"""Which features are active: lists of what is not 0."""

import jax.numpy as jnp
import numpy as np
import pytest

from jclt.attribution.active import find_nonzero


@pytest.mark.parametrize("size", [1, 7, 8, 129])
def test_a_list_of_any_length_begins_with_what_is_not_zero(size):
    random = np.random.default_rng(size)
    for share in (0, 0.1, 0.5, 1):
        x = np.where(random.random(size) < share, random.normal(size=size), 0)
        want = np.flatnonzero(x)
        for length in (1, 4, 16, 160):
            found = np.asarray(find_nonzero(jnp.asarray(x), length))
            assert len(found) == length and ((found >= 0) & (found < size)).all()
            np.testing.assert_array_equal(found[: len(want)], want[:length])
