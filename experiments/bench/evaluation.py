"""Reconstruction measured by the rows of active features beside the same pass by dense products.

    python experiments/bench/evaluation.py

A cross-layer transcoder of 12 layers x 768 with 4,096 features a layer, about 100 of them active at a token, on 2,048
tokens of a GPT-2-sized model; float32. Both passes run in one process. Cost: two minutes and 8 GB.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from forward import GPT2
from machine import Case, arguments, best, matmul_rate, report

from jclt.coders import CoderConfig, SparseCoder, declare_coder, decoder_sums
from jclt.evaluation.reconstruction import sum_batch
from jclt.kernels.active import SPARSE_BELOW
from jclt.models import declare as declare_model
from jclt.models import forward
from jclt.training.coder.speed import count_forward_operations

ROWS, LENGTH, FEATURES, ACTIVE = 16, 128, 4096, 100


def coder_that_fires(params: dict[str, jax.Array], tokens: jax.Array) -> SparseCoder:
    """Random directions whose biases make each feature active on its share of these tokens."""
    config = CoderConfig(features=FEATURES, activation="relu").fit_to_model(GPT2, "gpt2")
    random = np.random.default_rng(0)
    coder = declare_coder(config, lambda _, shape: jnp.asarray(0.02 * random.standard_normal(shape, np.float32)))
    reads = jax.jit(lambda p, t: forward(GPT2, p, t, capture=(config.reads,))[1][config.reads])(params, tokens)
    share = ACTIVE / (GPT2.layers * FEATURES)

    def choose_bias(layer: int) -> jax.Array:
        encoder = coder.layers[layer].encoder
        return -jnp.quantile(reads[layer].reshape(-1, GPT2.width) @ encoder.T, 1 - share, axis=0)

    layers = [replace(weights, encoder_bias=choose_bias(layer)) for layer, weights in enumerate(coder.layers)]
    return replace(coder, layers=tuple(layers))


def main() -> None:
    options = arguments(__doc__)
    params = {name: weight.init(jax.random.key(0), jnp.float32) for name, weight in declare_model(GPT2).items()}
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, GPT2.vocabulary, (ROWS, LENGTH)), jnp.int32)
    coder, mask = coder_that_fires(params, tokens), jnp.ones(tokens.shape, bool)
    count, layers = tokens.size, GPT2.layers
    products = 2.0 * count * FEATURES * GPT2.width * (layers + layers * (layers + 1) / 2)
    work = products + count_forward_operations(GPT2, ROWS, LENGTH)
    rate, repeats = matmul_rate(options.repeats), min(options.repeats, 3)

    def time_pass(limits: dict[str, float]) -> tuple[float, np.ndarray]:
        decoder_sums.SPARSE_BELOW = limits
        run = jax.jit(lambda p, c: sum_batch(GPT2, p, c, tokens, mask))
        return best(lambda: run(params, coder), repeats), np.asarray(run(params, coder).error.spread)

    (dense, dense_spread), (by_rows, spread_by_rows) = time_pass({}), time_pass(SPARSE_BELOW)
    np.testing.assert_allclose(spread_by_rows, dense_spread, rtol=1e-4)
    rate = max(rate, matmul_rate(options.repeats))
    name = f"{layers} x {GPT2.width}, {FEATURES} features, {ACTIVE} active"
    cases = [
        Case(f"dense: {name}", work, dense, work / dense / rate),
        Case(f"by rows: {name}", work, by_rows, work / by_rows / rate, "dense", dense / by_rows),
    ]
    report(cases, rate, options.json)
    print("GFLOP are those of the dense pass in both cases")


if __name__ == "__main__":
    main()
