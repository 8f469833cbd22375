"""A sparse coder whose weights stay on disk or in the host's memory, and are on a device while they are used.

Encoders are streamed, one layer at a time. Of decoders only the rows of active features are read.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, NoReturn, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jclt.coders.coder import Coder, CoderLayer, SparseCoder, write_by_rows
from jclt.coders.config import CoderConfig
from jclt.errors import UserError
from jclt.fingerprints import fingerprint, hash_json, sum_blocks
from jclt.models.ops import find_finite_rows
from jclt.shapes import Array, ArrayLike, DTypeLike, Float, Int

BLOCK_BYTES = 1 << 26
"""The most bytes of a weight that are on the device at once while all of them are looked at."""


@runtime_checkable
class Source(Protocol):
    """Where one layer's weights come from."""

    def read(self, weight: str, dtype: DTypeLike, rows: Any = ...) -> np.ndarray:
        """A copy of a weight, or of some rows."""
        ...

    def report_not_finite(self, weight: str, dtype: DTypeLike) -> UserError: ...


class HostLayer(NamedTuple):
    """A layer's weights in the host's memory, read from `source`."""

    weights: Mapping[str, np.ndarray]
    source: Source

    def read(self, weight: str, dtype: DTypeLike, rows: Any = ...) -> np.ndarray:
        return self.weights[weight][rows].astype(dtype, copy=False)

    def report_not_finite(self, weight: str, dtype: DTypeLike) -> UserError:
        return self.source.report_not_finite(weight, dtype)


class StreamedCoder:
    """The coder of the settings and weights that `declared` gives as shapes and types; `sources` hold their values."""

    def __init__(self, declared: SparseCoder, sources: Sequence[Source], kept: Literal["disk", "host"]):
        self.declared, self.sources, self.kept = declared, tuple(sources), kept
        self.config: CoderConfig = declared.config

    def __repr__(self) -> str:
        return repr(self.declared).replace("SparseCoder", f"StreamedCoder on {self.kept}")

    def load_encoder(self, layer: int) -> SparseCoder:
        weights = CoderLayer(
            encoder=jnp.asarray(self._read(layer, "encoder")),
            encoder_bias=jnp.asarray(self._read(layer, "encoder_bias")),
            threshold=jnp.asarray(self._read(layer, "threshold")) if self._declare(layer, "threshold") else None,
            decoder=None,
            decoder_bias=self.decoder_bias(layer),
            skip=None,
        )
        return SparseCoder((weights,), self.config.keep_one_layer())

    def take_decoder_rows(self, layer: int, features: Int[ArrayLike, "*B n"]) -> Float[Array, "*B n R D"]:
        """Each row is read once, however many of the features are the same."""
        rows, places = np.unique(np.maximum(features, 0), return_inverse=True)
        return jnp.asarray(self._read_decoder(layer, rows)[places.reshape(np.shape(features))])

    def encode(self, layer: int, x: Float[Array, "*N D"]) -> Float[Array, "*N F"]:
        return self.load_encoder(layer).encode(0, x)

    def write(
        self, layer: int, activations: Sequence[Float[Array, "*N F"]], x: Float[Array, "*N D"]
    ) -> Float[Array, "*N D"]:
        return write_by_rows(self, layer, activations, x)

    def encoder(self, layer: int) -> tuple[Float[Array, "F D"], Float[Array, "F"]]:
        return self.load_encoder(layer).encoder(0)

    def decoder_rows(self, layer: int) -> Float[Array, "F R D"]:
        return jnp.asarray(self._read_decoder(layer))

    def decoder_bias(self, layer: int) -> Float[Array, "D"]:
        return jnp.asarray(self._read(layer, "decoder_bias"))

    def skip(self, layer: int) -> Float[Array, "D D"] | None:
        return jnp.asarray(self._read(layer, "skip")) if self.config.skip else None

    @cached_property
    def fingerprint(self) -> str:
        """That of the same coder in memory. All weights are read for it, once, and must be finite."""
        described = {}
        for path, leaf in jax.tree.leaves_with_path(self.declared):
            name, layer, weight = jax.tree_util.keystr(path, simple=True, separator="."), path[1].idx, path[-1].name
            described[name] = [list(leaf.shape), sum_blocks(self._read_blocks(layer, weight, leaf))]
        return hash_json(described)

    def _read_blocks(self, layer: int, weight: str, leaf: Any) -> Iterator[Array]:
        """A weight in blocks of rows, each looked at for numbers that are not finite."""
        rows = max(1, BLOCK_BYTES * leaf.shape[0] // max(leaf.size * leaf.dtype.itemsize, 1))
        for start in range(0, leaf.shape[0], rows):
            block = jnp.asarray(self._read(layer, weight, slice(start, start + rows)))
            if not find_finite_rows(block).all():
                raise self.sources[layer].report_not_finite(weight, leaf.dtype)
            yield block

    def _declare(self, layer: int, weight: str) -> Any:
        return getattr(self.declared.layers[layer], weight)

    def _read(self, layer: int, weight: str, rows: Any = ...) -> np.ndarray:
        return self.sources[layer].read(weight, self._declare(layer, weight).dtype, rows)

    def _read_decoder(self, layer: int, rows: Any = ...) -> Float[np.ndarray, "n R D"]:
        return self._read(layer, "encoder", rows)[:, None] if self.config.tied else self._read(layer, "decoder", rows)


def load_on_host(declared: SparseCoder, sources: Sequence[Source]) -> StreamedCoder:
    """The coder with its weights in the host's memory."""
    layers = []
    for source, weights in zip(sources, declared.layers, strict=True):
        leaves = {name: leaf for name, leaf in vars(weights).items() if leaf is not None}
        layers.append(HostLayer({name: source.read(name, leaf.dtype) for name, leaf in leaves.items()}, source))
    return StreamedCoder(declared, layers, "host")


def read_fingerprint(coder: Coder) -> str:
    """The fingerprint of a coder, wherever its weights lie."""
    return coder.fingerprint if isinstance(coder, StreamedCoder) else fingerprint(coder)


def _refuse(coder: StreamedCoder) -> NoReturn:
    expected = f"expected keep='device' or a mesh: from {coder.kept} only graphs can be made"
    raise UserError(f"coder: its weights stay on {coder.kept}, {expected}")


def _rebuild(_: Any, __: Any) -> StreamedCoder:
    raise AssertionError("a streamed coder has no leaves")


# Programs that take a coder among their arguments need all of its weights in the devices' memory.
jax.tree_util.register_pytree_node(StreamedCoder, _refuse, _rebuild)
