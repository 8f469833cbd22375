"""The pass that describes every feature of a coder, beside the model's forward pass on the same tokens.

    python experiments/bench/features.py

GPT-2 small (12 layers x 768) with random weights and 8,192 features a layer, about 100 of all 98,304 active at a token;
float32, uniform random tokens. Timed are the forward pass with its logits, the forward pass and all encoders, and the
whole pass: all that is counted of every feature (`jclt.features.describe.count_blocks`), as it goes on after its first
65,536 tokens, in which every example is new and counting takes three times as long. A machine's speed changes within
a minute, so every few batches of the whole pass one forward pass with logits is run and timed, which the pass is
compared with. The last line compares the processor time of all threads, which other programs on the machine change
less. Expected is a whole pass of at most 1.3 times the forward pass. Cost: twelve minutes and 5 GB.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from forward import GPT2, count_operations
from machine import Case, forget_peak, matmul_rate, measure_peak, parser, report

from jclt.coders import CoderConfig, SparseCoder, declare_coder
from jclt.features import Sizes, block_events, describe
from jclt.features.block_events import BlockLister
from jclt.features.describe import count_blocks
from jclt.features.events import Events, join_events
from jclt.features.rows import Block, count_block_rows, find_rows
from jclt.features.weights import describe_weights
from jclt.models import Model, declare, forward
from jclt.models.read_sites import run_to_sites
from jclt.training.coder.speed import count_forward_operations

LENGTH, FEATURES, ACTIVE, BATCH = 128, 8192, 100, 16
BETWEEN = 8
"""Batches of the whole pass between two forward passes that it is compared with."""


def measure(run: Callable[[], Any], repeats: int, warm: bool = True) -> np.ndarray:
    """Seconds of the fastest run and the least processor time of any, after one that is not counted."""
    if warm:
        jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        jax.block_until_ready(run())
        times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return np.min(times, axis=0)


def time_between(run: Callable[[], Any]) -> tuple[type[BlockLister], list[np.ndarray]]:
    """A lister that times `run` after every few batches, and the list that it adds these times to."""
    times: list[np.ndarray] = []

    class TimedLister(BlockLister):
        def list_events(self, block: Block, wanted: Any = None) -> tuple[Block, list[Events]]:
            found, size = [], BETWEEN * self.rows
            for first in range(0, len(block.rows), size):
                found.append(super().list_events(Block(*(x[first : first + size] for x in block)), wanted)[1])
                times.append(measure(run, 1, warm=False))
            tokens = size * block.tokens.shape[1]
            return block, [join_events(parts, tokens) for parts in zip(*found, strict=True)]

    return TimedLister, times


def make_coder(model: Model, tokens: np.ndarray) -> SparseCoder:
    """Random directions whose thresholds make each feature active on its share of these tokens."""
    config = CoderConfig(kind="transcoder", features=FEATURES, activation="jumprelu").fit_to_model(GPT2, "gpt2")
    random = np.random.default_rng(0)
    coder = declare_coder(config, lambda _, shape: jnp.asarray(0.02 * random.standard_normal(shape, np.float32)))
    lister = BlockLister(model, coder, LENGTH, len(tokens))
    share = ACTIVE / (GPT2.layers * FEATURES)
    reads = lister.read(tokens)

    def choose(layer: int) -> jax.Array:
        h = coder.compute_preactivation(layer, reads[layer].reshape(-1, GPT2.width))
        return jnp.sort(h, axis=0)[-1 - round(share * len(h))]

    layers = [replace(weights, threshold=choose(layer)) for layer, weights in enumerate(coder.layers)]
    return replace(coder, layers=tuple(layers))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=1 << 16, help="tokens of the whole pass after its first block")
    options.add_argument(
        "--batch", type=int, default=BATCH, help="rows of 128 tokens that go through the model at once"
    )
    options = options.parse_args()
    size, block_events.BATCH_TOKENS["cpu"] = options.batch, options.batch * LENGTH
    weights = enumerate(declare(GPT2).items())
    params = {name: weight.init(jax.random.fold_in(jax.random.key(0), i), jnp.float32) for i, (name, weight) in weights}
    model, random = Model(GPT2, params, None, "gpt2"), np.random.default_rng(0)
    first, others = count_block_rows(LENGTH), options.tokens // LENGTH
    rows = random.integers(0, GPT2.vocabulary, (first + others, LENGTH))
    coder, batch = make_coder(model, rows[: 4 * size].astype(np.int32)), jnp.asarray(rows[:size], jnp.int32)
    lister = BlockLister(model, coder, LENGTH, size)

    @jax.jit
    def run_and_encode(params: dict[str, jax.Array], coder: SparseCoder, tokens: jax.Array) -> list[jax.Array]:
        seen = run_to_sites(GPT2, params, "mlp_in", coder.config.covered, tokens)
        return [jnp.max(coder.encode(layer, seen[layer]), axis=(0, 1)) for layer in range(GPT2.layers)]

    run = jax.jit(lambda params, tokens: forward(GPT2, params, tokens)[0])
    repeats, count = min(options.repeats, 3), batch.size
    rate = matmul_rate(options.repeats)
    logits = measure(lambda: run(params, batch), repeats)
    read = measure(lambda: lister.read(rows[:size].astype(np.int32)), repeats)
    encoded = measure(lambda: run_and_encode(params, coder, batch), repeats)

    data, sizes = find_rows(model, rows, None, LENGTH), Sizes()
    with tempfile.TemporaryDirectory() as folder:
        begun = data._replace(numbers=data.numbers[:first])
        count_blocks(model, coder, begun, sizes, None, Path(folder))
        forget_peak()
        describe.BlockLister, between = time_between(lambda: run(params, batch))
        start = time.perf_counter(), time.process_time()
        tallies = count_blocks(model, coder, data, sizes, None, Path(folder))  # goes on from there
        whole = np.subtract((time.perf_counter(), time.process_time()), start) - np.sum(between, axis=0)
        whole *= count / (others * LENGTH)
    beside, peak = np.mean(between, axis=0), measure_peak()
    start = time.perf_counter()
    describe_weights(model, coder, 0, sizes)
    of_weights = GPT2.layers * (time.perf_counter() - start)

    last_mlp = 4.0 * count * GPT2.width * GPT2.mlp_width
    inside = count_forward_operations(GPT2, size, LENGTH) - last_mlp
    encode = 2.0 * count * GPT2.layers * FEATURES * GPT2.width
    by_weights = 2.0 * GPT2.layers * FEATURES * GPT2.width * (GPT2.vocabulary + 2 * FEATURES)
    logit_work, rate = count_operations(GPT2, size, LENGTH), max(rate, matmul_rate(options.repeats))

    def case(name: str, work: float, seconds: float, **beside: Any) -> Case:
        return Case(name, work, seconds, work / seconds / rate, **beside)

    cases = [
        case(f"forward with logits, {count} tokens", logit_work, logits[0]),
        case("forward to the last layer's input", inside, read[0]),
        case("the same and all encoders", inside + encode, encoded[0], against="forward", ratio=logits[0] / encoded[0]),
        case(f"forward with logits, mean of {len(between)} in the whole pass", logit_work, beside[0]),
        case("the whole pass", inside + encode, whole[0], against="forward", ratio=beside[0] / whole[0], peak_gb=peak),
        case("once: what weights say, 98,304 features", by_weights, of_weights),
    ]
    report(cases, rate, options.json)
    fired = sum(int(tally["count"].sum()) for tally in tallies) / rows.size
    print(f"{fired:.0f} active at a token; {count / whole[0]:.0f} tokens a second")
    for name, i in (("time", 0), ("processor time", 1)):
        print(f"{name}: forward pass and encoders {encoded[i] / logits[i]:.2f}x the forward pass with logits;", end=" ")
        print(f"the whole pass {whole[i] / beside[i]:.2f}x the forward passes between its batches")


if __name__ == "__main__":
    main()
