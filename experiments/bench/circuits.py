"""RelP scores of all neurons of a model of GPT-2's size, for 32 pairs, beside the matmul rate.

    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000
    python experiments/bench/circuits.py

Random weights, prompts of 16 tokens. Operations are those of the products that scores need: one forward and one
backward pass over the clean prompts, the latter only to activations, so as many as the first; with corrupted prompts
one more forward pass over these. The unembedding is of each prompt's last token. Expected: at least 70% of the rate of
a large matmul. The variable lets glibc take large pages and keep what it has, which matters where products are fast:
without it a seventh of the time goes into pages that are asked for again in each call. Cost: half a minute on 2 CPU
cores.
"""

import numpy as np
from machine import Case, best, forget_peak, matmul_rate, measure_peak, parser, report
from random_gpt2 import VOCABULARY, random_model

import jclt
from jclt.circuits import score_nodes
from jclt.circuits.node_scores import Reference
from jclt.models import ModelConfig

PAIRS, LENGTH = 32, 16


def count_forward(config: ModelConfig) -> float:
    """Operations of one forward pass over all prompts of one side."""
    head, width = config.head_size, config.width
    per_token = 2 * width * head * (config.heads + config.key_heads) + 2 * width * config.mlp_width
    attention = 2 * LENGTH * head * config.heads  # per token: scores and mixes
    return 2.0 * PAIRS * (config.layers * LENGTH * (per_token + attention) + width * config.vocabulary)


def main() -> None:
    options = parser(__doc__).parse_args()
    model, drawn = random_model(LENGTH), np.random.default_rng(0)
    tokens = drawn.integers(VOCABULARY, size=(2, PAIRS, LENGTH))
    pairs = jclt.make_pairs(model, [(clean, corrupted, 1, 2) for clean, corrupted in zip(*tokens, strict=True)])
    forward, rate, cases = count_forward(model.config), matmul_rate(options.repeats), []
    kinds: tuple[tuple[str, int, Reference], ...] = (("one run and zero", 2, "zero"), ("two runs", 3, "corrupted"))
    for name, passes, reference in kinds:
        forget_peak()
        seconds = best(lambda r=reference: score_nodes(model, pairs, "neurons", reference=r).per_pair, options.repeats)
        work = passes * forward
        cases.append(
            Case(f"RelP, neurons, {PAIRS} pairs, {name}", work, seconds, work / seconds / rate, peak_gb=measure_peak())
        )
    report(cases, rate, options.json)


if __name__ == "__main__":
    main()
