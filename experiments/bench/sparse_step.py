"""A training step on the sparse path beside the same step on the dense one, harvest and optimizer included.

    keep=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000:glibc.malloc.top_pad=17000000000
    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:$keep
    python experiments/bench/sparse_step.py
    python experiments/bench/sparse_step.py --table    # also over features, active features and layers

At 12 layers x 768, 8,192 features a layer, 2,048 tokens and about 100 active features a token, float32 on 2 CPU cores,
expected are at least 5 times the dense tokens a second and no more memory. Features are ReLUs. Their
biases are set so that each is active on the share of the tokens that gives this number. The variable lets glibc take
large pages and keep all its memory: a sparse step that requests memory anew each time takes half as long again. Each
case runs in a separate process, so that its peak of memory is measured alone. Cost: 4 minutes and 20 GB, 15 more with
--table.
"""

import argparse
import json
import resource
import subprocess
import sys
from dataclasses import replace

import jax
from forward import GPT2
from machine import Case, matmul_rate, parser, report
from train_step import LENGTH, ROWS, make_config, time_step

from jclt.mesh import make_mesh
from jclt.training.coder.speed import count_coder_operations, count_forward_operations

TOKENS = ROWS * LENGTH
TABLE = [
    (12, 2048, 100),
    *((12, 4096, active) for active in (25, 100, 400, 800, 1600)),
    (4, 4096, 100),
    (4, 16384, 100),
]
"""Layers, features a layer, active features a token over all layers."""


def measure_case(layers: int, features: int, active: int, capacity: float | None, repeats: int) -> dict[str, float]:
    """Seconds a step, and this process's peak of memory in GB."""
    model = replace(GPT2, layers=layers)
    config = make_config(model, features)
    share = active / (layers * features)
    coder = replace(config.coder, activation="relu")
    config = replace(config, coder=coder, initial_density=share, learning_rate=1e-9)
    seconds = time_step(config, model, make_mesh(1, 1), repeats, capacity=capacity)
    return {"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def run_case(layers: int, features: int, active: int, capacity: float | None, repeats: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--case", json.dumps([layers, features, active, capacity, repeats])]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def compare_paths(layers: int, features: int, active: int, repeats: int) -> list[Case]:
    model = replace(GPT2, layers=layers)
    work = count_coder_operations(make_config(model, features).coder, TOKENS) + count_forward_operations(
        model, ROWS, LENGTH
    )
    capacity = -(-3.0 * active // (2 * layers))  # 1.5 times the active features
    dense, sparse = (run_case(layers, features, active, limit, repeats) for limit in (None, capacity))
    name = f"{layers} x 768, {features} features, {active} active"
    gain = dense["seconds"] / sparse["seconds"]
    return [
        Case(f"dense: {name}, {dense['peak']:.1f} GB", work, dense["seconds"]),
        Case(f"sparse: {name}, {sparse['peak']:.1f} GB", work, sparse["seconds"], None, "dense", gain),
    ]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--table", action="store_true", help="also over features, active features and layers")
    options.add_argument("--case", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.case:
        print(json.dumps(measure_case(*json.loads(arguments.case))))
        return
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    sizes = [(12, 8192, 100), *(TABLE if arguments.table else ())]
    rate = matmul_rate(arguments.repeats, dtype)
    cases = [case for size in sizes for case in compare_paths(*size, min(arguments.repeats, 4))]
    rate = max(rate, matmul_rate(arguments.repeats, dtype))
    report(
        [case._replace(matmul_fraction=case.operations / case.seconds / rate) for case in cases], rate, arguments.json
    )
    print("GFLOP are those of the dense step in every case")


if __name__ == "__main__":
    main()
