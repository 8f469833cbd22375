"""How much is computed at once, and whether it fits in memory."""

import jax
import numpy as np

from jclt.attribution.edges import SOURCES_AT_ONCE
from jclt.attribution.nodes import Layout
from jclt.attribution.options import Options
from jclt.attribution.ranking import size_of_rows
from jclt.attribution.targets import Outputs
from jclt.coders import CoderConfig
from jclt.memory import SPARE, check_memory, free_host_memory
from jclt.models import Model, ModelConfig
from jclt.shapes import Int

GRADIENT = {"cpu": 3 << 19, "gpu": 1 << 27, "tpu": 1 << 27}


BLOCK = {"cpu": 128, "gpu": 1024, "tpu": 1024}
"""A block's gradients hold at most so many numbers, and it has at most so many targets, by kind of device: enough for
long products, few enough that its targets are alike."""


CALL = {"cpu": 1 << 27, "gpu": 1 << 31, "tpu": 1 << 31}
"""Bytes of gradients and edges of the blocks that are computed by one call, beyond which there is one block a call."""


BATCH_BYTES = {"cpu": 1 << 30, "gpu": 1 << 33, "tpu": 1 << 32}
"""Bytes of a device that prompts traced together may take, beyond which they are traced one by one. Not what is free:
which prompts share a batch must not depend on that."""


IN_FLIGHT = 2
"""Calls that the device works on while the host takes in the one before."""


def length_bucket(length: int) -> int:
    """The length that prompts are filled up to: a multiple of 8, and four steps from each power of two to the next."""
    step = max(8, 2 ** max((length - 1).bit_length() - 3, 0))
    return -(-length // step) * step


def size_for(need: int, least: int = 1) -> int:
    """How long an array of varying content is made: a power of two or the middle between two, so that most batches of
    prompts find their programs compiled. It depends on nothing but the content, as the last bits of results may
    depend on it."""
    power = 1 << (max(need, least) - 1).bit_length()
    return power * 3 // 4 if need <= power * 3 // 4 and power * 3 // 4 >= least else power


def pass_bytes(model: ModelConfig, coder: CoderConfig, length: int, itemsize: int) -> int:
    """About what the true pass over one prompt takes on a device."""
    of_coder = 2 * len(coder.covered) * coder.features
    of_model = 8 * model.layers * model.width + 2 * model.layers * model.heads * length
    return length * (of_coder + of_model) * itemsize + model.vocabulary * itemsize


def source_bytes(
    model: ModelConfig, coder: CoderConfig, length: int, layout: Layout, at_once: int, itemsize: int
) -> int:
    """About what one prompt's sources and targets take on a device while edges are computed, beside the pass."""
    covered, size = len(coder.covered), model.width
    reach = max(coder.reach(index) for index in range(covered))
    listed = covered * layout.longest
    written = covered * layout.tiles * layout.tile * size
    lists = listed * size * (2 + max(reach, at_once)) + 2 * listed * length
    return (2 * written + lists) * itemsize


def blocks_of_call(
    backend: str, length: int, width: int, depth: int, layout: Layout, size: int, count: int, itemsize: int
) -> int:
    """How many blocks of targets one call computes, a power of two."""
    of_one = 2 * size * length * width + size * (layout.groups * layout.tiles * layout.tile + depth * length)
    most = max(CALL[backend] // (of_one * count * itemsize), 1)
    return 1 << (most.bit_length() - 1)


def embeddings_at_once(backend: str, longest: int, covered: int, width: int, count: int) -> int:
    """How many embeddings are followed at once, a power of two: each is read by all targets."""
    most = min(max(CALL[backend] // 2 // (longest * covered * width * count), 1), SOURCES_AT_ONCE)
    return 1 << (most.bit_length() - 1)


def check_rows(
    model: Model,
    config: CoderConfig,
    counts: Int[np.ndarray, "B C T"],
    explained: list[Outputs],
    options: Options,
    itemsize: int,
    of_sources: int,
    of_target: int,
) -> None:
    """An error of one line if the rows of the prompts' graphs, or the bytes that their sources and each target take on
    the device, do not fit; it says how many features would."""
    backend = jax.default_backend()
    on_cpu = backend == "cpu"
    embeddings = 1 + (model.config.learned_positions and options.conventions == "jclt")

    def on_device(limit: int) -> int:
        return of_sources + min((IN_FLIGHT + 1) * CALL[backend], (limit + outs) * of_target)

    def need(limit: int) -> float:
        sizes = [
            size_of_rows(own, config.covered, model.config.layers, embeddings, limit, len(ends.tokens))
            for own, ends in zip(counts, explained, strict=True)
        ]
        rows, graphs = (np.array(x) for x in zip(*sizes, strict=True))
        return float(rows.sum() + graphs.max()) * itemsize + (on_device(limit) if on_cpu else 0)

    active, outs = int(counts.sum(axis=(1, 2)).max()), max(len(own.tokens) for own in explained)
    limit, free = min(options.max_features, active), free_host_memory()
    if not on_cpu:
        check_memory(on_device(limit), f"prompt: its {active} active features", "a shorter prompt would fit")
    if free is not None and need(limit) > free * (1 - SPARE):
        low, high = 0, limit
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if need(middle) <= free * (1 - SPARE) else (low, middle)
        remedy = f"max_features={low} would fit" if low else "a shorter prompt would fit"
        what = f"prompt: a graph of {limit} of its {active} active features"
        check_memory(need(limit), what, remedy, host=True)
