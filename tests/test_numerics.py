"""Products and divergences equal their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jclt.numerics import at_least_float32, einsum, kl_divergence


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_products_are_summed_in_float32(dtype):
    """4,097 ones: summed in bfloat16 they stall at 256, in float16 at 2,048."""
    ones = jnp.ones((1, 4097), dtype)
    product = jax.jit(lambda x: einsum("nf,mf->nm", x, x))(ones)
    assert product.dtype == jnp.float32 and float(product[0, 0]) == 4097


def test_float32_products_ask_for_all_bits():
    x = jnp.ones((2, 2))
    assert "HIGHEST" in jax.jit(lambda x: einsum("nf,mf->nm", x, x)).lower(x).as_text()


def test_types_of_sums():
    assert [at_least_float32(jnp.dtype(name)) for name in ("bfloat16", "float32", "float64")] == [
        jnp.float32,
        jnp.float32,
        jnp.float64,
    ]


def test_kl_divergence_is_the_sum_over_the_vocabulary():
    logits, other = np.random.default_rng(0).standard_normal((2, 3, 5))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (logits, other))
    want = (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(kl_divergence(jnp.float32(logits), jnp.float32(other)), want, rtol=1e-5)
