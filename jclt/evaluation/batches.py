"""Token rows in batches of one shape."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jclt.coders import CoderConfig
from jclt.errors import UserError
from jclt.mesh import make_sharding
from jclt.models import Model, token_array
from jclt.shapes import Array, ArrayLike

LARGEST_BATCH = 32
"""The most rows that go through the model at once by default."""
BATCH_BYTES = 1 << 30
"""The most bytes per device for activations and logits of these rows. It is the same on every machine, and so are the
sums over batches."""


def choose_batch_size(model: Model, coder: CoderConfig, rows: ArrayLike, mask: ArrayLike | None) -> int:
    """As many rows as `BATCH_BYTES` allows. A row has the activations of all layers, and logits three times."""
    length, devices = check_rows(model, rows, mask)[0].shape[1], 1 if model.mesh is None else model.mesh.size
    row_bytes = 4 * length * (len(coder.covered) * coder.features + 3 * model.config.vocabulary)
    return int(np.clip(devices * BATCH_BYTES // max(1, row_bytes), 1, LARGEST_BATCH))


def iterate_batches(model: Model, rows: ArrayLike, mask: ArrayLike | None, size: int) -> Iterator[tuple[Array, Array]]:
    """Tokens `[B, T]` and a mask of those to measure, on the model's mesh.

    Every batch has the same shape, so that one program serves all of them: the last batch is padded with rows that the
    mask leaves out.
    """
    tokens, token_mask = check_rows(model, rows, mask)
    mesh = model.mesh
    devices = 1 if mesh is None else mesh.size
    size = -(-min(size, len(tokens)) // devices) * devices
    for start in range(0, len(tokens), size):
        batch = (_pad_rows(tokens[start : start + size], size), _pad_rows(token_mask[start : start + size], size))
        where = make_sharding(mesh, batch[0].shape, ("batch", None)) if mesh else None
        yield jax.device_put(batch[0], where), jax.device_put(batch[1], where)


def mask_first_positions(coder: CoderConfig, rows: ArrayLike, mask: ArrayLike | None) -> ArrayLike | None:
    """The mask without the positions that the coder leaves to the model."""
    if not coder.first_position:
        return mask
    measured = np.ones(np.shape(rows), bool) if mask is None else np.array(mask, bool)
    measured[..., : coder.first_position] = False
    return measured


def make_one_batch(model: Model, rows: ArrayLike) -> Array:
    """All rows at once, padded to a number that the model's mesh can split."""
    ((tokens, _),) = iterate_batches(model, rows, None, len(np.asarray(rows)))
    return tokens


def check_rows(model: Model, rows: ArrayLike, mask: ArrayLike | None) -> tuple[np.ndarray, np.ndarray]:
    """The rows and their mask as arrays of one shape; an error of one line where something is wrong."""
    tokens = token_array(model, rows)
    if tokens.ndim != 2:
        raise UserError(f"token rows: got {tokens.ndim} axis, expected rows of token ids [N, T]")
    token_mask = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask, bool)
    if token_mask.shape != tokens.shape:
        raise UserError(f"mask: shape {token_mask.shape}, expected {tokens.shape}, that of the token rows")
    if not token_mask.any():
        raise UserError("mask: leaves no token out of all rows, expected at least one")
    return tokens, token_mask


def check_finite(finite: ArrayLike, what: str) -> None:
    """An error that names what is not finite. Without it NaN could go unnoticed: the most probable tokens of two sets
    of NaN logits agree."""
    if not np.all(finite):
        raise UserError(f"{what} not finite, expected numbers: nothing can be measured")


def _pad_rows(rows: np.ndarray, size: int) -> np.ndarray:
    return np.pad(rows, ((0, size - len(rows)), (0, 0)))


def to_host(tree: Any) -> Any:
    """The arrays in double precision, so that sums over many batches lose no digits."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
