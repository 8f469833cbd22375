"""Attribution graphs: one prompt on a model of GPT-2's size beside circuit-tracer, a long prompt, many prompts at once.

    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000
    python experiments/bench/attribution.py
    python experiments/bench/attribution.py --long      # also 256 tokens with 20,000 active features

The first case has 12 layers x 768, 8,192 features a layer, 16 tokens, 20 active features a layer and token, all rows
traced: 3,600 features under circuit-tracer's conventions, in which position 0 has none. Expected is a whole call, once
compiled, at least 24 times faster than circuit-tracer 0.5.0 (with `--peer`, where it is installed: 3 more minutes).
Operations are those that the graph needs: a target's gradient takes 4 D^2 at each layer below it and each position up
to it (with as many key heads as heads), and every feature below it takes 2 D for each layer that it writes to. The
graph of the long prompt is made in a process of its own; expected is a peak of at most 3 GB above model and coder.
The variable lets glibc take large pages and keep what it has; without it a call takes a tenth longer.
Cost: 5 minutes and 6 GB; 3 more minutes with --long.
"""

import os
import subprocess
import sys
from typing import Any

import jax
import numpy as np
from machine import Case, forget_peak, matmul_rate, measure_peak, parser, report, run_alone
from random_gpt2 import FEATURES, L0, LAYERS, VOCABULARY, make_peer, random_coder, random_model, time_call

import jclt
from jclt.coders import SparseCoder
from jclt.graphs import Graph
from jclt.memory import measure_used_memory
from jclt.models import Model, ModelConfig
from jclt.world import TASKS

BATCHES = (1, 8, 32)
BUDGET = 2048


def count_operations(graph: Graph, config: ModelConfig) -> float:
    """The operations of the products that all edges of features and errors need."""
    layers, length, width = graph.layers, len(graph.tokens), config.width
    active = np.zeros((layers, length))
    np.add.at(active, (graph.features[:, 0], graph.features[:, 1]), 1)
    writing = np.cumsum(np.cumsum(active, axis=0), axis=0)  # pairs of a feature and a layer up to this one it writes to
    below = np.concatenate([np.zeros((1, length)), np.cumsum(writing, axis=1)])
    ends = np.stack([np.full_like(graph.logit_positions, layers), graph.logit_positions], axis=1)
    targets = np.concatenate([graph.features[:, :2], ends])
    layer, position = targets.T
    a_layer = 2.0 * width * (config.heads + config.key_heads) * config.head_size
    through_attention = a_layer * np.minimum(layer, layers - 1) * (position + 1)
    return float(np.sum(through_attention + 2.0 * width * below[layer, position]))


def time_peer(model: Model, coder: SparseCoder, tokens: np.ndarray) -> float | None:
    """circuit-tracer on the same model, coder and prompt; the faster of two calls."""
    peer = make_peer(model, coder)
    if peer is None:
        return None
    import torch
    from circuit_tracer import attribute

    ids = torch.tensor(tokens)
    return min(time_call(lambda: attribute(ids, peer, batch_size=128, verbose=False))[0] for _ in range(2))


def time_one_prompt(repeats: int, with_peer: bool) -> list[Case]:
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, 16)
    tokens[0] = 0  # circuit-tracer puts this one first where it is missing
    model = random_model(512)
    coder = random_coder(model, tokens, FEATURES, L0)
    first, graph = time_call(lambda: jclt.attribute(model, coder, tokens, conventions="circuit-tracer"))
    runs = [
        time_call(lambda: jclt.attribute(model, coder, tokens, conventions="circuit-tracer"))[0] for _ in range(repeats)
    ]
    seconds, work, rate = min(runs), count_operations(graph, model.config), matmul_rate(5)
    other_length, _ = time_call(
        lambda: jclt.attribute(model, coder, np.resize(tokens, 23), conventions="circuit-tracer")
    )
    print(f"first call {first:.1f} s, of which {first - seconds:.1f} s compile")
    print(f"first call of another length {other_length:.1f} s")
    peer = time_peer(model, coder, tokens) if with_peer else None
    beside: dict[str, Any] = {} if peer is None else {"against": "circuit-tracer", "ratio": peer / seconds}
    return [
        Case(f"12 x 768, 16 tokens, {len(graph.features)} features", work, seconds, work / seconds / rate, **beside)
    ]


def time_budget(repeats: int) -> None:
    """Prints the time of 2,048 rows beside that of all, on 24 tokens; in turn, as a machine's speed may change."""
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=24)
    model = random_model(64)
    coder = random_coder(model, tokens, FEATURES, L0)
    times, features = np.full((2, repeats + 1), np.inf), 0
    for turn in range(repeats + 1):  # the first compiles
        for kind, budget in enumerate((7500, BUDGET)):
            times[kind, turn], graph = time_call(
                lambda budget=budget: jclt.attribute(
                    model, coder, tokens, conventions="circuit-tracer", max_features=budget
                )
            )
            features = max(features, len(graph.features))
    everything, part = times[:, 1:].min(axis=1)
    print(f"{BUDGET} of {features} features: {part:.2f} s, all {everything:.2f} s: {part / everything:.1%}")


def trace_long_prompt() -> Case:
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, 256)
    model = random_model(512)
    coder = random_coder(model, tokens, FEATURES, 20_000 / 256 / LAYERS)
    reads = jclt.run(model, tokens, capture=("resid_mid",))[1]["resid_mid"]
    active = sum(int(np.count_nonzero(coder.encode(layer, read))) for layer, read in enumerate(reads))
    del reads
    before = (measure_used_memory() or 0) / 1e9
    forget_peak()
    jclt.attribute(model, coder, tokens, max_features=600)  # compiles
    seconds, graph = time_call(lambda: jclt.attribute(model, coder, tokens))
    peak, work = measure_peak(), count_operations(graph, model.config)
    counts = f"{active} active features, {len(graph.features)} traced, {graph.missing:.2f} missing"
    print(f"256 tokens: {counts}, peak {peak:.2f} GB, {peak - before:.2f} GB above model and coder")
    name = f"256 tokens, {len(graph.features)} features traced"
    return Case(name, work, seconds, work / seconds / matmul_rate(5), peak_gb=peak)


def time_many_prompts() -> list[Case]:
    """On the shipped model: prompts of all tasks, against the number that go through the device at once."""
    model, coder = jclt.load_model("demo"), jclt.load_coder("demo")
    prompts = [e.prompt for task in TASKS.values() for e in task.examples("report", 24, 0)]
    cases = []
    for batch in BATCHES:
        jclt.attribute_batch(model, coder, prompts, batch=batch)
        seconds, graphs = time_call(lambda batch=batch: jclt.attribute_batch(model, coder, prompts, batch=batch))
        print(f"{jax.device_count()} devices, batch {batch}: {len(graphs) / seconds * 60:.0f} graphs a minute")
        cases.append(Case(f"{len(prompts)} prompts, batch {batch}, {jax.device_count()} devices", 0.0, seconds))
    return cases


def print_tolerances() -> None:
    """Prints which share of its rows each graph of the shipped model needs for each tolerance of its influence. Rows of
    features in the first layer need no computation."""
    model, coder = jclt.load_model("demo"), jclt.load_coder("demo")
    prompts = [e.prompt for task in TASKS.values() for e in task.examples("report", 8, 0)]
    all_rows = [len(graph.features) for graph in jclt.attribute_batch(model, coder, prompts)]
    for tolerance in (0.1, 0.05, 0.01):
        graphs = jclt.attribute_batch(model, coder, prompts, tolerance=tolerance)
        traced = np.array([(np.count_nonzero(g.features[:, 0]), len(g.features)) for g in graphs])
        computed, kept = (traced / np.array(all_rows)[:, None]).mean(axis=0)
        missing = max(graph.missing for graph in graphs)
        print(f"tolerance {tolerance}: {computed:.0%} of the rows computed, {kept:.0%} kept, {missing:.3f} missing")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--peer", action="store_true", help="also time circuit-tracer")
    options.add_argument("--long", action="store_true", help="also time a prompt of 256 tokens")
    options.add_argument("--only-many", action="store_true", help="only many prompts at once")
    arguments = options.parse_args()
    cases = list[Case]()
    if not arguments.only_many:
        cases += time_one_prompt(min(arguments.repeats, 3), arguments.peer)
        time_budget(arguments.repeats)
    cases += time_many_prompts()
    if not arguments.only_many:
        flags = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
        subprocess.run([sys.executable, __file__, "--only-many"], env=flags, check=True)
        print_tolerances()
        if arguments.long:
            cases.append(run_alone(trace_long_prompt))
    report(cases, matmul_rate(5), arguments.json)


if __name__ == "__main__":
    main()
