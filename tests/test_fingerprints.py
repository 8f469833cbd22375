"""Fingerprints and sums of bits: the same on any mesh, and another one after any change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import FOLDER

import jclt
from jclt import fingerprints
from jclt.fingerprints import fingerprint, hash_json, sum_bits
from jclt.mesh import make_sharding

TYPES = ("float32", "bfloat16", "float16", "int32", "uint8", "bool")


def numbers(dtype: str, shape: tuple[int, ...] = (8, 16)) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=shape) * 100
    values = np.clip(values, 0, 255) if dtype == "uint8" else values
    return values > 0 if dtype == "bool" else values.astype(jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_sums_are_what_their_formula_says(dtype):
    x = numbers(dtype)
    bits = x.view(f"u{x.itemsize}").ravel().astype(object)
    first, second = np.asarray(sum_bits({"x": jnp.asarray(x)})["x"]).tolist()
    assert first == sum(bits) % 2**32
    assert second == sum(int(u) * (2 * place + 1) for place, u in enumerate(bits)) % 2**32


@pytest.mark.parametrize("shape", [(8, 16), (), (0, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_small_arrays_have_the_sums_of_large_ones(monkeypatch, dtype, shape):
    """They are computed on the host. Halves between two numbers of bfloat16 are rounded as on devices."""
    x = np.concatenate([numbers(dtype), np.array([[1 + 2**-8, 1 + 3 * 2**-8, -0.0, 1e-40] * 4]).astype(dtype)])
    x = jnp.asarray(x[-8:] if shape == (8, 16) else np.resize(x[-1], shape))
    on_host = fingerprint({"x": x})
    monkeypatch.setattr("jclt.numerics.SMALL_ARRAY", -1)
    assert fingerprint({"x": x}) == on_host


@pytest.mark.parametrize("dtype", [dtype for dtype in TYPES if dtype != "bool"])
def test_every_single_bit_changes_the_sums(dtype):
    x = numbers(dtype, (4, 4))
    before = np.asarray(sum_bits({"x": jnp.asarray(x)})["x"])
    for bit in range(0, x.nbytes * 8, 7):
        changed = x.copy()
        changed.view(np.uint8).reshape(-1)[bit // 8] ^= 1 << bit % 8
        assert (np.asarray(sum_bits({"x": jnp.asarray(changed)})["x"]) != before).all()


def test_sums_are_the_same_on_every_mesh():
    x = numbers("float32", (16, 8))
    full_sums = np.asarray(sum_bits({"x": jnp.asarray(x)})["x"])
    for shape in ((1, 4), (2, 2), (4, 1)):
        mesh = jclt.make_mesh(*shape)
        for axes in (("tokens", "features"), ("batch", None), (None, "features")):
            placed = jax.device_put(x, make_sharding(mesh, x.shape, axes))
            assert np.asarray(sum_bits({"x": placed})["x"]).tolist() == full_sums.tolist()


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_second_array_of_the_weights_is_made(dtype):
    x = jax.ShapeDtypeStruct((512, 3, 64), dtype)
    memory = fingerprints._sum_bfloat16_bits.lower(x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 512 * 3 * 64


def test_a_scalar_and_an_empty_array_have_sums():
    sums = sum_bits({"scalar": jnp.float32(1), "empty": jnp.zeros((0, 3))})
    assert np.asarray(sums["scalar"]).tolist() == [0x3F800000] * 2 and not np.asarray(sums["empty"]).any()


def test_a_model_is_the_same_in_either_type_and_on_any_mesh_and_another_after_a_change():
    """This model's weights are stored in float32."""
    options = ({}, {"dtype": "bfloat16"}, {"mesh": jclt.make_mesh(2)})
    model, narrow, split = (jclt.load_model(FOLDER / "gpt2", **kind) for kind in options)
    assert model.fingerprint == narrow.fingerprint == split.fingerprint
    params = {name: np.asarray(value) for name, value in model.params.items()}
    changed = params | {"up": params["up"].copy()}
    changed["up"][0, 0, 0] *= 1.5
    assert fingerprint({**params}) == model.fingerprint != fingerprint(changed)
    assert fingerprint({**params, "query": params["key"], "key": params["query"]}) != model.fingerprint
    assert fingerprint({**params, "other": params["up"]}) != model.fingerprint


def test_a_digest_of_settings_does_not_depend_on_their_order():
    assert hash_json({"a": 1, "b": (2, 3)}) == hash_json({"b": [2, 3], "a": 1}) != hash_json({"a": 1, "b": [3, 2]})
