"""The replacement model: the same transformer, in which the coder's output replaces what each covered layer wrote."""

from typing import Any

import equinox as eqx

from jclt.coders.coder import Coder, SparseCoder
from jclt.coders.decoder_sums import DecoderSums
from jclt.mesh import shard_by_axes
from jclt.models import Place
from jclt.models.ranges import Ranges, select
from jclt.shapes import Array


class CoderReplacement(eqx.Module):
    """The edit that makes a forward pass with unrolled layers the replacement model.

    From the coder's `first_position` on its output replaces what the covered layers write; attention is free, no error
    is added. If `trained`, the coder receives gradients; its products are then dense, in the type of what it reads.
    """

    coder: Coder
    trained: bool = eqx.field(static=True)
    current_pass: dict[str, Any]
    """State of the pass that is being traced, from the first covered layer to the last; empty between passes."""

    def __init__(self, coder: Coder, *, trained: bool = False):
        self.coder, self.trained, self.current_pass = coder, trained, {}

    def __call__(self, place: Place, value: Array) -> Array:
        config, state = self.coder.config, self.current_pass
        index = config.index(place.layer)
        if index is None:
            return value
        if place.site == config.reads:
            if index == 0:
                state["decoder_sums"] = DecoderSums(self.coder, dense=self.trained)
            # The model's tokens are split over all devices, the coder's over the data axis alone.
            state["read"] = shard_by_axes(value, ("tokens", None, None))
            state["decoder_sums"].add(index, self._encode(index, state["read"]))
        if place.site == config.writes:
            output = state["decoder_sums"].output(index, state["read"])
            if index == len(config.covered) - 1:
                state.clear()
            output = shard_by_axes(output, ("batch", None, None)).astype(value.dtype)
            if config.first_position:
                output = select(Ranges(position=slice(config.first_position, None)).find(place, value), output, value)
            return output
        return value

    def _encode(self, index: int, x: Array) -> Array:
        if self.trained and isinstance(self.coder, SparseCoder):
            return self.coder.activate(index, self.coder.compute_preactivation(index, x))
        return self.coder.encode(index, x)
