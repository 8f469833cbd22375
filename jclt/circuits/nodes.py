"""Which values of a forward pass are the nodes of a circuit: a basis.

A node is a value at a layer, a position and a unit: one coordinate of a site (a neuron), or a whole vector of it (a
head's output, what an MLP writes). A coder is a basis too: its units are its features, and the last unit of each layer
and position is the error, what the coder does not reconstruct. What features and error write sums to the true value.
"""

from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
import numpy as np

from jclt.coders import Coder
from jclt.errors import UserError
from jclt.models import LAYER_SITES, ModelConfig, check_sites
from jclt.models.sites import SITE_AXES
from jclt.numerics import einsum
from jclt.shapes import Array, Float, Int


@dataclass(frozen=True, eq=False)
class Basis:
    """The nodes of a site, or of a coder that writes there."""

    name: str
    site: str
    whole: bool = False  # whether a vector along the site's last axis is one node
    coder: Coder | None = None

    def __post_init__(self) -> None:
        axes = SITE_AXES.get(self.site, ())
        inside = self.site in LAYER_SITES or self.site.endswith("embedding")
        if not inside or axes[:2] != ("B", "T"):
            wanted = "expected embeddings or a layer's, with axes B T ..."
            raise UserError(f"basis '{self.name}': site '{self.site}', {wanted}")

    @property
    def layered(self) -> bool:
        """Whether it has nodes in each layer; otherwise the axis of layers has one entry."""
        return self.site in LAYER_SITES

    @cached_property
    def covered(self) -> tuple[int, ...]:
        """The model's layers that a coder reads."""
        return () if self.coder is None else self.coder.config.covered

    def list_layers(self, config: ModelConfig) -> tuple[int | None, ...]:
        """The model's layer of each entry of the axis of layers."""
        return self.covered or (tuple(range(config.layers)) if self.layered else (None,))


BASES: dict[str, Basis] = {
    basis.name: basis
    for basis in (
        Basis("embeddings", "token_embedding", whole=True),
        Basis("streams", "resid_pre", whole=True),
        Basis("residual", "resid_post"),
        Basis("attentions", "attn_out", whole=True),
        Basis("attention outputs", "attn_out"),
        Basis("heads", "head_out", whole=True),
        Basis("queries", "queries", whole=True),
        Basis("keys", "keys", whole=True),
        Basis("values", "values", whole=True),
        Basis("neurons", "mlp_neurons"),
        Basis("mlps", "mlp_out", whole=True),
        Basis("mlp outputs", "mlp_out"),
    )
}
"""By name. Of `residual`, `attention outputs`, `neurons` and `mlp outputs` each coordinate is a node; of the others a
whole vector at a position, of each head where there are heads."""


def find_basis(basis: "str | Basis | Coder", config: ModelConfig) -> Basis:
    """A basis by name, or of a coder."""
    if isinstance(basis, str):
        if basis not in BASES:
            raise UserError(f"basis '{basis}': does not exist, expected a coder or one of: {', '.join(BASES)}")
        basis = BASES[basis]
    if not isinstance(basis, Basis):
        coder = basis
        width = coder.config.width
        if width != config.width:
            raise UserError(f"coder: width {width}, expected {config.width}, the model's")
        basis = Basis(coder.config.kind, coder.config.writes, coder=coder)
    check_sites(basis.site, config)
    return basis


def score_units(
    basis: Basis, change: Float[Array, "L P T ..."], gradient: Float[Array, "L P T ..."]
) -> Float[Array, "P L T U"]:
    """change x gradient of each node of a site, from those of its coordinates."""
    product = change * gradient
    scores = product.sum(axis=-1) if basis.whole else product
    return jnp.moveaxis(scores.reshape(*scores.shape[:3], -1), 1, 0)


def encode_reads(coder: Coder, reads: Float[Array, "L P T D"]) -> list[Float[Array, "P T F"]]:
    """The activations of each covered layer."""
    return [coder.encode(index, reads[layer]) for index, layer in enumerate(coder.config.covered)]


def find_errors(
    coder: Coder, activations: list[Float[Array, "P T F"]], reads: Float[Array, "L P T D"], writes: Array
) -> list[Float[Array, "P T D"]]:
    """What the coder does not reconstruct at each covered layer."""
    covered = coder.config.covered
    return [writes[layer] - coder.write(i, activations, reads[layer]) for i, layer in enumerate(covered)]


def score_features(
    coder: Coder,
    activations: Float[Array, "C P T F"],
    errors: Float[Array, "C P T D"],
    gradient: Float[Array, "L P T D"],
) -> Float[Array, "P C T U"]:
    """The same of a coder's features and errors, whose changes are given; the error is the last unit. A feature's
    gradient is that of what it writes to all layers of its reach."""
    covered, scores = coder.config.covered, []
    for index in range(len(covered)):
        rows = coder.decoder_rows(index)
        of_layer = jnp.stack([gradient[covered[index + step]] for step in range(rows.shape[1])])
        read = einsum("rptd,frd->ptf", of_layer, rows.astype(of_layer.dtype))
        error = jnp.sum(errors[index] * gradient[covered[index]], axis=-1, keepdims=True)
        scores.append(jnp.concatenate([activations[index] * read, error], axis=-1))
    return jnp.stack(scores, axis=1)


def locate_nodes(shape: tuple[int, ...], flat: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n 3"]:
    """Layer entry, position and unit of nodes that are numbered through."""
    return np.stack(np.unravel_index(flat, shape), axis=1)
