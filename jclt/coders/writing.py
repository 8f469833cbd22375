"""What a coder writes in one pass through the layers."""

import jax

from jclt.coders.coder import Coder, SparseCoder
from jclt.kernels.active import SPARSE_BELOW, all_found_places, listed, taken
from jclt.kernels.matmuls import einsum, exact, letters, product
from jclt.kernels.row_lists import Rows
from jclt.kernels.row_sums import row_sums
from jclt.kernels.row_sums_xla import ROUNDS, SLOTS
from jclt.mesh import TOKENS, on_each_device, shard_shape, sum_over
from jclt.shapes import Array, Float


class Writing:
    """Is told each layer's activations once and sums up what they write, by the rows of the features that are active
    wherever these are few; or `densely`, as `Coder.write` does, with gradients."""

    def __init__(self, coder: Coder, *, densely: bool = False):
        self.coder = coder
        self.room = 0.0 if densely else room_for_rows(coder)
        self.activations: list[Array] = []
        self.sums: dict[int, Array] = {}

    def add(self, layer: int, a: Float[Array, "*N F"]) -> None:
        self.activations.append(a)
        if self.room:
            written = written_from(self.coder.rows(layer), a, self.room)
            for row in range(written.shape[-2]):
                own = written[..., row, :]
                self.sums[layer + row] = self.sums[layer + row] + own if layer + row in self.sums else own

    def to(self, layer: int, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        if not self.room:
            return self.coder.write(layer, self.activations, x)
        written, skip = self.sums.pop(layer), self.coder.skip(layer)
        written = written + self.coder.constant(layer).astype(written.dtype)[(None,) * (x.ndim - 1)]
        if skip is None:
            return written
        n = letters(x)
        return written + product(f"{n}d,ed->{n}e", exact(x, skip), skip).astype(written.dtype)


def room_for_rows(coder: Coder) -> float:
    """Entries a token and device up to which reading rows pays; 0 where it does not."""
    if not isinstance(coder, SparseCoder):
        return 0.0
    room = SPARSE_BELOW.get(jax.default_backend(), 0.0) * shard_shape(coder.layers[0].encoder)[0]
    return room if room >= ROUNDS * SLOTS else 0.0


def written_from(rows: Float[Array, "F R D"], a: Float[Array, "*N F"], room: float) -> Float[Array, "*N R D"]:
    """What one layer's features write to the layers that they reach; densely where there is no room for all."""
    flat = a.reshape(-1, a.shape[-1])

    def densely() -> Array:
        return einsum("nf,frd->nrd", exact(flat, rows), rows)

    entries = listed(flat != 0, room)

    def by_rows() -> Array:
        def own(entries, values, rows):
            each = (Rows(entries.token_starts, entries.feature, rows),)
            return sum_over("features", row_sums(each, (values,), rows.shape[1]))

        return on_each_device(own, TOKENS)(entries, taken(entries, flat), rows)

    written = jax.lax.cond(all_found_places((entries,)), by_rows, densely)
    return written.reshape(*a.shape[:-1], *rows.shape[1:])
