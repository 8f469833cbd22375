"""Sparse coders: one definition for cross-layer transcoders, per-layer transcoders and SAEs.

They differ in one number, the reach of a layer's features. A feature of a cross-layer transcoder writes to its layer
and to all later ones; a feature of a per-layer transcoder or an SAE writes to its layer alone. Any class with the
methods of `Coder` is a coder too, such as a model's MLP neurons (`neurons.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp

from jclt.coders.activations import jump_relu, top_k
from jclt.coders.config import CoderConfig
from jclt.kernels.active import ActivePairs
from jclt.kernels.matmuls import apply_weight, decode, token_letters, widen_for_product
from jclt.kernels.sparse_matmuls import decode_active
from jclt.kernels.take_rows import take_rows
from jclt.mesh import AnyMesh, make_sharding, shard_by_axes
from jclt.shapes import Array, ArrayLike, DTypeLike, Float, Int


@runtime_checkable
class Coder(Protocol):
    """Features that read the input of a layer and write to this layer and later ones.

    `layer` is an index into the covered layers, `config.layers`.
    """

    config: CoderConfig

    def encode(self, layer: int, x: Float[Array, "*N D"]) -> Float[Array, "*N F"]:
        """The activations of one layer's features on the layer's input x."""
        ...

    def write(
        self, layer: int, activations: Sequence[Float[Array, "*N F"]], x: Float[Array, "*N D"]
    ) -> Float[Array, "*N D"]:
        """The output at a layer: what all features up to this layer write to it, plus its bias and the skip of x."""
        ...

    def encoder(self, layer: int) -> tuple[Float[Array, "F D"], Float[Array, "F"]]:
        """Rows and biases of the linear part of `encode`: a pre-activation is the feature's row times x, plus bias."""
        ...

    def decoder_rows(self, layer: int) -> Float[Array, "F R D"]:
        """For each feature of one layer the vectors that it writes to the R layers of its reach at activation 1."""
        ...

    def load_encoder(self, layer: int) -> "Coder":
        """A coder of this layer alone that only encodes: its `encode(0, x)` is `encode(layer, x)`. Its weights are in
        the memory of devices, wherever those of the coder lie."""
        ...

    def take_decoder_rows(self, layer: int, features: Int[ArrayLike, "*B n"]) -> Float[Array, "*B n R D"]:
        """The rows of `decoder_rows` of these features of one layer, read from wherever they lie. Where the coder is
        split over devices, several lists are shared out among them, and `NO_ROW` fills them up (`take_rows`)."""
        ...

    def decoder_bias(self, layer: int) -> Float[Array, "D"]:
        """The constant part of the output at a layer."""
        ...

    def skip(self, layer: int) -> Float[Array, "D D"] | None:
        """The linear map [output, input] from a layer's input to its output, if the coder has one."""
        ...


def write_by_rows(
    coder: Coder, layer: int, activations: Sequence[Float[Array, "*N F"]], x: Float[Array, "*N D"]
) -> Float[Array, "*N D"]:
    """`Coder.write`, by the coder's decoder rows, bias and skip."""
    n = token_letters(x)
    output = coder.decoder_bias(layer).astype(activations[0].dtype)[(None,) * (x.ndim - 1)]
    for source, a in enumerate(activations[: layer + 1]):
        if layer - source < coder.config.reach(source):
            rows = coder.decoder_rows(source)[:, layer - source]
            output = output + apply_weight(f"{n}f,fd->{n}d", widen_for_product(a, rows), rows)
    skip = coder.skip(layer)
    if skip is None:
        return output
    skipped = apply_weight(f"{n}d,ed->{n}e", widen_for_product(x, skip), skip)
    return output + skipped.astype(output.dtype)


class CoderLayer(eqx.Module):
    """The weights of the features that read one layer. R is their reach: the number of layers that they write to."""

    encoder: Float[Array, "F D"]
    encoder_bias: Float[Array, "F"]
    threshold: Float[Array, "F"] | None  # under JumpReLU
    decoder: Float[Array, "F R D"] | None  # None if tied: the decoder is the encoder
    decoder_bias: Float[Array, "D"]  # of the output at this layer
    skip: Float[Array, "D D"] | None  # [output, input]

    @property
    def decoder_rows(self) -> Float[Array, "F R D"]:
        """The decoder, also where it is tied to the encoder."""
        return self.encoder[:, None] if self.decoder is None else self.decoder

    @property
    def threshold_or_zero(self) -> Float[Array, "F"]:
        """The threshold; 0 under rules that have none."""
        return jnp.zeros_like(self.encoder_bias) if self.threshold is None else self.threshold

    @property
    def norms(self) -> Float[Array, "F"]:
        """The norm of each feature's decoder, over all its target layers together."""
        return jnp.sqrt(jnp.sum(jnp.square(self.decoder_rows.astype(jnp.float32)), axis=(1, 2)) + 1e-12)


class SparseCoder(eqx.Module):
    """A cross-layer transcoder, per-layer transcoder or SAE."""

    layers: tuple[CoderLayer, ...]
    config: CoderConfig = eqx.field(static=True)

    def __repr__(self) -> str:
        c = self.config
        layers = "no layers yet" if c.layers is None else f"{len(c.layers)} layers"
        rule = f"{c.rule} features{'' if c.k is None else f' (k={c.k})'}"
        return f"<SparseCoder: {c.kind} of '{c.model}', {layers} of {c.features} {rule}, {c.reads} to {c.writes}>"

    def compute_preactivation(self, layer: int, x: Float[Array, "*N D"]) -> Float[Array, "*N F"]:
        """Computed in the type of x, summed in at least float32."""
        weights = self.layers[layer]
        h = apply_weight(f"{token_letters(x)}d,fd->{token_letters(x)}f", x, weights.encoder)
        return h + weights.encoder_bias.astype(h.dtype)[(None,) * (x.ndim - 1)]

    def activate(self, layer: int, h: Float[Array, "*N F"]) -> Float[Array, "*N F"]:
        """Activations from pre-activations, by the rule at inference."""
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
        """Activations at inference: neither x nor the weights are rounded to the other's type."""
        return self.activate(layer, self.compute_preactivation(layer, widen_for_product(x, self.layers[layer].encoder)))

    def write(
        self, layer: int, activations: Sequence[Float[Array, "*N F"]], x: Float[Array, "*N D"]
    ) -> Float[Array, "*N D"]:
        return write_by_rows(self, layer, activations, x)

    def encoder(self, layer: int) -> tuple[Float[Array, "F D"], Float[Array, "F"]]:
        return self.layers[layer].encoder, self.layers[layer].encoder_bias

    def load_encoder(self, layer: int) -> "SparseCoder":
        return SparseCoder((replace(self.layers[layer], decoder=None),), self.config.keep_one_layer())

    def decoder_rows(self, layer: int) -> Float[Array, "F R D"]:
        return self.layers[layer].decoder_rows

    def take_decoder_rows(self, layer: int, features: Int[ArrayLike, "*B n"]) -> Float[Array, "*B n R D"]:
        return take_rows(self.layers[layer].decoder_rows, features)

    def decoder_bias(self, layer: int) -> Float[Array, "D"]:
        return self.layers[layer].decoder_bias

    def skip(self, layer: int) -> Float[Array, "D D"] | None:
        return self.layers[layer].skip

    def decode(
        self,
        activations: Sequence[Float[Array, "N F"]] | Sequence[Float[Array, "E"]],
        x: Sequence[Float[Array, "N D"]],
        active_pairs: Sequence[ActivePairs] | None = None,
    ) -> tuple[Float[Array, "N D"], ...]:
        """The outputs at all layers, as training computes them: `write` for all layers at once, split over all devices.

        With `active_pairs`, one for each layer, `activations` are the values at these pairs, and all others are 0.
        """

        def add_bias_and_skip(weights: CoderLayer, x: Array, sums: Array) -> Array:
            output = sums + weights.decoder_bias[None].astype(sums.dtype)
            if weights.skip is None:
                return output
            return output + apply_weight("nd,ed->ne", shard_by_axes(x, ("batch", None)), weights.skip).astype(
                output.dtype
            )

        decoders = tuple(layer.decoder_rows for layer in self.layers)
        if active_pairs is None:
            sums = decode(tuple(activations), decoders)
        else:
            sums = decode_active(tuple(active_pairs), tuple(activations), decoders)
        return tuple(map(add_bias_and_skip, self.layers, x, sums))


AXES: dict[str, tuple[str | None, ...]] = {
    "encoder": ("features", None),
    "encoder_bias": ("features",),
    "threshold": ("features",),
    "decoder": ("features", None, None),
    "decoder_bias": (None,),
    "skip": (None, None),
}
"""The logical axes of each weight (see `mesh.LOGICAL_AXES`)."""


def declare_coder(config: CoderConfig, leaf: Callable[[str, tuple[int, ...]], Any]) -> SparseCoder:
    """A coder whose weights are `leaf(name, shape)`: the one declaration of its weights and their shapes."""
    f, d = config.features, config.size

    def declare_layer(index: int) -> CoderLayer:
        return CoderLayer(
            encoder=leaf("encoder", (f, d)),
            encoder_bias=leaf("encoder_bias", (f,)),
            threshold=leaf("threshold", (f,)) if config.activation == "jumprelu" else None,
            decoder=None if config.tied else leaf("decoder", (f, config.reach(index), d)),
            decoder_bias=leaf("decoder_bias", (d,)),
            skip=leaf("skip", (d, d)) if config.skip else None,
        )

    return SparseCoder(tuple(declare_layer(index) for index in range(len(config.covered))), config)


def abstract_coder(config: CoderConfig, mesh: AnyMesh | None = None, dtype: DTypeLike = jnp.float32) -> SparseCoder:
    """A coder that holds the shapes, types and shardings of its weights in place of their values."""
    shapes = jax.eval_shape(lambda: declare_coder(config, lambda _, shape: jnp.zeros(shape, dtype)))

    def leaf(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = make_sharding(mesh, x.shape, AXES[path[-1].name]) if mesh else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(leaf, shapes)
