"""Token rows in batches of one shape."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jclt.coders import CoderConfig
from jclt.errors import UserError
from jclt.mesh import sharding
from jclt.models import Model, token_array
from jclt.shapes import Array, ArrayLike

BATCH = 32
"""Rows that go through the model at once at most, where nothing else is said."""
BUDGET = 1 << 30
"""Bytes a device that activations and logits of these rows may take; the same on every machine, and so are sums."""


def rows_at_once(model: Model, coder: CoderConfig, rows: ArrayLike, mask: ArrayLike | None) -> int:
    """As many as the budget allows: each has the activations of all layers, and three times the model's logits."""
    length, pieces = checked(model, rows, mask)[0].shape[1], 1 if model.mesh is None else model.mesh.size
    a_row = 4 * length * (len(coder.covered) * coder.features + 3 * model.config.vocabulary)
    return int(np.clip(pieces * BUDGET // max(1, a_row), 1, BATCH))


def batches(model: Model, rows: ArrayLike, mask: ArrayLike | None, size: int) -> Iterator[tuple[Array, Array]]:
    """Tokens `[B, T]` and which of them to measure, placed on the model's mesh.

    Every batch has the same shape, so that one program serves all: the last is filled up with rows that the mask
    leaves out.
    """
    tokens, kept = checked(model, rows, mask)
    mesh = model.mesh
    pieces = 1 if mesh is None else mesh.size
    size = -(-min(size, len(tokens)) // pieces) * pieces
    for start in range(0, len(tokens), size):
        batch = (_filled(tokens[start : start + size], size), _filled(kept[start : start + size], size))
        where = sharding(mesh, batch[0].shape, ("batch", None)) if mesh else None
        yield jax.device_put(batch[0], where), jax.device_put(batch[1], where)


def one_batch(model: Model, rows: ArrayLike) -> Array:
    """All rows at once, filled up to as many as the model's mesh can split."""
    ((tokens, _),) = batches(model, rows, None, len(np.asarray(rows)))
    return tokens


def checked(model: Model, rows: ArrayLike, mask: ArrayLike | None) -> tuple[np.ndarray, np.ndarray]:
    """The rows and their mask as arrays of one shape, or one line on what is wrong."""
    tokens = token_array(model, rows)
    if tokens.ndim != 2:
        raise UserError(f"token rows: got {tokens.ndim} axis, expected rows of token ids [N, T]")
    kept = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask, bool)
    if kept.shape != tokens.shape:
        raise UserError(f"mask: shape {kept.shape}, expected {tokens.shape}, that of the token rows")
    if not kept.any():
        raise UserError("mask: leaves no token out of all rows, expected at least one")
    return tokens, kept


def check_finite(finite: ArrayLike, what: str) -> None:
    """An error that names what is not finite: comparing it says nothing, the most probable of such logits agree."""
    if not np.all(finite):
        raise UserError(f"{what} not finite, expected numbers: nothing can be measured")


def _filled(rows: np.ndarray, size: int) -> np.ndarray:
    return np.pad(rows, ((0, size - len(rows)), (0, 0)))


def on_host(tree: Any) -> Any:
    """The arrays in double precision, in which sums over many batches lose nothing."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
