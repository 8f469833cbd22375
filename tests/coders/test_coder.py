"""Coders compute what their formulas say: activations, their gradients, products, reaches, and a model's neurons."""

from dataclasses import replace
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import golden_model, reference
from more_cases import mark_others
from random_coders import random_coder

import jclt
from jclt.coders import AXES, CoderConfig, CoderReplacement, SparseCoder, neurons
from jclt.coders.activations import batch_thresholds, gate, jump_relu, kth_largest, top_k
from jclt.coders.decoder_sums import DecoderSums, choose_capacity
from jclt.errors import UserError
from jclt.kernels.matmuls import _decode_target, apply_weight, decode
from jclt.mesh import make_mesh, make_sharding, shard_by_axes
from jclt.training.coder.forms import activate_dense

CLT = CoderConfig("clt", 10, layers=(0, 1, 2), width=6)
PLT = replace(CLT, kind="transcoder")
SAE = replace(PLT, kind="sae", reads="resid_post", writes="resid_post")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# Activations.

H = jnp.asarray([[-1.0, 0.0, 0.2, 0.25, 0.3], [0.5, 0.75, 0.74, 0.26, 9.0]])
T = jnp.asarray([[0.1, 0.1, 0.2, 0.5, 0.25]])


def test_jump_relu_is_strict_and_relu_keeps_what_is_positive():
    want = [[0, 0, 0, 0, 0.3], [0.5, 0.75, 0.74, 0, 9.0]]
    np.testing.assert_array_equal(jump_relu(H, T, 1.0, "all"), np.float32(want))
    np.testing.assert_array_equal(gate(H, T, 1.0, "all"), np.float32(want) > 0)
    at = jnp.asarray([[0.5, np.nextafter(np.float32(0.5), np.float32(1))]])
    np.testing.assert_array_equal(jump_relu(at, jnp.full((1, 2), 0.5), 1.0, "all"), [[0, at[0, 1]]])
    relu = random_coder(replace(CLT, activation="relu", features=5))
    np.testing.assert_array_equal(relu.activate(0, H), np.maximum(H, 0))


def test_thresholds_are_compared_in_float32_under_bfloat16():
    """In bfloat16 both thresholds would equal h, and both gates would be alike."""
    h = np.full((1, 2), 0.03, jnp.bfloat16)  # 0.0300293
    thresholds = np.float32([[0.03, 0.03005]])
    assert np.all(thresholds.astype(jnp.bfloat16) == h)

    @jax.jit
    def compute(h, t):
        values, back = jax.vjp(lambda h, t: jump_relu(h, t, 1.0, "threshold"), h, t)
        return jump_relu(h, t, 1.0, "all"), gate(h, t, 1.0, "all"), *back(jnp.ones_like(values))

    values, is_open, to_h, to_t = map(np.asarray, compute(h, thresholds))
    assert (values > 0).tolist() == [[True, False]] and is_open.tolist() == [[1.0, 0.0]]
    assert to_h.dtype == jnp.bfloat16 and to_h.tolist() == [[1.0, 0.0]]
    np.testing.assert_allclose(to_t, -thresholds, rtol=1e-2)
    # A coder's pre-activations are float32 even where its weights are bfloat16.
    x = jax.ShapeDtypeStruct((2, 6), jnp.bfloat16)
    h = jax.eval_shape(lambda x: random_coder(CLT, jnp.bfloat16).compute_preactivation(0, x), x)
    assert h.dtype == jnp.float32


def test_top_k_keeps_the_k_largest_positive_values_of_each_row():
    h = normal(7, 12)
    h[0] = -np.abs(h[0])
    h[1] = np.where(np.arange(12) < 3, np.abs(h[1]), -1)
    want = np.zeros_like(h)
    for row in range(7):
        for feature in sorted(range(12), key=lambda f: -h[row, f])[:4]:
            want[row, feature] = max(h[row, feature], 0)
    upstream = normal(7, 12, seed=1)

    @jax.jit
    def compute(h, upstream):
        values, back = jax.vjp(lambda h: top_k(h, 4), h)
        return values, *back(upstream)

    got, to_h = compute(h, upstream)
    np.testing.assert_array_equal(got, want)
    assert (want[0] > 0).sum() == 0 < (want[1] > 0).sum() < 4 == (want[2] > 0).sum()
    np.testing.assert_array_equal(to_h, upstream * (want > 0))


@pytest.mark.parametrize("through", ["threshold", "all"])
@pytest.mark.parametrize("bandwidth", [0.1, 1.0])
def test_gradients_of_jump_relu_and_gate_are_the_written_formula(bandwidth, through):
    upstream, h, t = normal(2, 5), np.asarray(H), np.asarray(T)
    window = (np.abs(h - t) < bandwidth / 2) / np.float32(bandwidth)
    is_open = h > t
    assert window.any() and not window.all()
    for function, to_h, jump in ((jump_relu, is_open, t * window), (gate, 0 * h, window)):
        _, back = jax.vjp(lambda h, t: function(h, t, bandwidth, through), H, T)  # noqa: B023
        got_h, got_t = back(jnp.asarray(upstream))
        want = upstream * (to_h + (jump if through == "all" else 0))
        np.testing.assert_allclose(got_h, want, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(got_t, -(upstream * jump).sum(0, keepdims=True), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bandwidth", mark_others([0.1, 0.4, 1.0], [0.4]))
def test_gradients_are_those_of_the_expectation(bandwidth):
    """Over standard normal h at a threshold of 1, where the density's curvature vanishes and even a wide window is
    unbiased: E[jump_relu] has the derivative -t p(t) by the threshold, P(h > t) + t p(t) by a shift of h."""
    from math import erfc, exp, pi, sqrt

    h = normal(2_000_000, 1)
    threshold = np.ones_like(h)  # one for each sample, so that each one's gradient is seen
    density, above = exp(-0.5) / sqrt(2 * pi), erfc(sqrt(0.5)) / 2
    wanted = {
        (jump_relu, "threshold"): (above, -density),
        (jump_relu, "all"): (above + density, -density),
        (gate, "threshold"): (0.0, -density),
        (gate, "all"): (density, -density),
    }
    for (function, through), want in wanted.items():

        def total(h, t, function=function, through=through):
            return function(h, t, bandwidth, through).sum()

        for got, value in zip(jax.jit(jax.grad(total, (0, 1)))(h, threshold), want, strict=True):
            samples = np.asarray(got, np.float64)
            deviation = samples.std() / sqrt(len(h))
            assert abs(samples.mean() - value) <= 4 * deviation, (function, through, samples.mean(), value)
            assert deviation < 0.01  # a wrong formula would be hundreds of these away


def nth(values: np.ndarray, k: int) -> float:
    return np.sort(np.reshape(values, -1))[::-1][k - 1]


SCORES = np.maximum(normal(24, 16), 0)
TIED = np.round(SCORES, 1)


@pytest.mark.parametrize("scores", [SCORES, TIED, np.zeros_like(SCORES)], ids=["distinct", "ties", "zeros"])
@pytest.mark.parametrize("k", [1, 5, 16])
def test_kth_largest_is_that_of_a_sort(scores, k):
    largest = jax.jit(kth_largest, static_argnums=(1, 2))
    rows = largest((scores,), k, (1,))
    np.testing.assert_array_equal(rows[:, 0], [nth(row, k) for row in scores])
    columns = largest((scores,), k, (0,))
    np.testing.assert_array_equal(columns[0], [nth(column, k) for column in scores.T])
    several = (scores, scores[:, ::2] * np.float32(1.5), normal(24, 3) ** 2)
    joint = largest(several, 24 * k, (0, 1))
    assert joint.shape == (1, 1)
    assert joint[0, 0] == nth(np.concatenate([x.reshape(-1) for x in several]), 24 * k)


def test_kth_largest_spans_every_size_of_number():
    scores = np.float32([[2e-38, 0.0, 3e38, 1.0, np.nextafter(np.float32(1), np.float32(2)), 1e-20]])
    every = jax.jit(lambda x: [kth_largest((x,), k, (1,)) for k in range(1, 7)])(scores)
    assert [np.asarray(value).item() for value in every] == [nth(scores, k) for k in range(1, 7)]


@pytest.mark.parametrize("shape", [(1, 4), (2, 2)])
def test_kth_largest_on_a_mesh_is_the_same(shape):
    mesh = make_mesh(*shape)
    with jax.set_mesh(mesh):
        spread = [
            jax.device_put(x, make_sharding(mesh, x.shape, ("tokens", "features"))) for x in (SCORES, SCORES[:, ::-1])
        ]
        largest = jax.jit(kth_largest, static_argnums=(1, 2))
        assert largest(tuple(spread), 100, (0, 1))[0, 0] == nth(np.concatenate([SCORES] * 2), 100)
        np.testing.assert_array_equal(largest((spread[0],), 5, (1,))[:, 0], [nth(row, 5) for row in SCORES])
        np.testing.assert_array_equal(largest((spread[0],), 5, (0,))[0], [nth(row, 5) for row in SCORES.T])


@pytest.mark.parametrize("apart", [0.5, 1.0, 2.0])  # in the last case the first layer has less than its share
def test_batch_top_k_keeps_exactly_k_a_token_by_what_features_write_and_half_of_them_in_equal_shares(apart):
    coder = random_coder(replace(CLT, activation="batchtopk", k=4))
    h = tuple(normal(50, 10, seed=layer) + np.float32(apart * (layer - 1)) for layer in range(3))

    @jax.jit
    def compute(coder, h):
        return activate_dense(coder, h, tuple(layer.norms for layer in coder.layers))

    activations, bounds = compute(coder, h)
    lengths = [np.sqrt(np.square(np.asarray(layer.decoder)).sum((1, 2))) for layer in coder.layers]
    scores = np.stack([np.maximum(np.asarray(values), 0) * length for values, length in zip(h, lengths, strict=True)])
    assert len(np.unique(scores[scores > 0])) == (scores > 0).sum() > 4 * 50
    own = np.array([nth(layer_scores, 33) for layer_scores in scores])  # half of 4 * 50, in three layers
    is_own = (scores >= own[:, None, None]) & (scores > 0)
    want = np.minimum(own, nth(scores[~is_own], 4 * 50 - is_own.sum()))
    np.testing.assert_allclose(bounds, want, rtol=1e-6)
    kept = [int((values > 0).sum()) for values in activations]
    assert sum(kept) == 4 * 50 and np.all(np.array(kept) >= is_own.sum((1, 2)))
    assert (kept[0] == is_own[0].sum() == 33) == (apart == 1.0) and (own[0] == 0) == (apart == 2.0)
    for values, a, score, bound in zip(activations, h, scores, want, strict=True):
        sure = np.abs(score - bound) > 1e-6 * bound
        chosen = (score >= bound) & (score > 0)
        np.testing.assert_array_equal(np.asarray(values)[sure], np.where(chosen, np.asarray(a), 0)[sure])
    bounds = np.asarray(jax.jit(batch_thresholds, static_argnums=(1, 2))(tuple(scores), 4, 50))
    assert (scores[scores > 0] >= np.broadcast_to(bounds[:, None, None], scores.shape)[scores > 0]).sum() == 4 * 50


# Products.


def decode_by_hand(coder: SparseCoder, activations: list[np.ndarray], x: list[np.ndarray]) -> np.ndarray:
    """The outputs at all layers `[N, L, D]`, by a loop over all sources and targets, in float64."""
    layers = len(coder.layers)
    activations, x = [np.float64(a) for a in activations], [np.float64(values) for values in x]
    out = np.zeros((len(x[0]), layers, x[0].shape[1]))
    for target, weights in enumerate(coder.layers):
        out[:, target] += np.asarray(weights.decoder_bias)
        if weights.skip is not None:
            out[:, target] += x[target] @ np.float64(weights.skip).T
        for source in range(target + 1):
            rows = coder.layers[source].decoder
            rows = np.float64(coder.layers[source].encoder)[:, None] if rows is None else np.float64(rows)
            if coder.config.kind == "clt" or source == target:
                out[:, target] += activations[source] @ rows[:, target - source]
    return out


KINDS = {
    "clt": CLT,
    "clt skip": replace(CLT, skip=True),
    "transcoder skip": replace(PLT, skip=True),
    "tied sae": replace(SAE, tied=True),
    "of some layers": replace(CLT, layers=(1, 3)),
}


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())
def test_decoding_is_the_double_loop_over_sources_and_targets(config):
    """It fails if the last decoder layer, or any other, is dropped: all layers are compared, and no decoder is 0."""
    coder = random_coder(config)
    layers = len(config.covered)
    x = [normal(5, 6, seed=layer) for layer in range(layers)]
    a = [np.maximum(normal(5, 10, seed=9 + layer), 0) for layer in range(layers)]

    @jax.jit
    def compute(coder, a, x):
        rows = tuple(layer.decoder_rows for layer in coder.layers)
        batched = [values[None] for values in a]  # [B, T, F] goes the same way
        return (
            [
                coder.decode(a, x),
                [coder.write(t, a, x[t]) for t in range(layers)],
                [coder.write(t, batched, x[t][None])[0] for t in range(layers)],
            ],
            [[_decode_target(t, tuple(a), rows, stacked) for t in range(layers)] for stacked in (False, True)],
            rows,
        )

    outputs, reconstructions, rows = compute(coder, a, x)
    want = decode_by_hand(coder, a, x)
    for output in outputs:
        np.testing.assert_allclose(np.stack(output, axis=1), want, atol=2e-5)
    bare = want - decode_by_hand(coder, [0 * values for values in a], x)
    for reconstruction in reconstructions:
        np.testing.assert_allclose(np.stack(reconstruction, axis=1), bare, atol=2e-5)
    assert [decoder.shape for decoder in rows] == [(10, config.reach(layer), 6) for layer in range(layers)]
    reaches = [layers - layer if config.kind == "clt" else 1 for layer in range(layers)]
    assert [config.reach(layer) for layer in range(layers)] == reaches


def plain_decode(activations, decoders):
    """Plain `jnp.einsum`, with the gradients of JAX."""
    out = []
    for target in range(len(decoders)):
        parts = [
            jnp.einsum("nf,fd->nd", activations[s], decoders[s][:, target - s], precision="highest")
            for s in range(target + 1)
            if target - s < decoders[s].shape[1]
        ]
        out.append(sum(parts[1:], parts[0]))
    return tuple(out)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-13)])
@pytest.mark.parametrize("reach", [(3, 2, 1), (1, 1, 1)])
def test_gradients_of_products_are_those_of_einsum(dtype, tolerance, reach):
    with jax.enable_x64(dtype == "float64"):
        a = tuple(normal(5, 10, seed=i).astype(dtype) for i in range(3))
        decoders = tuple(normal(10, r, 6, seed=i).astype(dtype) for i, r in enumerate(reach))
        upstream = tuple(normal(5, 6, seed=7 + i).astype(dtype) for i in range(3))

        @partial(jax.jit, static_argnums=0)
        def differentiate(function, upstream, *arguments):
            out, back = jax.vjp(function, *arguments)
            return out, back(out if upstream is None else upstream)

        got = differentiate(decode, upstream, a, decoders)
        want = differentiate(plain_decode, upstream, a, decoders)
        assert all(output.dtype == dtype for output in got[0])
        for actual, reference in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(actual, reference, rtol=tolerance, atol=10 * tolerance)
        x, weight = a[0], decoders[0][:, 0]
        for equation, first in (("nf,fd->nd", x), ("btf,fd->btd", x.reshape(1, 5, 10))):
            got = differentiate(partial(apply_weight, equation), None, first, weight)
            want = differentiate(partial(jnp.einsum, equation, precision="highest"), None, first, weight)
            for actual, reference in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(actual, reference, rtol=tolerance, atol=100 * tolerance)


def test_bfloat16_products_are_summed_in_float32_and_so_are_their_weight_gradients():
    """Of 4,097 ones: a sum in bfloat16 stalls at 256, and the right sum rounded to bfloat16 would be 4,096."""
    count = 4097

    @jax.jit
    def sum_ones(ones, weight):
        return (
            apply_weight("nf,fd->nd", ones, weight),
            _decode_target(0, (ones,), (weight[:, None],), stacked=False),
            _decode_target(0, (ones,), (weight[:, None],), stacked=True),
        )

    for result in sum_ones(np.ones((1, count), jnp.bfloat16), np.ones((count, 2), np.float32)):
        assert result.dtype == jnp.float32 and np.asarray(result).tolist() == [[count, count]]
    column = jnp.ones((count, 1), jnp.bfloat16)

    def sum_product(weight):
        return apply_weight("nf,fd->nd", column, weight).sum()

    def sum_decoded(weight):
        return decode((column,), (weight[:, None],))[0].sum()

    for function in (sum_product, sum_decoded):
        gradient = jax.jit(jax.grad(function))(np.full((1, 2), 0.3, np.float32))
        assert gradient.dtype == jnp.float32 and np.asarray(gradient).tolist() == [[count, count]]
    # Operands are rounded to bfloat16 as they are on a chip; the sum is not.
    product = jax.jit(partial(apply_weight, "nf,fd->nd"))
    rough = np.asarray(product(np.ones((1, 3), jnp.bfloat16), np.full((3, 1), 0.1, np.float32)))
    assert float(rough[0, 0]) == pytest.approx(3 * float(jnp.bfloat16(0.1)), rel=1e-6)


# Coders.


def test_encoding_is_the_rule_of_an_affine_map():
    x = normal(4, 6)
    encode = jax.jit(lambda coder, x: (coder.encode(1, x), coder.encode(1, x[None])[0]))
    for config in (CLT, replace(CLT, activation="relu"), replace(CLT, activation="topk", k=3)):
        coder = random_coder(config)
        weights = coder.layers[1]
        h = np.float64(x) @ np.float64(weights.encoder).T + np.float64(weights.encoder_bias)
        least = 0.0 if weights.threshold is None else np.float64(weights.threshold)
        if config.k is not None:
            least = np.maximum(np.sort(h, axis=1)[:, -3:].min(1, keepdims=True) - 1e-6, 0)
        want = np.where(h > least, h, 0)
        for got in encode(coder, x):
            np.testing.assert_allclose(got, want, atol=1e-5)
        assert 0 < (want > 0).sum() < want.size


def test_the_length_of_a_features_decoders_spans_all_its_targets():
    coder = random_coder(CLT)
    for layer in coder.layers:
        rows = np.asarray(layer.decoder).reshape(10, -1)
        np.testing.assert_allclose(layer.norms, np.linalg.norm(rows, axis=1), rtol=1e-6)


def test_a_coder_is_a_pytree_whose_settings_are_static():
    coder, x = random_coder(CLT), jnp.asarray(normal(4, 6))
    leaves = jax.tree.leaves(coder)
    assert len(leaves) == 3 * 5 and all(isinstance(leaf, jax.Array) for leaf in leaves)
    traced = []

    @jax.jit
    def encode(coder, x):
        traced.append(coder.config)
        return coder.encode(0, x)

    np.testing.assert_allclose(encode(coder, x), coder.encode(0, x), rtol=1e-6)
    encode(jax.tree.map(lambda w: 2 * w, coder), x)
    assert traced == [CLT]  # new weights, same program
    other = SparseCoder(coder.layers, replace(CLT, bandwidth=0.5))
    encode(other, x)
    assert traced == [CLT, other.config]


@pytest.mark.parametrize("case", mark_others(["llama3", "gpt2", "gemma2"], ["gpt2", "gemma2"]))
def test_neurons_write_what_the_models_mlps_do(case):
    model, tokens = golden_model(case), reference(case)["tokens"]
    coder = neurons(model)
    assert coder.config.features == model.config.mlp_width
    logits, seen = jclt.run(model, tokens, capture=("mlp_in", "mlp_neurons", "mlp_raw_out"))

    @jax.jit
    def encode_and_write(x):
        a = [coder.encode(layer, layer_x) for layer, layer_x in enumerate(x)]
        return jnp.stack(a), jnp.stack([coder.write(layer, a, layer_x) for layer, layer_x in enumerate(x)])

    a, y = encode_and_write(seen["mlp_in"])
    np.testing.assert_allclose(a, seen["mlp_neurons"], atol=1e-5)
    np.testing.assert_allclose(y, seen["mlp_raw_out"], atol=1e-5)
    for layer in range(model.config.layers):
        rows = np.float64(coder.decoder_rows(layer))
        assert rows.shape == (model.config.mlp_width, 1, model.config.width)
        constant = y[layer] - np.float64(a[layer]) @ rows[:, 0]  # the bias alone
        np.testing.assert_allclose(constant, np.broadcast_to(constant[:1, :1], constant.shape), atol=1e-5)
    replaced, _ = jclt.run(model, tokens, edit=CoderReplacement(coder), unroll=True)
    np.testing.assert_allclose(replaced, logits, atol=1e-5)


def test_replacing_changes_the_covered_layers_alone():
    """A coder of layers 0 and 2. Its features write across the gap, and layer 1 keeps the model's MLP."""
    model, tokens = golden_model("llama3"), reference("llama3")["tokens"]
    covered, width = (0, 2), model.config.width
    coder = random_coder(CoderConfig("clt", 7, layers=covered, width=width))
    _, seen = jclt.run(model, tokens, capture=("mlp_in", "mlp_out"), edit=CoderReplacement(coder), unroll=True)
    x, got = (np.float64(seen[site]).reshape(model.config.layers, -1, width) for site in ("mlp_in", "mlp_out"))
    a = []
    for weights, layer in zip(coder.layers, covered, strict=True):
        h = x[layer] @ np.float64(weights.encoder).T + np.float64(weights.encoder_bias)
        a.append(np.where(h > np.asarray(weights.threshold), h, 0))
    reconstruction = decode_by_hand(coder, a, list(x[list(covered)]))
    mlp_weights = {name: np.float64(value[1]) for name, value in model.params.items() if value.ndim > 1}
    up, gate_values = (x[1] @ mlp_weights[name] + mlp_weights[f"{name}_bias"] for name in ("up", "gate"))
    mlp = (gate_values / (1 + np.exp(-gate_values)) * up) @ mlp_weights["down"] + mlp_weights["down_bias"]
    for layer, want in enumerate((reconstruction[:, 0], mlp, reconstruction[:, 1])):
        np.testing.assert_allclose(got[layer], want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "low"),
    mark_others(
        [case for case in product(KINDS, ("bfloat16", "float16")) if case[0] != "of some layers"],  # as "clt" is here
        [("clt", "bfloat16"), ("tied sae", "float16")],
    ),
)
def test_half_precision_weights_compute_as_the_same_weights_in_float32(kind, low):
    """Inputs in float32 are not rounded to half precision, also where only the rows of active features are read."""
    config = replace(KINDS[kind], features=1600, layers=(0, 2) if KINDS[kind].kind == "clt" else (1,))
    narrow = random_coder(config, low)
    wide = jax.tree.map(lambda w: jnp.asarray(np.asarray(w).astype(np.float32)), narrow)
    x = [normal(5, 6, seed=layer) for layer in range(len(config.covered))]

    @jax.jit
    def run_pass(coder: SparseCoder, x: list, kept: jax.Array) -> tuple[list, list, list]:
        a = [coder.encode(layer, layer_x) for layer, layer_x in enumerate(x)]
        decoder_sums, outputs = DecoderSums(coder), []
        for layer, layer_x in enumerate(x):
            decoder_sums.add(layer, jnp.where(kept[None], a[layer], 0))
            outputs.append(decoder_sums.output(layer, layer_x))
        return a, outputs, [coder.write(layer, a, layer_x) for layer, layer_x in enumerate(x)]

    capacity = choose_capacity(narrow) * len(x[0])
    for kept, is_few in ((np.arange(1600) % 50 == 0, True), (np.ones(1600, bool), False)):
        (a, sums, written), wanted = run_pass(narrow, x, kept), run_pass(wide, x, kept)
        counts = [np.count_nonzero(np.asarray(values)[:, kept]) for values in a]
        assert all(0 < count <= capacity if is_few else count > capacity for count in counts)
        for got, want in zip((*a, *sums, *written), jax.tree.leaves(wanted), strict=True):
            assert got.dtype == jnp.float32
            if not is_few:
                np.testing.assert_array_equal(got, want)
        # Sums over the rows of active features are fused, so they are equal up to the rounding of float32.
        np.testing.assert_allclose(sums, wanted[1], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("low", [jnp.bfloat16, jnp.float16])
def test_neither_side_of_a_product_is_rounded_at_inference_and_both_are_in_training(low):
    coder = random_coder(CLT)
    x = normal(4, 6).astype(low)
    rounded = jax.tree.map(lambda w: jnp.asarray(np.asarray(w).astype(low).astype(np.float32)), coder)
    compute = jax.jit(lambda coder, x: (coder.encode(0, x), coder.compute_preactivation(0, x)))
    (a, h), (wide_a, wide_h), (_, rounded_h) = (
        compute(*arguments) for arguments in ((coder, x), (coder, x.astype(np.float32)), (rounded, x))
    )
    np.testing.assert_array_equal(a, wide_a)
    bias, rounded_bias = (np.asarray(c.layers[0].encoder_bias) for c in (coder, rounded))
    np.testing.assert_allclose(np.asarray(h) - bias, np.asarray(rounded_h) - rounded_bias, atol=2e-6)
    assert not np.array_equal(h, wide_h)


def test_neurons_of_a_bfloat16_model_read_float32():
    model = golden_model("llama3")
    params = {name: jnp.asarray(np.asarray(x).astype(jnp.bfloat16)) for name, x in model.params.items()}
    wide = {name: jnp.asarray(np.asarray(x).astype(np.float32)) for name, x in params.items()}
    x = jnp.asarray(normal(4, model.config.width))
    narrow, want = (neurons(replace(model, params=weights)) for weights in (params, wide))
    encode = jax.jit(lambda coder: [coder.encode(layer, x) for layer in range(2)])
    a = encode(narrow)
    np.testing.assert_array_equal(a, encode(want))
    write = jax.jit(lambda coder: coder.write(1, a, x))
    np.testing.assert_array_equal(write(narrow), write(want))


def test_a_coder_is_shown_in_one_line():
    assert repr(random_coder(CLT)) == "<SparseCoder: clt of '', 3 layers of 10 jumprelu features, mlp_in to mlp_out>"
    topk = repr(random_coder(replace(PLT, activation="topk", k=3, model="a/b")))
    assert topk == "<SparseCoder: transcoder of 'a/b', 3 layers of 10 topk features (k=3), mlp_in to mlp_out>"


# Settings.

MODEL = replace(golden_model("llama3").config, layers=4)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"features": 0}, "setting 'coder.features': 0, expected at least 1"),
        ({"k": 3}, "setting 'coder.k': 3, expected none under activation 'jumprelu'"),
        (
            {"activation": "topk"},
            "setting 'coder.k': None, expected a number of active features under activation 'topk'",
        ),
        ({"activation": "topk", "k": 11}, "setting 'coder.k': 11, expected 1 to 10"),
        ({"activation": "batchtopk", "k": 41}, "setting 'coder.k': 41, expected 1 to 40"),
        ({"activation": "batchtopk", "k": 0}, "setting 'coder.k': 0, expected 1 to 40"),
        ({"tied": True}, "setting 'coder.tied': expected false, a clt writes elsewhere than it reads"),
        (
            {"kind": "sae"},
            "setting 'coder.writes': 'mlp_out', expected 'mlp_in': an SAE writes where it reads",
        ),
        ({"layers": (1, 4)}, "setting 'coder.layers': (1, 4), expected layers from 0 to 3, in order"),
        ({"layers": (3, 1)}, "setting 'coder.layers': (3, 1), expected layers from 0 to 3, in order"),
        ({"layers": ()}, "setting 'coder.layers': (), expected layers from 0 to 3, in order"),
        ({"layers": (-1, 2)}, "setting 'coder.layers': (-1, 2), expected layers from 0 to 3, in order"),
        ({"layers": (2, 2)}, "setting 'coder.layers': (2, 2), expected layers from 0 to 3, in order"),
        ({"width": 5}, f"setting 'coder.width': 5, expected {MODEL.width}, the model's"),
        ({"reads": "hook_mlp_in"}, "site 'hook_mlp_in': this is called 'resid_mid' here"),
    ],
)
def test_settings_that_cannot_work_are_named(change, line):
    with pytest.raises(UserError) as error:
        replace(CoderConfig("clt", 10), **change).fit_to_model(MODEL, "a/model")
    assert str(error.value) == line


def test_what_follows_from_the_model_is_filled_in():
    fitted = CoderConfig("clt", 10).fit_to_model(MODEL, "a/model")
    assert (fitted.layers, fitted.width, fitted.model) == ((0, 1, 2, 3), MODEL.width, "a/model")
    config = CoderConfig("clt", 10, activation="batchtopk", k=20, layers=(1, 3), model="mine").fit_to_model(
        MODEL, "a/model"
    )
    assert (config.layers, config.model, config.rule) == ((1, 3), "mine", "jumprelu")
    assert [config.reach(index) for index in range(2)] == [2, 1]


@pytest.mark.parametrize(
    ("config", "mesh"), mark_others(product((CLT, PLT), ((1, 1), (2, 2))), [(CLT, (2, 2)), (PLT, (1, 1))])
)
def test_a_pass_by_active_rows_writes_what_products_do(config, mesh):
    """Few features are active in the first layer, so that their rows are read, and many in the last."""
    coder = random_coder(replace(config, features=4800, skip=True, layers=(0, 1)))
    random, x = np.random.default_rng(0), normal(4, 4, 6)
    a = [np.float32(random.random((4, 4, 4800)) * (random.random((4, 4, 4800)) < share)) for share in (0.003, 0.5)]
    flat = [values.reshape(16, 4800) for values in a]
    expected = decode_by_hand(coder, flat, [x.reshape(16, 6)] * 2).reshape(4, 4, 2, 6)

    def compute_outputs(coder: SparseCoder, a: list, x: jax.Array) -> list:
        decoder_sums, outputs = DecoderSums(coder), []
        for layer, layer_a in enumerate(a):
            decoder_sums.add(layer, layer_a)
            outputs.append(decoder_sums.output(layer, x))
        return outputs

    with jax.set_mesh(make_mesh(*mesh)):
        spread = jax.tree_util.tree_map_with_path(lambda path, w: shard_by_axes(w, AXES[path[-1].name]), coder)
        split_a = [shard_by_axes(values, ("tokens", None, "features")) for values in map(jnp.asarray, a)]
        arguments = spread, split_a, shard_by_axes(jnp.asarray(x), ("tokens", None, None))
        lowered = jax.jit(compute_outputs).lower(*arguments)
        outputs = lowered.compile()(*arguments)
    assert lowered.as_text().count("stablehlo.case") == 2
    np.testing.assert_allclose(np.stack(outputs, axis=2), expected, rtol=1e-4, atol=1e-4)
