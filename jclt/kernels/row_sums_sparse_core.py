"""The sums of `rows` as kernels for the SparseCores of a TPU, which gather rows by themselves, beside what its
TensorCore computes.

Each of their subcores takes a share of the groups, or of the entries where each has a result of its own. Rows come in
pieces that fit into a subcore's memory and in windows of some entries: one comes while another is used.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc

from jclt.kernels.row_lists import LANES, Rows, places_and_groups
from jclt.shapes import Array, Float, Int

PIECE = 8
"""Longest piece of a row, in as many times LANES."""
WINDOW = 8
"""Entries whose rows come at once."""
STRETCH = 1024
"""Entries, and groups, whose numbers come at once."""
UNROLL = 8


def on_chip() -> bool:
    """Whether the chip that the program is for has SparseCores."""
    return pltpu.get_tpu_info().sparse_core is not None


class Cores(NamedTuple):
    """Those of the chip that the program is for."""

    mesh: Any
    lanes: int  # numbers that a subcore computes with at once

    @staticmethod
    def at_hand() -> "Cores":
        lanes = tpu_sc.get_sparse_core_info().num_lanes
        return Cores(tpu_sc.VectorSubcoreMesh(core_axis_name="core", subcore_axis_name="subcore"), lanes)

    def me(self) -> Array:
        """Within a kernel, the number of the subcore that it runs on."""
        return jax.lax.axis_index("core") * self.mesh.num_subcores + jax.lax.axis_index("subcore")

    def number(self, ref: Any, i: Array | int) -> Array:
        return ref[pl.ds(i, self.lanes)][0]

    def vectors(self, size: int) -> Any:
        """A loop over the vectors of as many numbers, in any order."""
        return tpu_sc.parallel_loop(0, size, self.lanes, unroll=UNROLL)


class Windows(NamedTuple):
    """The rows that a run of entries names, of one table or several, window by window."""

    cores: Cores
    numbers: tuple[Any, ...]  # of the row that each entry names, in HBM
    names: tuple[Any, ...]  # of the piece that each of a stretch names, at hand
    apart: tuple[int, ...]  # pieces of a row
    pieces: tuple[Any, ...]  # the one that is wanted
    tables: tuple[Any, ...]
    rings: tuple[Any, ...]
    arrived: Any
    begin: Array
    end: Array

    def gathers(self, window: Array) -> list[Any]:
        here = pl.ds(jax.lax.rem(window, STRETCH // WINDOW) * WINDOW, WINDOW)
        slot = jax.lax.rem(window, 2)
        each = enumerate(zip(self.tables, self.names, self.rings, strict=True))
        return [
            gather(table, names.at[here], ring.at[slot], self.arrived.at[slot, i]) for i, (table, names, ring) in each
        ]

    def reach(self, e: Array) -> None:
        """Has an entry's window at hand and the next one on its way."""
        window = e // WINDOW

        @pl.when((e == self.begin) | (jax.lax.rem(e, WINDOW) == 0))
        def _() -> None:
            @pl.when((e == self.begin) | (jax.lax.rem(e, STRETCH) == 0))
            def _() -> None:
                for far, near, apart, piece in zip(self.numbers, self.names, self.apart, self.pieces, strict=True):
                    pltpu.sync_copy(far.at[pl.ds(e // STRETCH * STRETCH, STRETCH)], near)

                    @self.cores.vectors(STRETCH)
                    def _(i: Array, near: Any = near, apart: int = apart, piece: Any = piece) -> None:
                        part = pl.ds(i, self.cores.lanes)
                        near[part] = near[part] * apart + piece

                for copy in self.gathers(window):
                    copy.start()

            @pl.when((jax.lax.rem(window + 1, STRETCH // WINDOW) > 0) & ((window + 1) * WINDOW < self.end))
            def _() -> None:
                for copy in self.gathers(window + 1):
                    copy.start()

            for copy in self.gathers(window):
                copy.wait()


def gather(table: Any, names: Any, into: Any, arrived: Any) -> Any:
    """The copy that brings the rows of these names."""
    return pltpu.make_async_copy(table.at[names], into, arrived)


def row_sums(lists: Sequence[Rows], values: Sequence[Float[Array, "_"]], length: int) -> Float[Array, "G R D"]:
    """`rows.row_sums` of one list, whose rows are as long as a group's or longer."""
    (rows,), (weights,) = lists, values
    cores, groups = Cores.at_hand(), rows.starts.shape[0] - 1
    table, width, own = in_pieces(rows.table)
    pieces = length * rows.table.shape[2] // width
    before = rows.first * rows.table.shape[2] // width if own > pieces else 0
    bounds = of_each(cores, group_shares(rows.starts, cores.mesh.size))
    starts = jnp.pad(rows.starts, (0, STRETCH + LANES), mode="edge")

    def kernel(
        bounds: Any, starts: Any, index: Any, values: Any, table: Any, out: Any, mine: Any, *memory: Any
    ) -> None:
        starts_here, names, weights, ring, sums, arrived, sent = memory
        pltpu.sync_copy(bounds.at[cores.me()], mine)
        first, last, begin, end = (cores.number(mine, i * cores.lanes) for i in range(4))

        @pl.loop(0, pieces)
        def _(piece: Array) -> None:
            at = before + piece
            windows = Windows(cores, (index,), (names,), (own,), (at,), (table,), (ring,), arrived, begin, end)

            @pl.loop(first // STRETCH, pl.cdiv(last, STRETCH))
            def _(stretch: Array) -> None:
                passed = stretch * STRETCH
                pltpu.sync_copy(starts.at[pl.ds(passed, STRETCH + LANES)], starts_here)

                @pl.loop(jnp.maximum(first, passed), jnp.minimum(last, passed + STRETCH))
                def _(group: Array) -> None:
                    done = piece * (last - first) + group - first
                    slot = jax.lax.rem(done, 2)

                    def sending(place: Array | int) -> Any:
                        return pltpu.make_async_copy(sums.at[slot], out.at[place], sent.at[slot])

                    @pl.when(done >= 2)
                    def _() -> None:
                        sending(0).wait()

                    @cores.vectors(width)
                    def _(c: Array) -> None:
                        sums[slot, pl.ds(c, cores.lanes)] = jnp.zeros(cores.lanes, jnp.float32)

                    here = group - passed

                    @pl.loop(cores.number(starts_here, here), cores.number(starts_here, here + 1))
                    def _(e: Array) -> None:
                        @pl.when((e == begin) | (jax.lax.rem(e, STRETCH) == 0))
                        def _() -> None:
                            there = pl.ds(e // STRETCH * STRETCH, STRETCH)
                            pltpu.sync_copy(values.at[there], weights.at[pl.ds(0, STRETCH)])

                        windows.reach(e)
                        weight = cores.number(weights, jax.lax.rem(e, STRETCH))
                        row = (jax.lax.rem(e // WINDOW, 2), jax.lax.rem(e, WINDOW))

                        @cores.vectors(width)
                        def _(c: Array) -> None:
                            part = pl.ds(c, cores.lanes)
                            sums[slot, part] = sums[slot, part] + weight * ring[*row, part]

                    sending(group * pieces + piece).start()

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
            pltpu.VMEM((STRETCH + LANES,), jnp.int32),
            pltpu.VMEM((STRETCH,), jnp.int32),
            pltpu.VMEM((STRETCH + LANES,), jnp.float32),
            pltpu.VMEM((2, WINDOW, width), jnp.float32),
            pltpu.VMEM((2, width), jnp.float32),
            pltpu.SemaphoreType.DMA((2, 1)),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        cost_estimate=cost(rows.which.shape[0], pieces * width, 4 * groups * pieces * width),
        name="row_sums",
    )
    sums = run(bounds, starts, padded(rows.which), padded(weights.astype(jnp.float32)), table)
    return sums.reshape(groups, length, -1)


def row_products(lists: Sequence[Rows], held: Float[Array, "G R D"]) -> tuple[Float[Array, "_"], ...]:
    """`rows.row_products` of one list. What a group holds comes anew for each entry."""
    (rows,) = lists
    cores, places = Cores.at_hand(), rows.which.shape[0]
    table, width, pieces = in_pieces(rows.table)
    held, _, whole = in_pieces(held)
    before = rows.first * rows.table.shape[2] // width if whole > pieces else 0
    place, group = places_and_groups(rows.starts, places)
    numbers = padded(rows.which), padded(jnp.minimum(group, rows.starts.shape[0] - 2))
    bounds = of_each(cores, entry_shares(rows.starts[-1], cores.mesh.size))

    def kernel(bounds: Any, index: Any, group: Any, table: Any, held: Any, out: Any, mine: Any, *memory: Any) -> None:
        names, groups, rows, holds, made, arrived = memory
        pltpu.sync_copy(bounds.at[cores.me()], mine)
        begin, end = (cores.number(mine, i * cores.lanes) for i in range(2))

        @pl.loop(0, pieces)
        def _(piece: Array) -> None:
            windows = Windows(
                cores,
                (index, group),
                (names, groups),
                (pieces, whole),
                (piece, before + piece),
                (table, held),
                (rows, holds),
                arrived,
                begin,
                end,
            )

            @pl.loop(begin // WINDOW, pl.cdiv(end, WINDOW))
            def _(window: Array) -> None:
                windows.reach(window * WINDOW)
                slot = jax.lax.rem(window, 2)
                for j in range(WINDOW):
                    made[j] = jnp.zeros(cores.lanes, jnp.float32)

                    @pl.loop(0, width, step=UNROLL * cores.lanes)
                    def _(c: Array, j: int = j) -> None:
                        parts = [pl.ds(c + i * cores.lanes, cores.lanes) for i in range(UNROLL)]
                        made[j] = sum((rows[slot, j, part] * holds[slot, j, part] for part in parts), made[j])

                pltpu.sync_copy(made, out.at[piece, pl.ds(window * WINDOW, WINDOW)])

    run: Any = pl.kernel(
        kernel,
        jax.ShapeDtypeStruct((pieces, numbers[0].shape[0], cores.lanes), jnp.float32),
        mesh=cores.mesh,
        scratch_types=[
            pltpu.VMEM((bounds.shape[1],), jnp.int32),
            pltpu.VMEM((STRETCH,), jnp.int32),
            pltpu.VMEM((STRETCH,), jnp.int32),
            pltpu.VMEM((2, WINDOW, width), jnp.float32),
            pltpu.VMEM((2, WINDOW, width), jnp.float32),
            pltpu.VMEM((WINDOW, cores.lanes), jnp.float32),
            pltpu.SemaphoreType.DMA((2, 2)),
        ],
        cost_estimate=cost(places, 2 * pieces * width, 4 * places * pieces * cores.lanes),
        name="row_products",
    )
    products = run(bounds, *numbers, table, held)
    return (jnp.where(place < rows.starts[-1], jnp.sum(products, axis=(0, 2))[:places], 0.0),)


def group_shares(starts: Int[Array, "_"], workers: int) -> tuple[Array, ...]:
    """For each worker its first group and the next one's, and its first entry and the next one's, so that all have
    about as many groups and entries."""
    groups = starts.shape[0] - 1
    work = starts + jnp.arange(groups + 1, dtype=jnp.int32)
    even = jnp.arange(workers + 1, dtype=jnp.int32) * (work[-1] // workers)
    first = jnp.searchsorted(work, even).astype(jnp.int32).at[-1].set(groups)
    return first[:-1], first[1:], starts[first[:-1]], starts[first[1:]]


def entry_shares(count: Array, workers: int) -> tuple[Array, ...]:
    """For each worker its first entry and the next one's, in whole windows."""
    windows = -(-count // WINDOW)
    first = jnp.minimum(jnp.arange(workers + 1, dtype=jnp.int32) * -(-windows // workers), windows) * WINDOW
    return first[:-1], first[1:]


def of_each(cores: Cores, numbers: tuple[Array, ...]) -> Int[Array, "W _"]:
    """Each worker's own numbers in a row, every one in a vector of its own, and padded to what one copy brings."""
    wide = jnp.concatenate([jnp.tile(own[:, None], (1, cores.lanes)) for own in numbers], axis=1)
    return jnp.pad(wide, ((0, 0), (0, -wide.shape[1] % LANES)))


def in_pieces(table: Float[Array, "I R D"]) -> tuple[Float[Array, "_ C"], int, int]:
    """The table with a piece in a row, the length of a piece and how many a row has."""
    lanes = table.shape[2] // LANES
    width = LANES * max(size for size in range(1, PIECE + 1) if lanes % size == 0)
    return table.astype(jnp.float32).reshape(-1, width), width, table.shape[1] * table.shape[2] // width


def padded(x: Array) -> Array:
    return jnp.pad(x, (0, -x.shape[0] % STRETCH))


def cost(entries: int, numbers: int, others: int) -> pl.CostEstimate:
    """Of reading so many numbers for every entry, and of so many bytes besides."""
    return pl.CostEstimate(
        flops=2 * entries * numbers, bytes_accessed=4 * entries * numbers + others, transcendentals=0
    )
