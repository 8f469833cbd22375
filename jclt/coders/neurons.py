"""The neuron basis: the MLP neurons of a model as the features of a coder without error."""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp

from jclt.coders.config import CoderConfig
from jclt.errors import UserError
from jclt.kernels.matmuls import token_letters, widen_for_product
from jclt.kernels.take_rows import take_rows
from jclt.mesh import replicate
from jclt.models import Model
from jclt.models.config import ModelConfig
from jclt.models.ops import ACTIVATIONS
from jclt.numerics import einsum
from jclt.shapes import Array, ArrayLike, Float, Int, Params

WEIGHTS = ("up", "up_bias", "gate", "gate_bias", "down", "down_bias")


class Neurons(eqx.Module):
    """A neuron reads the input of the MLP and writes one direction, its row of the down projection."""

    params: Params  # stacked over layers, as in the model
    model: ModelConfig = eqx.field(static=True)
    config: CoderConfig = eqx.field(static=True)
    threshold: float = eqx.field(static=True, default=0.0)
    """Neurons whose activation is not larger in size are set to 0; what they write is then error."""

    def _project(self, name: str, layer: int, x: Array) -> Array:
        """One of the MLP's projections of x, in the wider type of x and the weights."""
        n, weight = token_letters(x), self.params[name][layer]
        x = widen_for_product(x, weight)
        projected = einsum(f"{n}d,de->{n}e", x, weight.astype(x.dtype)).astype(x.dtype)
        bias = self.params.get(f"{name}_bias")
        return projected if bias is None else projected + bias[layer].astype(x.dtype)[(None,) * (x.ndim - 1)]

    def _take(self, name: str, layer: int) -> Array:
        """One layer's weight; of a model that is split over a mesh, all of it on every device."""
        return replicate(self.params[name][layer])

    def encode(self, layer: int, x: Float[Array, "*N D"]) -> Float[Array, "*N F"]:
        act, up = ACTIVATIONS[self.model.activation], self._project("up", layer, x)
        a = act(self._project("gate", layer, x)) * up if self.model.gated else act(up)
        return jnp.where(jnp.abs(a) > self.threshold, a, jnp.zeros_like(a)) if self.threshold else a

    def write(
        self, layer: int, activations: Sequence[Float[Array, "*N F"]], x: Float[Array, "*N D"]
    ) -> Float[Array, "*N D"]:
        return self._project("down", layer, activations[layer])

    def load_encoder(self, layer: int) -> "Neurons":
        params = {name: self._take(name, layer)[None] for name in WEIGHTS[:4] if name in self.params}
        return Neurons(params, self.model, self.config.keep_one_layer(), self.threshold)

    def decoder_rows(self, layer: int) -> Float[Array, "F R D"]:
        return self._take("down", layer)[:, None]

    def take_decoder_rows(self, layer: int, features: Int[ArrayLike, "*B n"]) -> Float[Array, "*B n R D"]:
        return take_rows(self.decoder_rows(layer), features)

    def encoder(self, layer: int) -> tuple[Float[Array, "F D"], Float[Array, "F"]]:
        """For gated neurons the factor that the gate multiplies; the gate is constant, like norms' denominators."""
        up = self.params["up"][layer].T
        bias = self.params.get("up_bias")
        return up, jnp.zeros(up.shape[:1], up.dtype) if bias is None else bias[layer]

    def decoder_bias(self, layer: int) -> Float[Array, "D"]:
        if "down_bias" not in self.params:
            return jnp.zeros(self.model.width, self.params["down"].dtype)
        return self._take("down_bias", layer)

    def skip(self, layer: int) -> None:
        return None


def neurons(model: Model, threshold: float = 0.0) -> Neurons:
    """The MLP neurons of a model as a coder from `mlp_in` to `mlp_raw_out`. Its weights are the model's. With a
    threshold only larger activations are features."""
    config = CoderConfig(
        kind="neurons",
        features=model.config.mlp_width,
        activation="relu",
        reads="mlp_in",
        writes="mlp_raw_out",
    ).fit_to_model(model.config, model.name)
    params = {name: model.params[name] for name in WEIGHTS if name in model.params}
    return Neurons(params, model.config, config, threshold)


def load_neurons(model: Model | None, **others: object) -> Neurons:
    """What `load_coder("neurons", model=model)` gives; an error of one line if it was also told how to read files."""
    if model is None:
        raise UserError("coder 'neurons': expected model=, the model whose neurons they are")
    for name, given in others.items():
        if given is not None:
            given = f"'{given}'" if isinstance(given, str) else "a mesh"
            raise UserError(f"coder 'neurons': {name}={given}, expected none: they are the model's own weights")
    return neurons(model)
