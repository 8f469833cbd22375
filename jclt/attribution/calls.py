"""Calls of the programs that compute edges, for prompts whose sources are gathered: the host arranges sources and
targets in blocks, the device computes them.

A call computes several blocks, for all prompts of a batch at once; while the device works on the next calls, the host
stores the rows of the one before.
"""

import logging
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jclt.attribution.local import LocalModel, Weights
from jclt.attribution.options import Options
from jclt.attribution.ranking import PromptRows
from jclt.attribution.sizes import (
    CALLS_IN_FLIGHT,
    choose_block_size,
    choose_blocks_per_call,
    count_edges,
    count_vector_edges,
    round_up,
)
from jclt.attribution.sweep.blocks import Block, split_targets
from jclt.attribution.sweep.columns import Columns, LowTargets, SourceBlocks, push_sources
from jclt.attribution.sweep.cuts import COLUMN_BYTES, Work, choose_cut
from jclt.attribution.sweep.edges import Blocks, Edges, trace_blocks
from jclt.attribution.sweep.folding import FoldedWeights
from jclt.attribution.sweep.nodes import PromptNodes, count_prompt_shards
from jclt.attribution.sweep.tiles import NO_LAYER, TARGET_TILE, Layout, place_targets
from jclt.attribution.targets import Unembedding
from jclt.coders import Coder
from jclt.models import Model
from jclt.shapes import Array, Float, Int

log = logging.getLogger(__name__)


class Setup(NamedTuple):
    """What all prompts of one call of `attribute_each` share, on the devices of the mesh."""

    model: Model
    local: LocalModel
    weights: Weights
    folded: FoldedWeights
    biases: Float[Array, "L D"]
    coder: Coder
    unembedding: Unembedding
    mesh: Mesh
    options: Options

    @property
    def by_prompt(self) -> NamedSharding:
        return NamedSharding(self.mesh, P("prompts") if "prompts" in self.mesh.shape else P())

    @property
    def by_block(self) -> NamedSharding:
        return NamedSharding(self.mesh, P(self.mesh.axis_names))

    @property
    def shards(self) -> int:
        """The number of devices that prompts are split over."""
        return count_prompt_shards(self.mesh)

    @property
    def is_split(self) -> bool:
        """Whether the model is split over the mesh. Then all devices have all prompts and share out the targets."""
        return self.shards < self.mesh.size

    @property
    def uses_our_conventions(self) -> bool:
        return self.options.conventions == "jclt"

    @property
    def itemsize(self) -> int:
        return self.unembedding.table.dtype.itemsize


class Batch(NamedTuple):
    """Prompts whose sources are gathered: the arrays on the devices, and the rows on the host."""

    setup: Setup
    layout: Layout
    nodes: PromptNodes
    rows: list[PromptRows]
    per_device: int  # prompts, with those that only fill the batch up
    start: int  # the first position with sources
    stops: tuple[int, ...]  # numbers of positions from there on that blocks are computed for
    columns: Columns | None = None

    @property
    def prompts(self) -> int:
        return self.per_device * self.setup.shards

    def find_top(self, block: Block) -> int:
        """The highest layer in which one of its targets reads."""
        return int(self.rows[block.prompt].target_layers[block.targets].max())

    @property
    def target_bytes(self) -> int:
        """Of the edges into one target."""
        met = 0 if self.columns is None else self.columns.streams.shape[1] * self.columns.streams.shape[3]
        config, length, vectors = self.setup.model.config, self.stops[-1], self.nodes.vectors
        if vectors is not None:
            met += count_vector_edges(config, length, vectors.head_lists.shape[2], vectors.streams is not None)
        return (count_edges(config, length, self.layout) + met) * self.setup.itemsize


def push_columns(batch: Batch) -> Batch:
    """The batch, with the columns of its sources where a cut saves operations. The devices of a split model would each
    carry up all sources, so there targets go down all the way; as they do where heads or residual streams are nodes."""
    setup = batch.setup
    goes_down = setup.is_split or batch.nodes.vectors is not None
    arranged = None if goes_down else arrange_columns(batch, jax.default_backend())
    if arranged is None:
        return batch
    count = np.count_nonzero(arranged[0].layers != NO_LAYER)
    log.debug("3 carry %d sources up to layer %d", count, max(rows.cut for rows in batch.rows))
    program = (setup.local, batch.layout, batch.start, batch.stops, setup.mesh)
    arrays = jax.device_put(arranged, setup.by_prompt)
    columns, low_edges = push_sources(*program, setup.folded, batch.nodes, *arrays)
    for rows, of_prompt in zip(batch.rows, np.asarray(low_edges), strict=False):
        rows.low_edges = of_prompt
    return batch._replace(columns=columns)


def arrange_columns(batch: Batch, backend: str) -> tuple[SourceBlocks, LowTargets] | None:
    """Chooses the cut of each prompt, and arranges the sources and targets below it; None where no prompt has one."""
    model, length = batch.setup.model.config, batch.stops[-1]
    most_numbers = COLUMN_BYTES[backend] // (batch.per_device * batch.setup.itemsize)
    for rows in batch.rows:
        work = Work(
            features=rows.count_features(batch.start, length),
            traced=rows.estimate_traced(),
            outputs=len(rows.outputs.tokens),
            writes_on=batch.layout.groups == 1,
        )
        rows.cut = choose_cut(model, work, most_numbers)
    if not any(rows.cut for rows in batch.rows):
        return None
    numbers = [rows.list_sources(rows.cut, batch.start) for rows in batch.rows]
    size = choose_block_size(backend, max(map(len, numbers)), length, model.width)
    return arrange_sources(batch, size, numbers), arrange_low_targets(batch)


def arrange_sources(batch: Batch, size: int, numbers: list[Int[np.ndarray, "_"]]) -> SourceBlocks:
    """The sources below the cut of each prompt, given by number, in blocks. They go up as targets go down, so positions
    are counted from the last one to arrange them."""
    layout, length, located = batch.layout, batch.stops[-1], []
    blocks: list[list[Block]] = []
    for prompt, (rows, sources) in enumerate(zip(batch.rows, numbers, strict=True)):
        layers, positions = rows.locate_sources(sources)
        positions = positions - batch.start
        located.append((layers, positions))
        order = np.maximum(rows.cut - 2 - layers, 0), length - 1 - positions
        blocks.append(split_targets(prompt, np.arange(len(sources)), *order, batch.stops, size))
    sizes = batch.prompts, round_up(max(map(len, blocks))), size
    layers, positions, row_numbers = np.full(sizes, NO_LAYER), np.zeros(sizes, int), np.zeros(sizes, int)
    used, cuts = np.zeros((2, batch.prompts), int)
    are_errors, stop_indices = np.zeros(sizes, bool), np.zeros(sizes[:2], int)
    for prompt, (rows, sources) in enumerate(zip(batch.rows, numbers, strict=True)):
        used[prompt], cuts[prompt], count = len(blocks[prompt]), rows.cut, len(rows.features)
        tiles, slots = rows.slots
        in_group = np.zeros(rows.source_count, int)  # 0 for errors
        in_group[:count] = tiles % layout.tiles * layout.tile_size + slots
        for number, block in enumerate(blocks[prompt]):
            place, chosen = (prompt, number, slice(0, len(block.targets))), sources[block.targets]
            layers[place], positions[place] = (x[block.targets] for x in located[prompt])
            are_errors[place] = chosen >= count
            row_numbers[place] = in_group[chosen]
            stop_indices[prompt, number] = block.stop_index
            rows.column_places[:, chosen] = np.full(len(chosen), number), np.arange(len(chosen))
    return SourceBlocks(used, cuts, layers, positions, row_numbers, are_errors, stop_indices)  # type: ignore[arg-type]


def arrange_low_targets(batch: Batch) -> LowTargets:
    """The targets below the cut of each prompt in tiles."""
    low_targets = [np.flatnonzero(rows.features[:, 0] < rows.cut) for rows in batch.rows]
    for rows, low in zip(batch.rows, low_targets, strict=True):
        rows.low_places[:, low] = place_targets(rows.target_layers[low], rows.target_positions[low])
    most = round_up(1 + max(int(rows.low_places[0].max()) for rows in batch.rows))
    sizes = batch.prompts, max(rows.cut for rows in batch.rows), most
    numbers = np.full((*sizes, TARGET_TILE), batch.nodes.targets.layers.shape[1] - 1)  # its vector is 0
    positions = np.full(sizes, -1)
    for prompt, (rows, low) in enumerate(zip(batch.rows, low_targets, strict=True)):
        tiles, slots = rows.low_places[:, low]
        numbers[prompt, rows.target_layers[low], tiles, slots] = rows.padded_numbers[low]
        positions[prompt, rows.target_layers[low], tiles] = rows.target_positions[low] - batch.start
    return LowTargets(numbers, positions)  # type: ignore[arg-type]


def trace_rows(batch: Batch, wanted: list[Int[np.ndarray, "_"]]) -> None:
    """Computes the edges into each prompt's targets, given by number, and stores them as its rows."""
    in_flight: deque[tuple[list[Block | None], Edges]] = deque()

    def store_oldest() -> None:
        blocks, edges = in_flight.popleft()
        edges = jax.tree.map(np.asarray, edges)
        for number, block in enumerate(blocks):
            if block is not None:
                of_block = jax.tree.map(lambda x, number=number: x[number], edges)
                length = batch.stops[block.stop_index]
                batch.rows[block.prompt].add_block(block.targets, of_block, batch.start, length)

    # Targets in the first layer only read embeddings, unless heads are nodes; those below the cut have their edges.
    # Neither need a block.
    for rows, numbers in zip(batch.rows, wanted, strict=True):
        layers = rows.target_layers[numbers]
        rows.add_first_layer(numbers[layers < min(rows.lowest, 1)])
        rows.add_low_targets(numbers[(layers > 0) & (layers < rows.cut)])
    for call in launch_calls(batch, *arrange_targets(batch, wanted, jax.default_backend())):
        in_flight.append(call)
        if len(in_flight) > CALLS_IN_FLIGHT:
            store_oldest()
    while in_flight:
        store_oldest()


def arrange_targets(batch: Batch, wanted: list[Int[np.ndarray, "_"]], backend: str) -> tuple[int, list[list[Block]]]:
    """The targets of each prompt from its cut on in blocks: their size, and the blocks of each device. They are those
    of its prompts, or of a split model its share of all blocks."""
    above = [
        numbers[rows.target_layers[numbers] >= rows.lowest] for rows, numbers in zip(batch.rows, wanted, strict=True)
    ]
    setup, counts = batch.setup, list(map(len, above))
    most = -(-sum(counts) // setup.mesh.size) if setup.is_split else max(counts)
    size = choose_block_size(backend, max(1, most), batch.stops[-1], setup.model.config.width)
    by_device: list[list[Block]] = [[] for _ in range(setup.shards)]
    for prompt, (rows, numbers) in enumerate(zip(batch.rows, above, strict=True)):
        positions = rows.target_positions[numbers] - batch.start
        steps = rows.target_layers[numbers] - rows.lowest
        blocks = split_targets(prompt, numbers, steps, positions, batch.stops, size)
        by_device[prompt // batch.per_device] += blocks
    if setup.is_split:
        blocks = sorted(by_device[0], key=batch.find_top, reverse=True)
        by_device = [blocks[device :: setup.mesh.size] for device in range(setup.mesh.size)]
    return size, by_device


def launch_calls(batch: Batch, size: int, by_device: list[list[Block]]) -> Iterator[tuple[list[Block | None], Edges]]:
    """Starts one call of the program after another; yields the blocks of each call, None for padding, and their
    edges."""
    setup, layout, longest = batch.setup, batch.layout, max(map(len, by_device))
    if not longest:
        return
    most = choose_blocks_per_call(jax.default_backend(), longest, batch.target_bytes, size)
    padding = batch.nodes.targets.layers.shape[1] - 1  # its vector is 0
    for first in range(0, longest, most):
        in_call = [of_device[first : first + most] for of_device in by_device]
        numbers = np.full((len(in_call), most, size), padding)
        prompts, tops, stop_indices = np.zeros((3, len(in_call), most), int)
        for device, of_device in enumerate(in_call):
            for place, block in enumerate(of_device):
                rows = batch.rows[block.prompt]
                numbers[device, place, : len(block.targets)] = rows.padded_numbers[block.targets]
                prompts[device, place] = block.prompt % batch.per_device
                tops[device, place] = batch.find_top(block)
                stop_indices[device, place] = block.stop_index
        used = np.array([len(of_device) for of_device in in_call])
        if setup.is_split:  # each step gathers a layer, so all devices take the same ones
            used[:], tops[:] = used.max(), tops.max(axis=0)
        arrays = prompts.ravel(), numbers.reshape(-1, size), tops.ravel(), stop_indices.ravel()
        blocks = Blocks(*jax.device_put((used, *arrays), setup.by_block))
        program = (setup.local, layout, batch.start, batch.stops, setup.mesh)
        edges = trace_blocks(*program, setup.folded, batch.nodes, batch.columns, blocks)
        yield [block for of_device in in_call for block in [*of_device, *[None] * (most - len(of_device))]], edges
