"""Products and divergences equal their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jclt.errors import UserError
from jclt.numerics import NARROW_PRODUCTS, Precision, at_least_float32, check_precision, einsum, kl_divergence


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_products_are_summed_in_float32(dtype):
    """4,097 ones: summed in bfloat16 they stall at 256, in float16 at 2,048."""
    ones = jnp.ones((1, 4097), dtype)
    product = jax.jit(lambda x: einsum("nf,mf->nm", x, x))(ones)
    assert product.dtype == jnp.float32 and float(product[0, 0]) == 4097


def test_float32_products_ask_for_all_bits():
    x = jnp.ones((2, 2))
    assert "HIGHEST" in jax.jit(lambda x: einsum("nf,mf->nm", x, x)).lower(x).as_text()


ERRORS: dict[Precision, float] = {"float32": 2**-22, "tf32_3x": 2**-22, "bfloat16_3x": 2**-16, "tf32": 2**-11}
ERRORS["bfloat16"] = 2**-8
"""About the error of a number, as a share of it: half of the last bit of its fraction; of float32, that of the sums."""


@pytest.mark.parametrize("precision", ERRORS)
def test_products_err_as_much_as_their_precision_says(precision):
    """Of random numbers: errors of both operands add up like a walk. So do those of the derivative."""
    x, y = jnp.asarray(np.random.default_rng(0).standard_normal((2, 64, 64)), jnp.float32)

    def multiply(x):
        return einsum("ab,bc->ac", x, y, precision=precision)

    product, pull = jax.vjp(multiply, x)
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    for got, want in ((product, a @ b), (pull(x)[0], a @ b.T)):
        error = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
        assert ERRORS[precision] / 8 < error < 2 * ERRORS[precision] and got.dtype == jnp.float32
    assert float(jnp.abs(jax.jvp(multiply, (x,), (x,))[1] - product).max()) == 0


def test_other_devices_are_told_the_name_of_the_product():
    x = jnp.ones((2, 2))
    for precision, product in NARROW_PRODUCTS.items():
        function = jax.jit(lambda x, precision=precision: einsum("nf,mf->nm", x, x, precision=precision))
        text = function.trace(x).lower(lowering_platforms=("tpu",)).as_text()
        assert "algorithm = <" in text and "reduce_precision" not in text and text.count("dot_general") == 1
        assert ("bf16" in text) == precision.startswith("bfloat16") and product.algorithm.name.endswith("3") == (
            "num_primitive_operations = 3" in text
        )


def test_a_precision_that_a_device_lacks_is_refused_with_those_that_it_has(monkeypatch):
    check_precision("tf32")
    with pytest.raises(UserError, match="precision 'half': expected float32, tf32_3x, tf32, bfloat16_3x or bfloat16"):
        check_precision("half")
    # Without rounding, which stands in for them, CPUs lack what JAX says they lack.
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, cpu, default: default(*operands))
    with pytest.raises(
        UserError, match="precision 'tf32': this cpu has no such products, expected float32 or bfloat16_3x"
    ):
        check_precision("tf32")


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
