"""The two sums over entries that all sparse products are made of.

`row_sums` adds up weighted rows of tables for each group: rows of the decoders for each token make what is written,
errors of tokens for each feature make the gradient of its decoder. `row_products` multiplies each entry's row with
what its group holds: a decoder's row with a token's error is the gradient to the activation.

What a feature writes is some of the layers that a token holds: rows may be shorter than a group's, or longer.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jclt.kernels.row_lists import LANES, Rows
from jclt.kernels.row_sums_xla import products_of_one, sums_of_one
from jclt.mesh import device_kind
from jclt.shapes import Array, Float


def row_sums(lists: Sequence[Rows], values: Sequence[Float[Array, "_"]], length: int) -> Float[Array, "G R D"]:
    """For each group the sum of all lists' rows times their entries' values."""
    if kernels := kernels_for(lists):
        return kernels.row_sums(lists, values, length)
    sums: list[Any] = [jnp.float32(0)] * length
    for own, value in zip(lists, values, strict=True):
        added = sums_of_one(own, value, length)
        first = own.first if added.shape[1] < length else 0
        for row in range(added.shape[1]):
            sums[first + row] += added[:, row]
    return jnp.stack(jnp.broadcast_arrays(*sums), axis=1)


def row_products(lists: Sequence[Rows], held: Float[Array, "G R D"]) -> tuple[Float[Array, "_"], ...]:
    """For each entry the inner product of its row with what its group holds; some finite number where there is none."""
    if kernels := kernels_for(lists):
        return kernels.row_products(lists, held)
    return tuple(products_of_one(own, held) for own in lists)


def kernels_for(lists: Sequence[Rows]) -> Any:
    """The module with kernels for these sums, on the processor that the program is traced for; None for XLA's forms.

    Several lists are one kernel on a TPU's TensorCore, which writes what a group sums up once. A single one is left to
    SparseCores, where the chip has them: they work beside the TensorCore.
    """
    kind = device_kind()
    if not kind.startswith("TPU") or any(own.table.shape[2] % LANES for own in lists):
        return None
    from jclt.kernels import row_sums_sparse_core as sparse_core
    from jclt.kernels import row_sums_tensor_core as tensor_core

    return sparse_core if len(lists) == 1 and sparse_core.on_chip() else tensor_core
