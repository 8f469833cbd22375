"""The replacement model: the same transformer with what a coder writes in place of what it computed itself."""

from jclt.coders.coder import Coder, SparseCoder
from jclt.coders.writing import Writing
from jclt.mesh import placed
from jclt.models import Edit
from jclt.shapes import Array, Layer


def replacing(coder: Coder, *, trained: bool = False) -> Edit:
    """An edit for one forward pass with unrolled layers: at every position what the coder writes replaces the model's
    own value there; attention stays free and no error is added back. Where the coder is `trained` through the pass it
    has gradients, at the price of dense products, and computes in the type of what it reads.

    It remembers the activations of the pass it stands in, so each pass needs one of its own.
    """
    config = coder.config
    writing = Writing(coder, densely=trained)
    reads: list[Array] = []

    def edit(site: str, layer: Layer, value: Array) -> Array:
        index = config.index(layer)
        if index is None:
            return value
        if site == config.reads:
            # The model's tokens are split over every chip, the coder's over the data shards alone.
            reads.append(placed(value, ("tokens", None, None)))
            if trained and isinstance(coder, SparseCoder):
                writing.add(index, coder.activate(index, coder.preactivation(index, reads[-1])))
            else:
                writing.add(index, coder.encode(index, reads[-1]))
        if site == config.writes:
            written = writing.to(index, reads[-1])
            return placed(written, ("batch", None, None)).astype(value.dtype)
        return value

    return edit
