"""The operations of a step, and the matmul rate of this machine to compare its speed with."""

import time
from functools import cache

import jax
import jax.numpy as jnp

from jclt.coders import CoderConfig
from jclt.models import ModelConfig
from jclt.training.config import TrainConfig


def count_coder_operations(coder: CoderConfig, tokens: int) -> float:
    """Multiplications and additions of a dense step over N tokens.

    1. For each layer two products with the encoder: forward, and its gradient.
    2. For each layer that it writes to three products with the decoder: forward, and the gradients of both factors.
    3. For a cross-layer transcoder the sum is N D F L (3 L + 7).
    """
    products = sum(2 + 3 * coder.reach(layer) for layer in range(len(coder.covered)))
    skips = 2 * len(coder.covered) * coder.size if coder.skip else 0
    return 2.0 * tokens * coder.size * (coder.features * products + skips)


def count_forward_operations(model: ModelConfig, batch: int, length: int) -> float:
    """Operations of a language model's matmuls in one forward pass, without the unembedding."""
    heads = model.heads * model.head_size
    attention = model.width * (2 * heads + 2 * model.key_heads * model.head_size) + 2 * length * heads
    mlp = model.width * model.mlp_width * (3 if model.gated else 2)
    return 2.0 * batch * length * model.layers * (attention + mlp)


def count_step_operations(config: TrainConfig, model: ModelConfig) -> float:
    harvest = 0.0 if config.store else count_forward_operations(model, config.batch, config.length)
    return harvest + count_coder_operations(config.coder, config.batch * config.length)


def measure_matmul_rate(dtype: str = "float32", size: int | None = None, repeats: int = 5) -> float:
    """Operations per second of one large matmul on one device."""
    size = size or (1024 if jax.default_backend() == "cpu" else 8192)
    multiply = jax.jit(lambda a, b: jnp.dot(a, b, precision="highest" if dtype == "float32" else None))
    left, right = jax.random.normal(jax.random.key(0), (2, size, size), jnp.dtype(dtype))
    jax.block_until_ready(multiply(left, right))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(multiply(left, right))
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


@cache
def measure_machine_rate(dtype: str) -> float:
    """Operations per second of large matmuls on all devices, measured once in a process.

    Virtual devices of a CPU share its cores.
    """
    return measure_matmul_rate(dtype) * (1 if jax.default_backend() == "cpu" else jax.device_count())
