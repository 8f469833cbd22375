"""The sums of `row_sums.py` as kernels for a TPU's TensorCore.

Each row of a table that some pair names is copied from HBM by a separate copy; many copies are in flight at once. The
pairs of a list are a stream, sorted by group, and the grid visits the groups in order: the rows of the next groups are
on their way before their turn. The numbers that belong to pairs come to scalar memory in chunks.

Sizes of rows and groups are counted in vectors of LANES numbers.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jclt.kernels.row_lists import LANES, GroupedRows
from jclt.shapes import Array, Float, Int

SUBLANES = 8
TILE = 8
"""Groups of one grid step."""
CHUNK = 256
"""Pairs whose numbers come to scalar memory at once."""
CHUNKS_HELD = 4
"""Chunks in scalar memory: one is in use, row copies are started from it or from the next, and one more arrives."""
BYTES_IN_FLIGHT = 2**21
"""Bytes of row copies in flight, for all lists together: somewhat more than bandwidth times latency of HBM."""
FEWEST_ROWS, MOST_ROWS = 2, 64
"""Row copies in flight, for each list."""
MARGIN = 2**22
"""Bytes of vector memory beside what a kernel asks for."""


class Kernel(NamedTuple):
    """A Pallas kernel over tiles of groups."""

    name: str
    body: Callable[..., None]
    out_specs: Any
    out_shape: Any
    scratch: Any
    bytes_per_group: int  # read or written once for each group


def sum_rows(lists: Sequence[GroupedRows], values: Sequence[Float[Array, "_"]], length: int) -> Float[Array, "G R D"]:
    """`row_sums.sum_rows`, all lists at once."""
    shape = (lists[0].starts.shape[0] - 1, length, lists[0].table.shape[2])
    groups, group_size = shape[0], length * shape[2] // LANES
    arrays = [
        (split_into_chunks(rows.row), split_into_chunks(value.astype(jnp.float32)), view_as_vectors(rows.table))
        for rows, value in zip(lists, values, strict=True)
    ]
    streams = [RowStream.plan(rows, arrays[i], group_size, len(lists)) for i, rows in enumerate(lists)]

    def body(ends: Any, starts: Any, refs: Any, out: Any, scratch: Any) -> None:
        out[...] = jnp.zeros(out.shape, out.dtype)
        for i, planned in enumerate(streams):
            stream = planned.bind(i, ends, starts, refs[i], scratch[i])

            def add(group: Array, pair: Array, row: Array, stream: RowStream = stream) -> None:
                out[group, stream.offset : stream.offset + stream.used] += stream.read_number(1, pair) * row

            stream.for_each_row(add)

    kernel = Kernel(
        name="row_sums",
        body=body,
        out_specs=tile_spec(group_size),
        out_shape=jax.ShapeDtypeStruct((groups, group_size, LANES), jnp.float32),
        scratch=[stream.scratch for stream in streams],
        bytes_per_group=4 * group_size * LANES,
    )
    return run_kernel(kernel, lists, streams, arrays).reshape(shape)


def dot_rows(lists: Sequence[GroupedRows], group_values: Float[Array, "G R D"]) -> tuple[Float[Array, "_"], ...]:
    """`row_sums.dot_rows`, all lists at once."""
    group_values = view_as_vectors(group_values)
    group_size = group_values.shape[1]
    arrays = [(split_into_chunks(rows.row), view_as_vectors(rows.table)) for rows in lists]
    streams = [RowStream.plan(rows, arrays[i], group_size, len(lists)) for i, rows in enumerate(lists)]

    def body(ends: Any, starts: Any, group_values: Any, refs: Any, *outs_and_scratch: Any) -> None:
        *outs, scratch = outs_and_scratch
        for i, planned in enumerate(streams):
            *memory, stream_scratch = scratch[i]
            stream = planned.bind(i, ends, starts, refs[i], stream_scratch)

            def multiply(
                group: Array, pair: Array, row: Array, stream: RowStream = stream, out=outs[i], memory=memory
            ) -> None:
                lane_sums, dots, sent = memory
                used = group_values[group, stream.offset : stream.offset + stream.used]
                place = jax.lax.rem(pair, CHUNK)
                lane_sums[pl.ds(place, 1), :] = jnp.sum(used.astype(jnp.float32) * row, axis=0, keepdims=True)

                @pl.when((place == CHUNK - 1) | (pair == stream.end - 1))
                def _() -> None:
                    # A product with ones adds up the lanes, and moves the pairs from sublanes to lanes.
                    dots[...] = jax.lax.dot_general(
                        jnp.ones((SUBLANES, LANES), jnp.float32),
                        lane_sums[...],
                        (((1,), (1,)), ((), ())),
                        precision=jax.lax.Precision.HIGHEST,
                    )
                    copy = pltpu.make_async_copy(dots, out.at[jax.lax.div(pair, CHUNK)], sent)
                    copy.start()
                    copy.wait()

            stream.for_each_row(multiply)

    kernel = Kernel(
        name="row_products",
        body=body,
        out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(lists),
        out_shape=[jax.ShapeDtypeStruct((row.shape[0], SUBLANES, CHUNK), jnp.float32) for row, _ in arrays],
        scratch=[
            (
                pltpu.VMEM((CHUNK, LANES), jnp.float32),
                pltpu.VMEM((SUBLANES, CHUNK), jnp.float32),
                pltpu.SemaphoreType.DMA,
                stream.scratch,
            )
            for stream in streams
        ],
        bytes_per_group=group_values.dtype.itemsize * group_size * LANES,
    )
    chunks = run_kernel(kernel, lists, streams, arrays, group_values)
    dots = [x[:, 0].reshape(-1)[: rows.row.shape[0]] for rows, x in zip(lists, chunks, strict=True)]
    is_filled = [jnp.arange(rows.row.shape[0]) < rows.starts[-1] for rows in lists]
    return tuple(jnp.where(filled, dot, 0.0) for filled, dot in zip(is_filled, dots, strict=True))


def run_kernel(
    kernel: Kernel, lists: Sequence[GroupedRows], streams: Sequence["RowStream"], arrays: Any, *group_values: Array
) -> Any:
    """Runs a kernel over all tiles of groups."""
    starts = starts_by_tile([rows.starts for rows in lists])
    return pl.pallas_call(
        kernel.body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(starts.shape[0],),
            in_specs=[
                pl.BlockSpec((1, *starts.shape[1:]), lambda i, _: (i, 0, 0), memory_space=pltpu.SMEM),
                *(tile_spec(values.shape[1]) for values in group_values),
                jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), arrays),
            ],
            out_specs=kernel.out_specs,
            scratch_shapes=[kernel.scratch],
        ),
        out_shape=kernel.out_shape,
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=MARGIN + 2 * TILE * kernel.bytes_per_group + sum(stream.bytes for stream in streams)
        ),
        cost_estimate=estimate_cost(arrays, streams, starts.shape[0] * TILE * kernel.bytes_per_group),
        name=kernel.name,
    )(jnp.stack([rows.starts[-1] for rows in lists]), starts, *group_values, arrays)


def tile_spec(group_size: int) -> pl.BlockSpec:
    return pl.BlockSpec((TILE, group_size, LANES), lambda i, _: (i, 0, 0))


class RowStream(NamedTuple):
    """The rows that the pairs of a list name, one after the other: planned outside a kernel, bound to it inside."""

    used: int  # vectors of a row that are used
    offset: int  # where these begin in a group's values
    begin: int  # the first vector of a row that is fetched; rows are fetched in whole tiles of HBM
    skipped: int  # vectors that are fetched before those that are used
    scratch: Any
    number_of_list: int = 0
    end: Any = None  # the number of pairs
    starts: Any = None  # the first pair of each group of this tile
    numbers: Any = None  # in HBM, for each pair: first the row that it names
    table: Any = None  # in HBM

    @staticmethod
    def plan(rows: GroupedRows, arrays: Sequence[Array], group_size: int, lists: int) -> "RowStream":
        *numbers, table = arrays
        row_size, shift = table.shape[1], rows.offset * rows.table.shape[2] // LANES
        used = min(group_size, row_size)
        # The shorter of row and group begins at `shift` of the longer one.
        offset, first_used = (0, shift) if row_size > group_size else (shift if row_size < group_size else 0, 0)
        begin = first_used // SUBLANES * SUBLANES
        fetched = min(row_size, -(-(first_used + used) // SUBLANES) * SUBLANES) - begin
        row_bytes = fetched * LANES * table.dtype.itemsize
        depth = min(MOST_ROWS, max(FEWEST_ROWS, BYTES_IN_FLIGHT // (lists * row_bytes)))
        scratch = (
            tuple(pltpu.SMEM((CHUNKS_HELD, 1, CHUNK), array.dtype) for array in numbers),
            pltpu.SemaphoreType.DMA((len(numbers),)),
            pltpu.VMEM((depth, fetched, LANES), table.dtype),
            pltpu.SemaphoreType.DMA((depth,)),
        )
        return RowStream(used=used, offset=offset, begin=begin, skipped=first_used - begin, scratch=scratch)

    @property
    def bytes(self) -> int:
        """Bytes of vector memory, including those for inner products."""
        ring = self.scratch[2]
        return math.prod(ring.shape) * ring.dtype.itemsize + CHUNK * (LANES + SUBLANES) * 4

    def bind(self, i: int, ends: Any, starts: Any, refs: Any, scratch: Any) -> "RowStream":
        """The stream of the i-th list within a kernel, with the kernel's references."""
        *numbers, table = refs
        return self._replace(
            number_of_list=i, end=ends[i], starts=starts, numbers=tuple(numbers), table=table, scratch=scratch
        )

    def read_number(self, which: int, pair: Array | int) -> Array:
        chunk, place = jax.lax.rem(jax.lax.div(pair, CHUNK), CHUNKS_HELD), jax.lax.rem(pair, CHUNK)
        return self.scratch[0][which][chunk, 0, place]

    def chunk_copies(self, i: Array | int) -> list[Any]:
        """The copies that fetch the i-th chunk of the pairs' numbers."""
        held, arrived = self.scratch[:2]
        slot = jax.lax.rem(i, CHUNKS_HELD)
        return [
            pltpu.make_async_copy(source.at[i], target.at[slot], arrived.at[which])
            for which, (source, target) in enumerate(zip(self.numbers, held, strict=True))
        ]

    def row_copy(self, pair: Array | int) -> Any:
        """The copy that fetches the row of a pair."""
        ring, arrived = self.scratch[2:]
        slot = jax.lax.rem(pair, ring.shape[0])
        row = self.table.at[self.read_number(0, pair), pl.ds(self.begin, ring.shape[1])]
        return pltpu.make_async_copy(row, ring.at[slot], arrived.at[slot])

    def start_row_copy(self, pair: Array | int) -> None:
        """Starts the copy of a pair's row, if there is such a pair."""

        @pl.when(pair < self.end)
        def _() -> None:
            @pl.when(jax.lax.rem(pair, CHUNK) == 0)
            def _() -> None:
                i = jax.lax.div(pair, CHUNK)
                for copy in self.chunk_copies(i):
                    copy.wait()

                @pl.when((i + 1) * CHUNK < self.end)
                def _() -> None:
                    for copy in self.chunk_copies(i + 1):
                        copy.start()

            self.row_copy(pair).start()

    def for_each_row(self, use: Callable[[Array, Array, Array], None]) -> None:
        """Calls `use(group, pair, row)` for each pair of this grid step's groups, which are counted within the tile."""
        ring = self.scratch[2]
        depth = ring.shape[0]

        @pl.when((pl.program_id(0) == 0) & (self.end > 0))
        def _() -> None:
            for copy in self.chunk_copies(0):
                copy.start()
            jax.lax.fori_loop(0, depth, lambda pair, _: self.start_row_copy(pair), None)

        def visit_group(group: Array, _: None) -> None:
            def visit_pair(pair: Array, _: None) -> None:
                self.row_copy(pair).wait()
                row = ring[jax.lax.rem(pair, depth), self.skipped : self.skipped + self.used]
                use(group, pair, row.astype(jnp.float32))
                self.start_row_copy(pair + depth)

            place = self.number_of_list * (TILE + 1) + group
            jax.lax.fori_loop(self.starts[0, 0, place], self.starts[0, 0, place + 1], visit_pair, None)

        jax.lax.fori_loop(0, TILE, visit_group, None)


def starts_by_tile(starts: list[Int[Array, "_"]]) -> Int[Array, "_ 1 _"]:
    """For each tile of groups the starts of its groups and the end of the last, list by list."""
    tiles = -(-(starts[0].shape[0] - 1) // TILE)
    padded = [jnp.pad(of_list, (0, tiles * TILE + 1 - of_list.shape[0]), mode="edge") for of_list in starts]
    by_tile = [jnp.concatenate([x[:-1].reshape(tiles, TILE), x[TILE::TILE, None]], axis=1) for x in padded]
    all_lists = jnp.concatenate(by_tile, axis=1)
    return jnp.pad(all_lists, ((0, 0), (0, -all_lists.shape[1] % LANES)))[:, None]


def estimate_cost(arrays: Any, streams: Sequence[RowStream], other_bytes: int) -> pl.CostEstimate:
    """The cost of reading a row for every slot of the lists, and `other_bytes` beside."""
    slots = [of_list[0].size for of_list in arrays]
    row_bytes = [math.prod(stream.scratch[2].shape[1:]) * stream.scratch[2].dtype.itemsize for stream in streams]
    bytes_read = sum(count * (size + 8) for count, size in zip(slots, row_bytes, strict=True))
    flops = sum(2 * count * stream.used * LANES for count, stream in zip(slots, streams, strict=True))
    return pl.CostEstimate(flops=flops, bytes_accessed=bytes_read + other_bytes, transcendentals=0)


def split_into_chunks(x: Array) -> Array:
    return jnp.pad(x, (0, -x.shape[0] % CHUNK)).reshape(-1, 1, CHUNK)


def view_as_vectors(table: Float[Array, "I *D"]) -> Float[Array, "I _ _"]:
    """Each row's numbers side by side in HBM, as vectors of LANES numbers."""
    return table.reshape(table.shape[0], -1, LANES)
