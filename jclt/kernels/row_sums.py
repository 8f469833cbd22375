"""The two sums over active pairs of which all sparse products are made.

1. `sum_rows`: for each group the sum of table rows times values.
   Decoder rows by token give the reconstruction; errors by feature give the gradient of the decoder.
2. `dot_rows`: for each pair the inner product of its table row and the values of its group.
   Decoder rows with the errors of tokens give the gradient of the activations.

A feature writes to some of the layers, so a table row may be shorter than a group's accumulator, or longer.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jclt.kernels.row_lists import LANES, GroupedRows
from jclt.kernels.row_sums_xla import dot_rows_of_list, sum_rows_of_list
from jclt.mesh import device_kind
from jclt.shapes import Array, Float


def sum_rows(lists: Sequence[GroupedRows], values: Sequence[Float[Array, "_"]], length: int) -> Float[Array, "G R D"]:
    """For each group the sum over all lists of its pairs' rows times their values; `length` vectors for each group."""
    if kernels := choose_kernels(lists):
        return kernels.sum_rows(lists, values, length)
    sums: list[Any] = [jnp.float32(0)] * length
    for rows, value in zip(lists, values, strict=True):
        sum_of_list = sum_rows_of_list(rows, value, length)
        offset = rows.offset if sum_of_list.shape[1] < length else 0
        for i in range(sum_of_list.shape[1]):
            sums[offset + i] += sum_of_list[:, i]
    return jnp.stack(jnp.broadcast_arrays(*sums), axis=1)


def dot_rows(lists: Sequence[GroupedRows], group_values: Float[Array, "G R D"]) -> tuple[Float[Array, "_"], ...]:
    """For each pair the inner product of its row and its group's values; some finite number at empty slots."""
    if kernels := choose_kernels(lists):
        return kernels.dot_rows(lists, group_values)
    return tuple(dot_rows_of_list(rows, group_values) for rows in lists)


def choose_kernels(lists: Sequence[GroupedRows]) -> Any:
    """The module with the kernels for the processor that the program is traced for; None for the form in plain XLA.

    On TPUs several lists are one kernel of the TensorCore, so that each group's sum is written once. A single list is
    left to the SparseCores, where the chip has them: they work beside the TensorCore.
    """
    kind = device_kind()
    if not kind.startswith("TPU") or any(rows.table.shape[2] % LANES for rows in lists):
        return None
    from jclt.kernels import row_sums_sparse_core as sparse_core
    from jclt.kernels import row_sums_tensor_core as tensor_core

    return sparse_core if len(lists) == 1 and sparse_core.has_sparse_cores() else tensor_core
