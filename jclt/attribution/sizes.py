"""How much is computed at once, and whether it fits in memory."""

from typing import NamedTuple

import jax
import numpy as np

from jclt.attribution.embeddings import MOST_EMBEDDINGS_AT_ONCE
from jclt.attribution.options import Options
from jclt.attribution.sweep.cuts import COLUMN_BYTES
from jclt.attribution.sweep.tiles import (
    TILES_AT_ONCE,
    Layout,
    choose_tile_size,
    count_groups,
    count_kept_tiles,
    count_tiles,
)
from jclt.attribution.sweep.vectors import VectorNodes
from jclt.attribution.targets import Outputs
from jclt.coders import CoderConfig
from jclt.graphs.adjacency import is_large
from jclt.memory import SPARE_SHARE, check_memory, measure_free_host_memory
from jclt.models import Model, ModelConfig
from jclt.shapes import Int

GRADIENT_SIZE = {"cpu": 3 << 19, "gpu": 1 << 27, "tpu": 1 << 27}
SMALLEST_BLOCK, LARGEST_BLOCK = 16, {"cpu": 128, "gpu": 1024, "tpu": 256}
"""About how many numbers the gradients of a block have, and its least and most targets, by kind of device: enough for
efficient products, few enough that the targets of a block begin in much the same layer."""

MOST_STOPS = 12
"""A block ends at the first of this many evenly spaced positions that lies beyond all its targets."""

CALL_BYTES = {"cpu": 1 << 27, "gpu": 1 << 31, "tpu": 1 << 31}
"""The most bytes of edges that one call computes; a larger block has a call of its own."""

BATCH_BYTES = {"cpu": 1 << 30, "gpu": 1 << 33, "tpu": 1 << 32}
"""The most bytes of a device for prompts that are traced together; beyond it, fewer are traced together. It does not
depend on what is free, since that must not decide which prompts share a batch."""

PROMPTS_AT_ONCE = {"cpu": 8, "gpu": 1 << 10, "tpu": 1 << 10}
"""The most prompts of a batch that a device traces together. On a CPU more gain nothing, and are padded more."""

OUTPUTS_AT_ONCE = 8
"""Outputs whose gradients with respect to a layer's features are in memory together."""

SHORTER = "a shorter prompt would fit"

CALLS_IN_FLIGHT = 2
"""Calls that the device works on while the host stores the results of the one before."""


def round_up_length(length: int) -> int:
    """The length that prompts are padded to: a multiple of 8, with four steps from each power of two to the next."""
    step = max(8, 2 ** max((length - 1).bit_length() - 3, 0))
    return -(-length // step) * step


def round_up(need: int, least: int = 1) -> int:
    """The length of an array for `need` entries: a power of two or the middle between two, so that most batches of
    prompts find their programs compiled. It depends on nothing but the content, since the last bits of results may
    depend on it."""
    power = 1 << (max(need, least) - 1).bit_length()
    return power * 3 // 4 if need <= power * 3 // 4 and power * 3 // 4 >= least else power


def choose_layout(config: CoderConfig, counts: Int[np.ndarray, "B C T"], list_length: int, backend: str) -> Layout:
    """The layout for a batch with so many active features, in lists of this length."""
    groups = count_groups(config)
    tile_size = choose_tile_size(counts, groups, backend)
    tiles, at_once = count_tiles(counts, groups, tile_size), TILES_AT_ONCE[backend]
    kept = count_kept_tiles(tiles, at_once)
    return Layout(
        layers=config.covered,
        list_length=list_length,
        groups=groups,
        tiles=at_once * round_up(int(kept.max()) // at_once, 4),
        kept_tiles=at_once * round_up(int(kept.sum(axis=1).max()) // at_once, 4),
        tile_size=tile_size,
        at_position=round_up(int(tiles.max())),
        tiles_at_once=at_once,
    )


def estimate_pass_bytes(model: ModelConfig, coder: CoderConfig, length: int, itemsize: int) -> int:
    """About what the true pass over one prompt and encoding one of its layers take on a device."""
    for_coder = 4 * coder.features
    for_model = 8 * model.layers * model.width + 2 * model.layers * model.heads * length
    return length * (for_coder + for_model) * itemsize + model.vocabulary * itemsize


def estimate_source_bytes(
    model: ModelConfig,
    coder: CoderConfig,
    length: int,
    layout: Layout,
    at_once: int,
    itemsize: int,
    vectors: VectorNodes | None = None,
) -> int:
    """About what one prompt's sources and targets take on a device, beside the true pass: the tiles, encoder rows (as
    they are read, and in one array), and the largest of what is computed beside them: decoder rows of one layer, what
    targets read of embeddings, and folded targets."""
    covered, width = len(coder.covered), model.width
    reach = max(coder.reach(index) for index in range(covered))
    copies = 2 if model.post_norms and coder.writes == "mlp_raw_out" else 1  # folding these norms makes new tiles
    in_tiles = copies * layout.kept_tiles * layout.tile_size * width
    listed = covered * layout.list_length
    of_one_layer = 3 * layout.list_length * reach * width
    of_embeddings = 2 * at_once * count_embedding_reads(model, length, layout)
    beside = max(of_one_layer, of_embeddings, 3 * listed * width)
    of_vectors = 0 if vectors is None else estimate_vector_bytes(model, length, vectors, itemsize)
    return (in_tiles + 2 * listed * width + beside + 2 * listed * length) * itemsize + of_vectors


def count_edges(model: ModelConfig, length: int, layout: Layout) -> int:
    """The numbers that a device keeps of the edges into one target."""
    return layout.groups * layout.tiles * layout.tile_size + model.layers * length


def count_vector_edges(model: ModelConfig, length: int, heads_in_layer: int, has_streams: bool) -> int:
    """The same of those from heads and residual streams."""
    return model.layers * (heads_in_layer + (length if has_streams else 0))


def estimate_target_bytes(
    model: ModelConfig, length: int, layout: Layout, itemsize: int, vectors: VectorNodes | None = None
) -> int:
    """What the gradients and edges of one target take on a device."""
    edges = count_edges(model, length, layout)
    if vectors is not None:
        edges += count_vector_edges(model, length, vectors.head_lists.shape[2], vectors.streams.shape[1] > 0)
    return (2 * length * model.width + edges) * itemsize


def estimate_vector_pass_bytes(model: ModelConfig, length: int, itemsize: int) -> int:
    """What the values of all heads, the streams between layers, and the outputs' gradients by them take of one prompt
    where heads or streams may be nodes. The gradients of single layers are put in one array, so they count twice."""
    of_position = model.heads * model.head_size + model.width
    return 3 * model.layers * length * of_position * itemsize


def estimate_vector_bytes(model: ModelConfig, length: int, vectors: VectorNodes, itemsize: int) -> int:
    """What one prompt's heads and streams take beside its sources: where nothing passes, the values of all heads and
    all streams, and of each node its gradient, coefficients and vector."""
    heads, streams = vectors.heads.shape[1], vectors.streams.shape[1]
    masks = model.layers * length * (model.heads + 1)
    values = model.layers * length * ((model.heads * model.head_size if heads else 0) + (model.width if streams else 0))
    gradients = heads * model.head_size + streams * model.width
    return (masks + values + gradients + (heads + streams) * (length + model.width)) * itemsize


def estimate_score_bytes(model: ModelConfig, coder: CoderConfig, length: int, itemsize: int) -> int:
    """About what scoring the features of one prompt takes on the device with the coder."""
    covered = len(coder.covered)
    kept = covered * coder.features * (4 + 1)  # scores, and which features are chosen
    gradients = OUTPUTS_AT_ONCE * coder.features * itemsize
    streams = 2 * OUTPUTS_AT_ONCE * (2 + coder.reach(0)) * model.width * itemsize
    return length * (kept + gradients + streams)


def estimate_prompt_bytes(
    model: ModelConfig, coder: CoderConfig, options: Options, shards: int, length: int, itemsize: int
) -> int:
    """About what one prompt takes on a device until its nodes are chosen. The device with the coder scores the features
    of the prompts of all shards."""
    scores = shards * estimate_score_bytes(model, coder, length, itemsize) if options.has_scores(coder) else 0
    vectors = estimate_vector_pass_bytes(model, length, itemsize) if options.has_vectors else 0
    return estimate_pass_bytes(model, coder, length, itemsize) + scores + vectors


def choose_block_size(backend: str, targets: int, length: int, width: int) -> int:
    """The size of the blocks for at most so many targets of a prompt, a power of two."""
    most = min(max(SMALLEST_BLOCK, GRADIENT_SIZE[backend] // (length * width)), LARGEST_BLOCK[backend])
    return min(1 << (most.bit_length() - 1), max(SMALLEST_BLOCK, 1 << (targets - 1).bit_length()))


def choose_blocks_per_call(backend: str, blocks: int, target_bytes: int, size: int) -> int:
    """How many of a device's blocks one call computes, a power of two, given the bytes of the edges into a target."""
    most = max(CALL_BYTES[backend] // (size * target_bytes), 1)
    return min(1 << (most.bit_length() - 1), 1 << (blocks - 1).bit_length())


def list_stops(length: int) -> tuple[int, ...]:
    """The numbers of positions that a block may be computed for."""
    return tuple(sorted({-(-length * number // MOST_STOPS) for number in range(1, MOST_STOPS + 1)}))


def count_embedding_reads(model: ModelConfig, length: int, layout: Layout) -> int:
    """The numbers that are read of one embedding: those at all places, and those that one layer's targets take."""
    return (model.layers * length + layout.list_length) * model.width


def choose_embeddings_at_once(
    backend: str, model: ModelConfig, length: int, layout: Layout, prompts: int, itemsize: int
) -> int:
    """How many embeddings are followed at once, a power of two, so that what is read of them takes at most half of
    `CALL_BYTES`."""
    read = count_embedding_reads(model, length, layout) * prompts * itemsize
    most = min(max(CALL_BYTES[backend] // 2 // read, 1), MOST_EMBEDDINGS_AT_ONCE)
    return 1 << (most.bit_length() - 1)


class GraphSize(NamedTuple):
    """About how many numbers the rows of a prompt hold; and the nodes of its graph, and the edges among them."""

    rows: float
    nodes: int
    edges: float

    def count_bytes(self, itemsize: int) -> float:
        """Of the graph's edges."""
        return self.edges * (itemsize + 4) if is_large(self.nodes, itemsize) else self.nodes**2 * itemsize


def estimate_sizes(
    counts: Int[np.ndarray, "C T"],
    covered: tuple[int, ...],
    layers: int,
    embeddings: int,
    limit: int,
    outputs: int,
    vectors: int = 0,
) -> GraphSize:
    """The size of a prompt's graph; `embeddings` is 1, or 2 with position nodes, and `vectors` counts heads and
    residual streams, of which about half lie below a target."""
    length, total = counts.shape[1], int(counts.sum())
    limit = min(limit, total)
    below = np.cumsum(np.cumsum(counts, axis=0) - counts, axis=1)
    features = float((counts * below).sum()) / max(total, 1)
    others = np.outer(covered, np.arange(1, length + 1)) + embeddings * np.arange(1, length + 1)
    mean = float((counts * others).sum()) / max(total, 1) + vectors / 2
    always = (layers + embeddings) * length + vectors
    targets = limit + vectors
    return GraphSize(
        rows=targets * (features + mean) + outputs * (total + always),
        nodes=limit + always + outputs,
        edges=targets * (features * limit / max(total, 1) + mean) + outputs * (limit + always),
    )


class DeviceBytes(NamedTuple):
    """What a batch of prompts takes on one device."""

    sources: int
    target: int  # for each target that is traced in one call


def check_rows(
    model: Model,
    config: CoderConfig,
    counts: Int[np.ndarray, "B C T"],
    outputs: list[Outputs],
    options: Options,
    itemsize: int,
    on_device: DeviceBytes,
    vectors: int = 0,
) -> None:
    """An error of one line if the rows of the prompts' graphs do not fit in the host's memory, or sources and targets
    do not fit on the device. It says how many features would fit. `vectors` counts heads and residual streams."""
    backend = jax.default_backend()
    on_cpu = backend == "cpu"
    embeddings = 1 + (model.config.learned_positions and options.conventions == "jclt")
    most_active = int(counts.sum(axis=(1, 2)).max())
    most_others = max(len(prompt_outputs.tokens) for prompt_outputs in outputs) + vectors
    columns = most_active * counts.shape[2] * model.config.width * itemsize

    def estimate_device(limit: int) -> int:
        calls = min((CALLS_IN_FLIGHT + 1) * CALL_BYTES[backend], (limit + most_others) * on_device.target)
        return on_device.sources + calls + min(COLUMN_BYTES[backend], columns)

    def estimate_host(limit: int) -> float:
        sizes = [
            estimate_sizes(
                prompt_counts,
                config.covered,
                model.config.layers,
                embeddings,
                limit,
                len(prompt_outputs.tokens),
                vectors,
            )
            for prompt_counts, prompt_outputs in zip(counts, outputs, strict=True)
        ]
        rows, graph = sum(size.rows for size in sizes) * itemsize, max(size.count_bytes(itemsize) for size in sizes)
        return rows + graph + (estimate_device(limit) if on_cpu else 0)

    limit, free = min(options.max_features, most_active), measure_free_host_memory()
    if not on_cpu:
        check_memory(estimate_device(limit), f"prompt: its {most_active} active features", SHORTER)
    if free is not None and estimate_host(limit) > free * (1 - SPARE_SHARE):
        low, high = 0, limit
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if estimate_host(middle) <= free * (1 - SPARE_SHARE) else (low, middle)
        remedy = f"max_features={low} would fit" if low else SHORTER if not vectors else f"fewer heads, or {SHORTER}"
        what = f"prompt: a graph of {limit} of its {most_active} active features"
        check_memory(estimate_host(limit), what, remedy, host=True)
