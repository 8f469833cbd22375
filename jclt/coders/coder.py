"""Sparse coders: one definition for cross-layer transcoders, per-layer transcoders and SAEs.

They differ in one number, a layer's reach: a feature of a cross-layer transcoder writes to its own layer and to all
later ones, one of a per-layer transcoder or an SAE to its own alone. Whatever presents the same methods is a coder too,
such as the model's own neurons (`neurons.py`).
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp

from jclt.coders.activations import jump_relu, top_k
from jclt.coders.config import CoderConfig
from jclt.kernels import matmuls as products
from jclt.kernels import sparse_matmuls as sparse
from jclt.kernels.active import Entries
from jclt.kernels.matmuls import exact, letters, product
from jclt.mesh import AnyMesh, placed, sharding
from jclt.shapes import Array, DTypeLike, Float


@runtime_checkable
class Coder(Protocol):
    """Features that read a layer's input and write to this layer and later ones. Layers are counted among the covered
    ones, `config.layers`."""

    config: CoderConfig

    def encode(self, layer: int, x: Float[Array, "*N D"]) -> Float[Array, "*N F"]:
        """Activations of one layer's features, from what it reads."""
        ...

    def write(
        self, layer: int, activations: Sequence[Float[Array, "*N F"]], x: Float[Array, "*N D"]
    ) -> Float[Array, "*N D"]:
        """What all features up to this layer write to it, with its bias and skip, which reads the layer's own x."""
        ...

    def rows(self, layer: int) -> Float[Array, "F R D"]:
        """What one layer's features write to each layer of their reach, for an activation of one."""
        ...

    def reading(self, layer: int) -> tuple[Float[Array, "F D"], Float[Array, "F"]]:
        """The linear part of `encode`: a feature's pre-activation is its row times x, plus its bias."""
        ...

    def constant(self, layer: int) -> Float[Array, "D"]:
        """What is written to a layer whatever it reads."""
        ...

    def skip(self, layer: int) -> Float[Array, "D D"] | None:
        """What is written to a layer in proportion to what it reads, [output, input]."""
        ...


class CoderLayer(eqx.Module):
    """The features that read one layer; R is their reach."""

    encoder: Float[Array, "F D"]
    encoder_bias: Float[Array, "F"]
    threshold: Float[Array, "F"] | None  # under JumpReLU
    decoder: Float[Array, "F R D"] | None  # none where it is the encoder (tied)
    decoder_bias: Float[Array, "D"]  # of what is written to this layer
    skip: Float[Array, "D D"] | None  # [output, input]

    @property
    def rows(self) -> Float[Array, "F R D"]:
        return self.encoder[:, None] if self.decoder is None else self.decoder

    @property
    def opens_at(self) -> Float[Array, "F"]:
        """The threshold; 0 where the rule knows none."""
        return jnp.zeros_like(self.encoder_bias) if self.threshold is None else self.threshold

    @property
    def norms(self) -> Float[Array, "F"]:
        """The length of each feature's decoder, all its target layers together."""
        return jnp.sqrt(jnp.sum(jnp.square(self.rows.astype(jnp.float32)), axis=(1, 2)) + 1e-12)


class SparseCoder(eqx.Module):
    layers: tuple[CoderLayer, ...]
    config: CoderConfig = eqx.field(static=True)

    def __repr__(self) -> str:
        c = self.config
        where = "no layers yet" if c.layers is None else f"{len(c.layers)} layers"
        rule = f"{c.rule} features{'' if c.k is None else f' (k={c.k})'}"
        return f"<SparseCoder: {c.kind} of '{c.model}', {where} of {c.features} {rule}, {c.reads} to {c.writes}>"

    def preactivation(self, layer: int, x: Float[Array, "*N D"]) -> Float[Array, "*N F"]:
        """In at least float32, of products in the type of x."""
        own = self.layers[layer]
        h = product(f"{letters(x)}d,fd->{letters(x)}f", x, own.encoder)
        return h + own.encoder_bias.astype(h.dtype)[(None,) * (x.ndim - 1)]

    def activate(self, layer: int, h: Float[Array, "*N F"]) -> Float[Array, "*N F"]:
        """The rule at inference."""
        if self.config.activation == "relu":
            return jax.nn.relu(h)
        if self.config.activation == "topk":
            assert self.config.k is not None
            return top_k(h, self.config.k)
        threshold = self.layers[layer].threshold
        assert threshold is not None
        threshold = threshold.astype(h.dtype)[(None,) * (h.ndim - 1)]
        return jump_relu(h, threshold, self.config.bandwidth, self.config.through)

    def encode(self, layer: int, x: Float[Array, "*N D"]) -> Float[Array, "*N F"]:
        """Of the weights as they are: neither they nor x are rounded to the other's type."""
        return self.activate(layer, self.preactivation(layer, exact(x, self.layers[layer].encoder)))

    def write(
        self, layer: int, activations: Sequence[Float[Array, "*N F"]], x: Float[Array, "*N D"]
    ) -> Float[Array, "*N D"]:
        own, n = self.layers[layer], letters(x)
        out = own.decoder_bias.astype(activations[0].dtype)[(None,) * (x.ndim - 1)]
        for source, a in enumerate(activations[: layer + 1]):
            if layer - source < self.config.reach(source):
                rows = self.layers[source].rows[:, layer - source]
                out = out + product(f"{n}f,fd->{n}d", exact(a, rows), rows)
        if own.skip is None:
            return out
        return out + product(f"{n}d,ed->{n}e", exact(x, own.skip), own.skip).astype(out.dtype)

    def rows(self, layer: int) -> Float[Array, "F R D"]:
        return self.layers[layer].rows

    def reading(self, layer: int) -> tuple[Float[Array, "F D"], Float[Array, "F"]]:
        return self.layers[layer].encoder, self.layers[layer].encoder_bias

    def constant(self, layer: int) -> Float[Array, "D"]:
        return self.layers[layer].decoder_bias

    def skip(self, layer: int) -> Float[Array, "D D"] | None:
        return self.layers[layer].skip

    def decode(
        self,
        activations: Sequence[Float[Array, "N F"]] | Sequence[Float[Array, "E"]],
        x: Sequence[Float[Array, "N D"]],
        entries: Sequence[Entries] | None = None,
    ) -> tuple[Float[Array, "N D"], ...]:
        """What is written to every layer: `write` for all at once, as training computes it, split over all devices.
        With entries the activations are those at them, and all others are 0."""

        def whole(own: CoderLayer, x: Array, written: Array) -> Array:
            written = written + own.decoder_bias[None].astype(written.dtype)
            if own.skip is None:
                return written
            return written + product("nd,ed->ne", placed(x, ("batch", None)), own.skip).astype(written.dtype)

        rows = tuple(own.rows for own in self.layers)
        if entries is None:
            written = products.decode(tuple(activations), rows)
        else:
            written = sparse.decode_active(tuple(entries), tuple(activations), rows)
        return tuple(map(whole, self.layers, x, written))


AXES: dict[str, tuple[str | None, ...]] = {
    "encoder": ("features", None),
    "encoder_bias": ("features",),
    "threshold": ("features",),
    "decoder": ("features", None, None),
    "decoder_bias": (None,),
    "skip": (None, None),
}
"""The named axes of each weight, which `sharding.RULES` places."""


def declare(config: CoderConfig, leaf: Callable[[str, tuple[int, ...]], Any]) -> SparseCoder:
    """A coder whose weights are `leaf(name, shape)`: shapes, placements and initial values all come from here."""
    f, d = config.features, config.size

    def layer(index: int) -> CoderLayer:
        return CoderLayer(
            encoder=leaf("encoder", (f, d)),
            encoder_bias=leaf("encoder_bias", (f,)),
            threshold=leaf("threshold", (f,)) if config.activation == "jumprelu" else None,
            decoder=None if config.tied else leaf("decoder", (f, config.reach(index), d)),
            decoder_bias=leaf("decoder_bias", (d,)),
            skip=leaf("skip", (d, d)) if config.skip else None,
        )

    return SparseCoder(tuple(layer(index) for index in range(len(config.covered))), config)


def abstract_coder(config: CoderConfig, mesh: AnyMesh | None = None, dtype: DTypeLike = jnp.float32) -> SparseCoder:
    """The shapes, types and placements of a coder's weights."""

    shapes = jax.eval_shape(lambda: declare(config, lambda _, shape: jnp.zeros(shape, dtype)))

    def leaf(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        placed = sharding(mesh, x.shape, AXES[path[-1].name]) if mesh else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)

    return jax.tree_util.tree_map_with_path(leaf, shapes)
