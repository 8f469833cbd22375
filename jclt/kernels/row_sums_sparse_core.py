"""The sums of `row_sums.py` as kernels for the SparseCores of a TPU, which gather rows beside the TensorCore's work.

Each subcore takes a share of the groups (`sum_rows`) or of the pairs (`dot_rows`). Rows are cut into pieces that fit
into a subcore's memory, and gathered for a window of a few pairs at once: one window arrives while another is in use.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc

from jclt.kernels.row_lists import LANES, GroupedRows, slots_and_groups
from jclt.shapes import Array, Float, Int

LONGEST_PIECE = 8
"""Longest piece of a row, in units of LANES numbers."""
WINDOW = 8
"""Pairs whose rows are gathered at once."""
CHUNK = 1024
"""Pairs, and groups, whose numbers are copied at once."""
UNROLL = 8


def has_sparse_cores() -> bool:
    """Whether the chip that the program is compiled for has SparseCores."""
    return pltpu.get_tpu_info().sparse_core is not None


class Cores(NamedTuple):
    """The SparseCores of the chip that the program is compiled for."""

    mesh: Any
    lanes: int  # numbers that a subcore computes with at once

    @staticmethod
    def of_chip() -> "Cores":
        lanes = tpu_sc.get_sparse_core_info().num_lanes
        return Cores(tpu_sc.VectorSubcoreMesh(core_axis_name="core", subcore_axis_name="subcore"), lanes)

    def subcore_number(self) -> Array:
        """Within a kernel, the number of the subcore that runs it."""
        return jax.lax.axis_index("core") * self.mesh.num_subcores + jax.lax.axis_index("subcore")

    def read_number(self, ref: Any, i: Array | int) -> Array:
        return ref[pl.ds(i, self.lanes)][0]

    def loop_over_vectors(self, size: int) -> Any:
        """A loop over `size` numbers, a vector of `lanes` at a time, in any order."""
        return tpu_sc.parallel_loop(0, size, self.lanes, unroll=UNROLL)


class Windows(NamedTuple):
    """The rows that the pairs from `begin` to `end` name, window by window, of one table or of several at once.

    Tuples have one element for each table.
    """

    cores: Cores
    row_numbers: tuple[Any, ...]  # in HBM: the row that each pair names
    piece_numbers: tuple[Any, ...]  # in the subcore's memory: the piece that each pair of a chunk needs
    pieces_per_row: tuple[int, ...]
    pieces: tuple[Any, ...]  # the piece of each row that is needed
    tables: tuple[Any, ...]
    rings: tuple[Any, ...]  # of two windows
    arrived: Any
    begin: Array
    end: Array

    def copies(self, window: Array) -> list[Any]:
        """The copies that gather a window's pieces."""
        pairs = pl.ds(jax.lax.rem(window, CHUNK // WINDOW) * WINDOW, WINDOW)
        slot = jax.lax.rem(window, 2)
        return [
            gather_copy(table, numbers.at[pairs], ring.at[slot], self.arrived.at[slot, i])
            for i, (table, numbers, ring) in enumerate(zip(self.tables, self.piece_numbers, self.rings, strict=True))
        ]

    def fetch_window_of(self, pair: Array) -> None:
        """Waits for the window of a pair, and starts to gather the next one."""
        window = pair // WINDOW

        @pl.when((pair == self.begin) | (jax.lax.rem(pair, WINDOW) == 0))
        def _() -> None:
            @pl.when((pair == self.begin) | (jax.lax.rem(pair, CHUNK) == 0))
            def _() -> None:
                by_table = zip(self.row_numbers, self.piece_numbers, self.pieces_per_row, self.pieces, strict=True)
                for row_numbers, piece_numbers, per_row, piece in by_table:
                    pltpu.sync_copy(row_numbers.at[pl.ds(pair // CHUNK * CHUNK, CHUNK)], piece_numbers)

                    @self.cores.loop_over_vectors(CHUNK)
                    def _(i: Array, numbers: Any = piece_numbers, per_row: int = per_row, piece: Any = piece) -> None:
                        part = pl.ds(i, self.cores.lanes)
                        numbers[part] = numbers[part] * per_row + piece

                for copy in self.copies(window):
                    copy.start()

            @pl.when((jax.lax.rem(window + 1, CHUNK // WINDOW) > 0) & ((window + 1) * WINDOW < self.end))
            def _() -> None:
                for copy in self.copies(window + 1):
                    copy.start()

            for copy in self.copies(window):
                copy.wait()


def gather_copy(table: Any, numbers: Any, target: Any, arrived: Any) -> Any:
    """The copy that gathers the rows of a table with these numbers."""
    return pltpu.make_async_copy(table.at[numbers], target, arrived)


def sum_rows(lists: Sequence[GroupedRows], values: Sequence[Float[Array, "_"]], length: int) -> Float[Array, "G R D"]:
    """`row_sums.sum_rows` of one list, whose rows are as long as a group's values or longer."""
    (rows,), (weights,) = lists, values
    cores, groups = Cores.of_chip(), rows.starts.shape[0] - 1
    table, width, pieces_per_row = split_into_pieces(rows.table)
    pieces = length * rows.table.shape[2] // width
    skipped = rows.offset * rows.table.shape[2] // width if pieces_per_row > pieces else 0
    bounds = pack_by_worker(cores, share_groups(rows.starts, cores.mesh.size))
    starts = jnp.pad(rows.starts, (0, CHUNK + LANES), mode="edge")

    def kernel(
        bounds: Any, starts: Any, row_numbers: Any, values: Any, table: Any, out: Any, local_bounds: Any, *memory: Any
    ) -> None:
        chunk_starts, piece_numbers, chunk_values, ring, sums, arrived, sent = memory
        pltpu.sync_copy(bounds.at[cores.subcore_number()], local_bounds)
        first, last, begin, end = (cores.read_number(local_bounds, i * cores.lanes) for i in range(4))

        @pl.loop(0, pieces)
        def _(piece: Array) -> None:
            windows = Windows(
                cores=cores,
                row_numbers=(row_numbers,),
                piece_numbers=(piece_numbers,),
                pieces_per_row=(pieces_per_row,),
                pieces=(skipped + piece,),
                tables=(table,),
                rings=(ring,),
                arrived=arrived,
                begin=begin,
                end=end,
            )

            @pl.loop(first // CHUNK, pl.cdiv(last, CHUNK))
            def _(chunk: Array) -> None:
                chunk_begin = chunk * CHUNK
                pltpu.sync_copy(starts.at[pl.ds(chunk_begin, CHUNK + LANES)], chunk_starts)

                @pl.loop(jnp.maximum(first, chunk_begin), jnp.minimum(last, chunk_begin + CHUNK))
                def _(group: Array) -> None:
                    done = piece * (last - first) + group - first
                    slot = jax.lax.rem(done, 2)

                    def copy_out(place: Array | int) -> Any:
                        return pltpu.make_async_copy(sums.at[slot], out.at[place], sent.at[slot])

                    @pl.when(done >= 2)
                    def _() -> None:
                        copy_out(0).wait()

                    @cores.loop_over_vectors(width)
                    def _(c: Array) -> None:
                        sums[slot, pl.ds(c, cores.lanes)] = jnp.zeros(cores.lanes, jnp.float32)

                    group_of_chunk = group - chunk_begin
                    group_begin, group_end = (cores.read_number(chunk_starts, group_of_chunk + i) for i in range(2))

                    @pl.loop(group_begin, group_end)
                    def _(pair: Array) -> None:
                        @pl.when((pair == begin) | (jax.lax.rem(pair, CHUNK) == 0))
                        def _() -> None:
                            source = values.at[pl.ds(pair // CHUNK * CHUNK, CHUNK)]
                            pltpu.sync_copy(source, chunk_values.at[pl.ds(0, CHUNK)])

                        windows.fetch_window_of(pair)
                        weight = cores.read_number(chunk_values, jax.lax.rem(pair, CHUNK))
                        row = (jax.lax.rem(pair // WINDOW, 2), jax.lax.rem(pair, WINDOW))

                        @cores.loop_over_vectors(width)
                        def _(c: Array) -> None:
                            part = pl.ds(c, cores.lanes)
                            sums[slot, part] = sums[slot, part] + weight * ring[*row, part]

                    copy_out(group * pieces + piece).start()

        for left in (1, 2):

            @pl.when(pieces * (last - first) >= left)
            def _(left: int = left) -> None:
                slot = jax.lax.rem(pieces * (last - first) - left, 2)
                pltpu.make_async_copy(sums.at[slot], out.at[0], sent.at[slot]).wait()

    run: Any = pl.kernel(
        kernel,
        jax.ShapeDtypeStruct((groups * pieces, width), jnp.float32),
        mesh=cores.mesh,
        scratch_types=[
            pltpu.VMEM((bounds.shape[1],), jnp.int32),
            pltpu.VMEM((CHUNK + LANES,), jnp.int32),
            pltpu.VMEM((CHUNK,), jnp.int32),
            pltpu.VMEM((CHUNK + LANES,), jnp.float32),
            pltpu.VMEM((2, WINDOW, width), jnp.float32),
            pltpu.VMEM((2, width), jnp.float32),
            pltpu.SemaphoreType.DMA((2, 1)),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        cost_estimate=estimate_cost(rows.row.shape[0], pieces * width, 4 * groups * pieces * width),
        name="row_sums",
    )
    sums = run(bounds, starts, pad_to_chunk(rows.row), pad_to_chunk(weights.astype(jnp.float32)), table)
    return sums.reshape(groups, length, -1)


def dot_rows(lists: Sequence[GroupedRows], group_values: Float[Array, "G R D"]) -> tuple[Float[Array, "_"], ...]:
    """`row_sums.dot_rows` of one list. The values of its group are gathered again for each pair."""
    (rows,) = lists
    cores, slots = Cores.of_chip(), rows.row.shape[0]
    table, width, pieces = split_into_pieces(rows.table)
    group_values, _, pieces_per_group = split_into_pieces(group_values)
    skipped = rows.offset * rows.table.shape[2] // width if pieces_per_group > pieces else 0
    slot, group = slots_and_groups(rows.starts, slots)
    numbers = pad_to_chunk(rows.row), pad_to_chunk(jnp.minimum(group, rows.starts.shape[0] - 2))
    bounds = pack_by_worker(cores, share_pairs(rows.starts[-1], cores.mesh.size))

    def kernel(
        bounds: Any, row: Any, group: Any, table: Any, group_values: Any, out: Any, local_bounds: Any, *memory: Any
    ) -> None:
        row_pieces, group_pieces, row_ring, group_ring, products, arrived = memory
        pltpu.sync_copy(bounds.at[cores.subcore_number()], local_bounds)
        begin, end = (cores.read_number(local_bounds, i * cores.lanes) for i in range(2))

        @pl.loop(0, pieces)
        def _(piece: Array) -> None:
            windows = Windows(
                cores=cores,
                row_numbers=(row, group),
                piece_numbers=(row_pieces, group_pieces),
                pieces_per_row=(pieces, pieces_per_group),
                pieces=(piece, skipped + piece),
                tables=(table, group_values),
                rings=(row_ring, group_ring),
                arrived=arrived,
                begin=begin,
                end=end,
            )

            @pl.loop(begin // WINDOW, pl.cdiv(end, WINDOW))
            def _(window: Array) -> None:
                windows.fetch_window_of(window * WINDOW)
                slot = jax.lax.rem(window, 2)
                for j in range(WINDOW):
                    products[j] = jnp.zeros(cores.lanes, jnp.float32)

                    @pl.loop(0, width, step=UNROLL * cores.lanes)
                    def _(c: Array, j: int = j) -> None:
                        parts = [pl.ds(c + i * cores.lanes, cores.lanes) for i in range(UNROLL)]
                        terms = (row_ring[slot, j, part] * group_ring[slot, j, part] for part in parts)
                        products[j] = sum(terms, products[j])

                pltpu.sync_copy(products, out.at[piece, pl.ds(window * WINDOW, WINDOW)])

    run: Any = pl.kernel(
        kernel,
        jax.ShapeDtypeStruct((pieces, numbers[0].shape[0], cores.lanes), jnp.float32),
        mesh=cores.mesh,
        scratch_types=[
            pltpu.VMEM((bounds.shape[1],), jnp.int32),
            pltpu.VMEM((CHUNK,), jnp.int32),
            pltpu.VMEM((CHUNK,), jnp.int32),
            pltpu.VMEM((2, WINDOW, width), jnp.float32),
            pltpu.VMEM((2, WINDOW, width), jnp.float32),
            pltpu.VMEM((WINDOW, cores.lanes), jnp.float32),
            pltpu.SemaphoreType.DMA((2, 2)),
        ],
        cost_estimate=estimate_cost(slots, 2 * pieces * width, 4 * slots * pieces * cores.lanes),
        name="row_products",
    )
    products = run(bounds, *numbers, table, group_values)
    return (jnp.where(slot < rows.starts[-1], jnp.sum(products, axis=(0, 2))[:slots], 0.0),)


def share_groups(starts: Int[Array, "_"], workers: int) -> tuple[Array, ...]:
    """For each worker its first group and the next worker's, and its first pair and the next worker's.

    All workers have about as many groups and pairs together.
    """
    groups = starts.shape[0] - 1
    work = starts + jnp.arange(groups + 1, dtype=jnp.int32)
    even_shares = jnp.arange(workers + 1, dtype=jnp.int32) * (work[-1] // workers)
    first = jnp.searchsorted(work, even_shares).astype(jnp.int32).at[-1].set(groups)
    return first[:-1], first[1:], starts[first[:-1]], starts[first[1:]]


def share_pairs(count: Array, workers: int) -> tuple[Array, ...]:
    """For each worker its first pair and the next worker's, in whole windows."""
    windows = -(-count // WINDOW)
    first = jnp.minimum(jnp.arange(workers + 1, dtype=jnp.int32) * -(-windows // workers), windows) * WINDOW
    return first[:-1], first[1:]


def pack_by_worker(cores: Cores, numbers: tuple[Array, ...]) -> Int[Array, "W _"]:
    """One row for each worker: each of its numbers fills a vector, and the row is padded to the size of a copy."""
    rows = jnp.concatenate([jnp.tile(x[:, None], (1, cores.lanes)) for x in numbers], axis=1)
    return jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % LANES)))


def split_into_pieces(table: Float[Array, "I R D"]) -> tuple[Float[Array, "_ C"], int, int]:
    """The table with one piece in each row, the length of a piece, and the number of pieces of a table row."""
    lanes = table.shape[2] // LANES
    width = LANES * max(size for size in range(1, LONGEST_PIECE + 1) if lanes % size == 0)
    return table.astype(jnp.float32).reshape(-1, width), width, table.shape[1] * table.shape[2] // width


def pad_to_chunk(x: Array) -> Array:
    return jnp.pad(x, (0, -x.shape[0] % CHUNK))


def estimate_cost(pairs: int, numbers_per_pair: int, other_bytes: int) -> pl.CostEstimate:
    """The cost of reading so many float32 numbers for every pair, and `other_bytes` beside."""
    numbers = pairs * numbers_per_pair
    return pl.CostEstimate(flops=2 * numbers, bytes_accessed=4 * numbers + other_bytes, transcendentals=0)
