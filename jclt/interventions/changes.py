"""Edits of features as arrays: which features of which layers change, at which positions, and how.

Every edit of a feature is affine: `Set(v)` makes an activation 0 a + v, `Scale(s)` makes it s a, `Add(v)` makes it
a + v. Several edits of one feature are composed on the host, so that the program sees one of them at each position.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jclt.coders import CoderConfig
from jclt.errors import UserError
from jclt.models import Add, Scale, Set, SiteEdit
from jclt.models.ranges import END
from jclt.shapes import Array, Bool, Float, Int


class Changes(NamedTuple):
    """Changes of features by covered layer: an activation a becomes `multiply` a + `add` at positions from `start` to
    before `stop`. Lists are padded with changes at no position."""

    features: Int[Array, "C m"]
    start: Int[Array, "C m"]
    stop: Int[Array, "C m"]
    multiply: Float[Array, "B C m"]  # B: 1, or one for each row of the batch
    add: Float[Array, "B C m"]

    def find(self, index: int, positions: Int[Array, "_ T"]) -> Bool[Array, "_ T m"]:
        """Where the changes of a covered layer act."""
        at = positions[..., None].astype(jnp.int32)
        return (at >= self.start[index][None, None]) & (at < self.stop[index][None, None])

    def change(
        self, index: int, positions: Int[Array, "_ T"], reference: Float[Array, "B T m"], otherwise: Array
    ) -> Float[Array, "B T m"]:
        """The new activations of the listed features of a covered layer; `otherwise` where no change acts."""
        dtype = reference.dtype
        multiply, add = (x[:, index][:, None].astype(dtype) for x in (self.multiply, self.add))
        return jnp.where(self.find(index, positions), multiply * reference + add, otherwise)


class Segment(NamedTuple):
    """One feature's change over a range of positions."""

    start: int
    stop: int
    multiply: Float[np.ndarray, "B"]
    add: Float[np.ndarray, "B"]


def make_changes(edits: Sequence[SiteEdit], coder: CoderConfig) -> Changes:
    """The changes that these edits of features make, in the order given."""
    edits_of: dict[tuple[int, int], list[SiteEdit]] = {}
    for edit in edits:
        for cell in list_cells(edit, coder):
            edits_of.setdefault(cell, []).append(edit)
    segments = {cell: split_segments(of_cell) for cell, of_cell in edits_of.items()}
    counts = {len(s.add) for parts in segments.values() for s in parts} - {1}
    if len(counts) > 1:
        raise UserError(f"edits: {min(counts)} and {max(counts)} values, expected as many in each edit")
    rows = max(counts, default=1)
    by_layer: list[list[tuple[int, Segment]]] = [[] for _ in coder.covered]
    for (index, feature), parts in sorted(segments.items()):
        by_layer[index] += [(feature, part) for part in parts]
    longest = max(map(len, by_layer))
    size = 1 << max(longest - 1, 0).bit_length()  # few sizes, few programs
    shape = (len(coder.covered), size)
    features, start, stop = (np.zeros(shape, np.int32) for _ in range(3))
    multiply, add = np.ones((rows, *shape)), np.zeros((rows, *shape))
    for index, of_layer in enumerate(by_layer):
        for slot, (feature, part) in enumerate(of_layer):
            features[index, slot], start[index, slot], stop[index, slot] = feature, part.start, part.stop
            multiply[:, index, slot], add[:, index, slot] = part.multiply, part.add
    return Changes(*map(jnp.asarray, (features, start, stop, multiply, add)))


def list_cells(edit: SiteEdit, coder: CoderConfig) -> list[tuple[int, int]]:
    """The covered layers, by their index, and features that an edit changes."""
    if not isinstance(edit, Set | Scale | Add):
        raise UserError(f"edit of features: {type(edit).__name__}, expected Set, Scale or Add")
    if edit.directions is not None:
        raise UserError("edit of features: along a direction, expected none")
    if np.ndim(edit.value) > 1 or not np.isfinite(np.asarray(edit.value)).all():
        raise UserError("edit of features: expected one finite number, or one for each row")
    ranges = edit.ranges
    if ranges.index is None:
        raise UserError("edit of features: which ones? Give `feature`, an index or a slice")
    first = int(np.asarray(ranges.index)[0])
    if first >= coder.features:
        raise UserError(f"edit of feature {first}: expected 0 to {coder.features - 1}")
    acting = ranges.read("layer", coder.covered[-1] + 1)
    layers = [index for index, layer in enumerate(coder.covered) if layer in acting]
    if not layers:
        where = "such layer" if ranges.layer is None else f"layer {int(np.asarray(ranges.layer)[0])}"
        raise UserError(f"edit of feature {first}: the coder has no {where}; it covers {list(coder.covered)}")
    return [(index, feature) for index in layers for feature in ranges.read("index", coder.features)]


def split_segments(edits: Sequence[SiteEdit]) -> list[Segment]:
    """The ranges of positions within which the same edits of one feature act, with their composition."""
    positions = [edit.ranges.read("position", END) for edit in edits]
    ends = sorted({end for one in positions for end in (one.start, one.stop)})
    segments = []
    for start, stop in zip(ends, ends[1:], strict=False):
        acting = [edit for edit, one in zip(edits, positions, strict=True) if one.start <= start and stop <= one.stop]
        if not acting:
            continue
        if sum(isinstance(edit, Set) for edit in acting) > 1:
            raise UserError("edits: two of them set one feature at the same place, expected one")
        multiply, add = np.ones(1), np.zeros(1)
        for edit in acting:
            value = np.atleast_1d(np.asarray(edit.value, np.float64))
            if isinstance(edit, Set):
                multiply, add = 0 * value, value
            elif isinstance(edit, Scale):
                multiply, add = value * multiply, value * add
            else:
                multiply, add = multiply + 0 * value, add + value
        segments.append(Segment(start, stop, multiply, add))
    return segments
