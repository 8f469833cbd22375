"""Compile time against depth: layers are scanned, so 48 of them compile like 4.

    python experiments/bench/compile_time.py

Expected: 48 layers within 1.5x of 4 when scanned. The unrolled form is timed too. Cost: about a minute.
"""

import time
from dataclasses import replace

import jax
import jax.numpy as jnp
from forward import GPT2, count_operations
from machine import Case, arguments, matmul_rate, report

from jclt.models import ModelConfig, abstract_params, forward

TOKENS = jax.ShapeDtypeStruct((8, 128), jnp.int32)


def time_compilation(config: ModelConfig, unroll: bool, repeats: int) -> float:
    """The fastest of a few fresh compilations, tracing included."""
    times = []
    for attempt in range(repeats):
        jax.clear_caches()
        run = jax.jit(lambda p, t, attempt=attempt: forward(config, p, t, unroll=unroll)[0] + attempt)
        start = time.perf_counter()
        run.lower(abstract_params(config), TOKENS).compile()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    options = arguments(__doc__)
    cases = []
    for unroll in (False, True):
        seconds_4, seconds_48 = (
            time_compilation(replace(GPT2, layers=layers), unroll, min(3, options.repeats)) for layers in (4, 48)
        )
        form = "unrolled" if unroll else "scanned"
        cases.append(Case(f"compile, 4 layers, {form}", count_operations(replace(GPT2, layers=4), 8, 128), seconds_4))
        deep = count_operations(replace(GPT2, layers=48), 8, 128)
        cases.append(Case(f"compile, 48 layers, {form}", deep, seconds_48, None, "4 layers", seconds_4 / seconds_48))
    report(cases, matmul_rate(options.repeats), options.json)


if __name__ == "__main__":
    main()
