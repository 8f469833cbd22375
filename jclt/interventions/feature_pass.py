"""A forward pass in which features are changed. What MLPs write at a covered layer l (0 marks original values):

    model         out(l) = MLP(l) + sum of c(s) W(s, l)                      c(s) = edited a(s) - a(s)
    replacement   out(l) = out0(l) + sum of c(s) W(s, l) + skips + de(l)     c(s) = edited a(s) - a0(s)
    clamped       out(l) = out0(l) + sum of c(s) W(s, l) + skips + de(l)     c(s) = edited a0(s) - a0(s)

The sums run over covered layers s <= l; W(s, l) is the decoder from s to l, a(s) are the activations that the coder
computes in this pass, and `skips` what the coder's affine skip makes of the change of its input. MLP(l) is the model's
own MLP on its input in this pass, and de(l) the edited error minus the original one: -e0(l) where errors are dropped.

- `model`: the model reacts; only the edited features are written, each on top of what the MLPs write.
- `replacement`: the features stand in for the MLPs, with the coder's errors held constant. All features react. What a
  layer without features writes is all error; where errors are dropped, such a layer keeps the model's own MLP.
- `clamped`: in the clamped layers nothing reacts except through attention and skips. In later layers the model reacts,
  and no feature is written there: an edited feature writes to clamped layers alone.
"""

from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax.numpy as jnp

from jclt.coders import Coder
from jclt.coders.decoder_sums import choose_capacity, decode_layer
from jclt.interventions.changes import Changes
from jclt.kernels.matmuls import apply_weight, sharded_einsum, token_letters, widen_for_product
from jclt.mesh import shard_by_axes
from jclt.models import Edit, Place, SiteEdit
from jclt.models.ranges import Ranges, select
from jclt.numerics import einsum
from jclt.shapes import Array, Float

Writing = Literal["model", "replacement", "clamped"]
"""Which of the three formulas at the head of this file holds."""


class Original(NamedTuple):
    """The original pass, at the coder's sites. Its batch axis may be 1, for all rows."""

    reads: Float[Array, "L B T D"]
    writes: Float[Array, "L B T D"]
    errors: Float[Array, "L B T D"]  # writes minus the coder's output; in layers that it does not cover, all of them
    activations: Float[Array, "C B T F"]
    preactivations: Float[Array, "C B T F"]


class FeaturePass(eqx.Module):
    """The edit that changes features and sites, for a pass with unrolled layers. The coder reads what the edits of
    sites make of its input, and these edits act on what features write."""

    coder: Coder
    changes: Changes
    original: Original | None  # None: for `model`, which needs none
    error_edits: tuple[SiteEdit, ...]  # of the site "errors"
    site_edits: tuple[Edit, ...]
    writing: Writing = eqx.field(static=True)
    clamped: tuple[int, ...] = eqx.field(static=True)  # layers of the model
    keeps_errors: bool = eqx.field(static=True)
    records: bool = eqx.field(static=True)  # whether `take_features` is called after the pass
    current_pass: dict[str, Any]
    """State of the pass that is being traced; empty between passes."""

    def __call__(self, place: Place, value: Array) -> Array:
        config = self.coder.config
        index = config.index(place.layer)
        if place.site == config.writes and isinstance(place.layer, int):
            value = self._write(index, place.layer, place, value)
        for edit in self.site_edits:
            value = edit(place, value)
        if place.site == config.reads and index is not None:
            self._read(index, place, value)
        return value

    def take_features(self) -> tuple[list[Array], list[Array]]:
        """The activations, after edits, and pre-activations of the pass that has just been traced; forgets the pass."""
        seen = self.current_pass["activations"], self.current_pass["preactivations"]
        self.current_pass.clear()
        return seen

    def _read(self, index: int, place: Place, x: Array) -> None:
        """Encodes what the coder reads, and adds up what the changes of its features write."""
        state, coder, features = self.current_pass, self.coder, self.changes.features[index]
        if index == 0:
            state.update(sums={}, activations=[], preactivations=[])
        state["read"] = x
        read = shard_by_axes(x, ("tokens", None, None))
        a = coder.encode(index, read)
        positions = jnp.arange(x.shape[1])[None] if place.positions is None else place.positions
        original = None if self.original is None else self.original.activations[index].astype(a.dtype)
        here = a[..., features]
        reference = here if original is None else jnp.broadcast_to(original, a.shape)[..., features]
        new = self.changes.change(index, positions, reference, here)
        edited = a.at[..., features].add(new - here)  # padding adds 0
        if self.writing == "replacement":
            assert original is not None
            written = decode_dense(coder, index, edited - original)
        elif self.writing == "model" or coder.config.covered[index] in self.clamped:
            known = jnp.where(self.changes.find(index, positions), new - reference, 0)
            rows = coder.decoder_rows(index)[features].astype(a.dtype)
            written = einsum("btm,mrd->btrd", known, rows)
        else:
            written = jnp.zeros((*a.shape[:-1], 0, x.shape[-1]), a.dtype)
        for step in range(written.shape[-2]):
            target, to_target = index + step, written[..., step, :]
            state["sums"][target] = state["sums"].get(target, 0) + to_target
        if self.records:
            state["activations"].append(edited)
            state["preactivations"].append(compute_preactivations(coder, index, read))

    def _write(self, index: int | None, layer: int, place: Place, value: Array) -> Array:
        """What the MLP of a layer writes; `index` is None where the coder does not cover it."""
        sums, read = self._take_sums(index)
        if self.writing == "model":
            return (value + sums).astype(value.dtype)
        is_own = index is None and not self.keeps_errors if self.writing == "replacement" else layer not in self.clamped
        if is_own:
            return value
        original = self.original
        assert original is not None
        out = original.writes[layer] + sums
        skip = None if index is None else self.coder.skip(index)
        if skip is not None and read is not None:
            moved = read - original.reads[layer].astype(read.dtype)
            out = out + apply_weight(f"{token_letters(moved)}d,ed->{token_letters(moved)}e", *_widen(moved, skip))
        error = original.errors[layer]
        kept = error if self.keeps_errors else jnp.zeros_like(error)
        if (first := self.coder.config.first_position) and not self.keeps_errors:
            start = Ranges(position=slice(first, None)).find(place, value)
            kept = select(start, kept, jnp.broadcast_to(error, value.shape))  # before, the model's writes stay
        for edit in self.error_edits:
            kept = edit(Place("errors", layer, place.positions), kept)
        return jnp.broadcast_to(out + (kept - error), value.shape).astype(value.dtype)

    def _take_sums(self, index: int | None) -> tuple[Array | int, Array | None]:
        """What features write to a covered layer, and what the coder read there."""
        state = self.current_pass
        if index is None:
            return 0, None
        sums, read = state["sums"].pop(index, 0), state["read"]
        if index == len(self.coder.config.covered) - 1 and not self.records:
            state.clear()
        return sums, read


def _widen(x: Array, weight: Array) -> tuple[Array, Array]:
    return widen_for_product(x, weight), weight


def compute_preactivations(coder: Coder, index: int, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
    """What the linear part of the encoder computes, in the wider type of x and the weights."""
    rows, bias = coder.encoder(index)
    h = apply_weight("btd,fd->btf", *_widen(x, rows))
    return h + bias.astype(h.dtype)[None, None]


def decode_dense(coder: Coder, index: int, activations: Float[Array, "B T F"]) -> Float[Array, "B T R D"]:
    """What one layer's features write to each layer of their reach."""
    rows, capacity = coder.decoder_rows(index), choose_capacity(coder)
    if capacity:
        return decode_layer(rows, activations, capacity)
    return sharded_einsum("btf,frd->btrd", widen_for_product(activations, rows), rows)


def read_original(coder: Coder, reads: Float[Array, "L B T D"], writes: Float[Array, "L B T D"]) -> Original:
    """The coder on the original pass."""
    activations, preactivations, errors = [], [], writes
    for index, layer in enumerate(coder.config.covered):
        read = shard_by_axes(reads[layer], ("tokens", None, None))
        activations.append(coder.encode(index, read))
        preactivations.append(compute_preactivations(coder, index, read))
        errors = errors.at[layer].add(-coder.write(index, activations, read).astype(errors.dtype))
    return Original(reads, writes, errors, jnp.stack(activations), jnp.stack(preactivations))
