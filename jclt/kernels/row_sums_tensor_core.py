"""The sums of `rows` as kernels for a TPU's TensorCore: each row of a table comes from HBM by a copy of its own, many
on their way at once, and nothing is read that no entry names.

The entries of a list are a stream, sorted by group, and the grid goes through the groups in order: copies for the next
groups are under way before their turn. Entries' own numbers come to scalar memory in stretches.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jclt.kernels.row_lists import LANES, Rows
from jclt.shapes import Array, Float, Int

SUBLANES = 8
TILE = 8
"""Groups of one grid step."""
STRETCH = 256
AT_HAND = 4
"""Stretches in scalar memory: one is used, copies of rows are started from it or the next, and one more comes."""
ON_THEIR_WAY = 2**21
"""Bytes of rows on their way, for all lists: some more than bandwidth times latency of HBM."""
FEWEST, MOST = 2, 64
"""Rows on their way, for each list."""
MARGIN = 2**22
"""Bytes of vector memory beside what a kernel asks for."""


def row_sums(lists: Sequence[Rows], values: Sequence[Float[Array, "_"]], length: int) -> Float[Array, "G R D"]:
    """`rows.row_sums`, all lists at once."""
    shape = (lists[0].starts.shape[0] - 1, length, lists[0].table.shape[2])
    groups, wide = shape[0], length * shape[2] // LANES
    arrays = [
        (stretches(own.which), stretches(value.astype(jnp.float32)), in_lanes(own.table))
        for own, value in zip(lists, values, strict=True)
    ]
    streams = [Stream.planned(own, arrays[i], wide, len(lists)) for i, own in enumerate(lists)]

    def kernel(ends: Any, starts: Any, refs: Any, out: Any, scratch: Any) -> None:
        out[...] = jnp.zeros(out.shape, out.dtype)
        for i, stream in enumerate(streams):
            own = stream.within(i, ends, starts, refs[i], scratch[i])

            def add(group: Array, e: Array, row: Array, own: Stream = own) -> None:
                out[group, own.place : own.place + own.used] += own.number(1, e) * row

            own.each_row(add)

    result = jax.ShapeDtypeStruct((groups, wide, LANES), jnp.float32)
    scratch = [own.scratch for own in streams]
    sums = call("row_sums", kernel, lists, streams, arrays, of_tile(wide), result, scratch, 4 * wide * LANES)
    return sums.reshape(shape)


def row_products(lists: Sequence[Rows], held: Float[Array, "G R D"]) -> tuple[Float[Array, "_"], ...]:
    """`rows.row_products`, all lists at once."""
    held = in_lanes(held)
    wide = held.shape[1]
    arrays = [(stretches(own.which), in_lanes(own.table)) for own in lists]
    streams = [Stream.planned(own, arrays[i], wide, len(lists)) for i, own in enumerate(lists)]

    def kernel(ends: Any, starts: Any, held: Any, refs: Any, *rest: Any) -> None:
        *outs, scratch = rest
        for i, stream in enumerate(streams):
            sums, made, sent, own_scratch = scratch[i]
            own = stream.within(i, ends, starts, refs[i], own_scratch)

            def multiply(
                group: Array, e: Array, row: Array, own: Stream = own, out=outs[i], sums=sums, made=made, sent=sent
            ) -> None:
                products = held[group, own.place : own.place + own.used].astype(jnp.float32) * row
                place = jax.lax.rem(e, STRETCH)
                sums[pl.ds(place, 1), :] = jnp.sum(products, axis=0, keepdims=True)

                @pl.when((place == STRETCH - 1) | (e == own.end - 1))
                def _() -> None:
                    # A product with ones adds up lanes, and turns the entries from sublanes into lanes.
                    made[...] = jax.lax.dot_general(
                        jnp.ones((SUBLANES, LANES), jnp.float32),
                        sums[...],
                        (((1,), (1,)), ((), ())),
                        precision=jax.lax.Precision.HIGHEST,
                    )
                    copy = pltpu.make_async_copy(made, out.at[jax.lax.div(e, STRETCH)], sent)
                    copy.start()
                    copy.wait()

            own.each_row(multiply)

    outs = [jax.ShapeDtypeStruct((index.shape[0], SUBLANES, STRETCH), jnp.float32) for index, _ in arrays]
    anywhere = [pl.BlockSpec(memory_space=pl.ANY)] * len(outs)
    scratch = [
        (
            pltpu.VMEM((STRETCH, LANES), jnp.float32),
            pltpu.VMEM((SUBLANES, STRETCH), jnp.float32),
            pltpu.SemaphoreType.DMA,
            own.scratch,
        )
        for own in streams
    ]
    size = held.dtype.itemsize * wide * LANES
    products = call("row_products", kernel, lists, streams, arrays, anywhere, outs, scratch, size, held)
    return tuple(
        jnp.where(jnp.arange(own.which.shape[0]) < own.starts[-1], made[:, 0].reshape(-1)[: own.which.shape[0]], 0.0)
        for own, made in zip(lists, products, strict=True)
    )


def call(
    name: str,
    kernel: Any,
    lists: Sequence[Rows],
    streams: Sequence["Stream"],
    arrays: Any,
    out: Any,
    result: Any,
    scratch: Any,
    size: int,
    *held: Array,
) -> Any:
    """The kernel run over tiles of groups; `size` is the bytes of what a group holds, read or written once."""
    starts = in_tiles([own.starts for own in lists])
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(starts.shape[0],),
            in_specs=[
                pl.BlockSpec((1, *starts.shape[1:]), lambda i, _: (i, 0, 0), memory_space=pltpu.SMEM),
                *(of_tile(own.shape[1]) for own in held),
                jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), arrays),
            ],
            out_specs=out,
            scratch_shapes=[scratch],
        ),
        out_shape=result,
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=MARGIN + 2 * TILE * size + sum(own.size for own in streams)
        ),
        cost_estimate=cost(arrays, streams, starts.shape[0] * TILE * size),
        name=name,
    )(jnp.stack([own.starts[-1] for own in lists]), starts, *held, arrays)


def of_tile(wide: int) -> pl.BlockSpec:
    return pl.BlockSpec((TILE, wide, LANES), lambda i, _: (i, 0, 0))


class Stream(NamedTuple):
    """The rows that a list's entries name, one after the other; planned outside of a kernel, filled in within it."""

    used: int  # of a row, in LANES
    place: int  # of these within what a group holds
    begin: int  # of what is fetched of a row, which is whole tiles of HBM
    skipped: int  # of what is fetched
    scratch: Any
    nth: int = 0
    end: Any = None  # how many entries there are
    starts: Any = None  # where the groups of this tile start
    numbers: Any = None  # of the entries, in HBM: first the row that each names
    table: Any = None  # in HBM

    @staticmethod
    def planned(rows: Rows, arrays: Sequence[Array], wide: int, lists: int) -> "Stream":
        *numbers, table = arrays
        whole, offset = table.shape[1], rows.first * rows.table.shape[2] // LANES
        used = min(wide, whole)
        place, first = (0, offset) if whole > wide else (offset if whole < wide else 0, 0)
        begin = first // SUBLANES * SUBLANES
        fetched = min(whole, -(-(first + used) // SUBLANES) * SUBLANES) - begin
        size = fetched * LANES * table.dtype.itemsize
        depth = min(MOST, max(FEWEST, ON_THEIR_WAY // (lists * size)))
        scratch = (
            tuple(pltpu.SMEM((AT_HAND, 1, STRETCH), own.dtype) for own in numbers),
            pltpu.SemaphoreType.DMA((len(numbers),)),
            pltpu.VMEM((depth, fetched, LANES), table.dtype),
            pltpu.SemaphoreType.DMA((depth,)),
        )
        return Stream(used, place, begin, first - begin, scratch)

    @property
    def size(self) -> int:
        """Bytes of vector memory, with those that collect products."""
        ring = self.scratch[2]
        return math.prod(ring.shape) * ring.dtype.itemsize + STRETCH * (LANES + SUBLANES) * 4

    def within(self, i: int, ends: Any, starts: Any, refs: Any, scratch: Any) -> "Stream":
        *numbers, table = refs
        return self._replace(nth=i, end=ends[i], starts=starts, numbers=tuple(numbers), table=table, scratch=scratch)

    def number(self, which: int, e: Array | int) -> Array:
        return self.scratch[0][which][jax.lax.rem(jax.lax.div(e, STRETCH), AT_HAND), 0, jax.lax.rem(e, STRETCH)]

    def stretch(self, i: Array | int) -> list[Any]:
        """The copies that bring the i-th stretch of entries' numbers."""
        at_hand, came = self.scratch[:2]
        slot = jax.lax.rem(i, AT_HAND)
        pairs = enumerate(zip(self.numbers, at_hand, strict=True))
        return [pltpu.make_async_copy(far.at[i], near.at[slot], came.at[which]) for which, (far, near) in pairs]

    def row(self, e: Array | int) -> Any:
        """The copy that brings the row of an entry."""
        ring, arrived = self.scratch[2:]
        slot = jax.lax.rem(e, ring.shape[0])
        there = self.table.at[self.number(0, e), pl.ds(self.begin, ring.shape[1])]
        return pltpu.make_async_copy(there, ring.at[slot], arrived.at[slot])

    def order(self, e: Array | int) -> None:
        """Starts the copy of an entry's row, if there is such an entry."""

        @pl.when(e < self.end)
        def _() -> None:
            @pl.when(jax.lax.rem(e, STRETCH) == 0)
            def _() -> None:
                i = jax.lax.div(e, STRETCH)
                for copy in self.stretch(i):
                    copy.wait()

                @pl.when((i + 1) * STRETCH < self.end)
                def _() -> None:
                    for copy in self.stretch(i + 1):
                        copy.start()

            self.row(e).start()

    def each_row(self, use: Callable[[Array, Array, Array], None]) -> None:
        """Calls `use` with the number within its tile of each group of this grid step, an entry of it and its row."""
        ring = self.scratch[2]
        depth = ring.shape[0]

        @pl.when((pl.program_id(0) == 0) & (self.end > 0))
        def _() -> None:
            for copy in self.stretch(0):
                copy.start()
            jax.lax.fori_loop(0, depth, lambda e, _: self.order(e), None)

        def of_group(group: Array, _: None) -> None:
            def of_entry(e: Array, _: None) -> None:
                self.row(e).wait()
                row = ring[jax.lax.rem(e, depth), self.skipped : self.skipped + self.used]
                use(group, e, row.astype(jnp.float32))
                self.order(e + depth)

            place = self.nth * (TILE + 1) + group
            jax.lax.fori_loop(self.starts[0, 0, place], self.starts[0, 0, place + 1], of_entry, None)

        jax.lax.fori_loop(0, TILE, of_group, None)


def in_tiles(starts: list[Int[Array, "_"]]) -> Int[Array, "_ 1 _"]:
    """Of each tile of groups, where its groups start and the last ends, list by list."""
    tiles = -(-(starts[0].shape[0] - 1) // TILE)
    whole = [jnp.pad(own, (0, tiles * TILE + 1 - own.shape[0]), mode="edge") for own in starts]
    each = [jnp.concatenate([own[:-1].reshape(tiles, TILE), own[TILE::TILE, None]], axis=1) for own in whole]
    joined = jnp.concatenate(each, axis=1)
    return jnp.pad(joined, ((0, 0), (0, -joined.shape[1] % LANES)))[:, None]


def cost(arrays: Any, streams: Sequence[Stream], others: int) -> pl.CostEstimate:
    """Of reading a row for every place in the lists, and so many bytes besides."""
    places = [own[0].size for own in arrays]
    rows = [
        own[-1].dtype.itemsize * stream.scratch[2].shape[1] * LANES for own, stream in zip(arrays, streams, strict=True)
    ]
    read = sum(place * (row + 8) for place, row in zip(places, rows, strict=True))
    flops = sum(2 * place * own.used * LANES for place, own in zip(places, streams, strict=True))
    return pl.CostEstimate(flops=flops, bytes_accessed=read + others, transcendentals=0)


def stretches(x: Array) -> Array:
    return jnp.pad(x, (0, -x.shape[0] % STRETCH)).reshape(-1, 1, STRETCH)


def in_lanes(table: Float[Array, "I *D"]) -> Float[Array, "I _ _"]:
    """Each row's numbers side by side in HBM."""
    return table.reshape(table.shape[0], -1, LANES)
