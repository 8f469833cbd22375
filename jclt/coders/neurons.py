"""The neuron basis: a model's own MLP neurons as the features of a coder that makes no error."""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp

from jclt.coders.config import CoderConfig
from jclt.kernels.matmuls import exact, letters
from jclt.models import Model
from jclt.models.config import ModelConfig
from jclt.models.ops import ACTIVATIONS, contract
from jclt.shapes import Array, Float, Params

NAMES = ("up", "up_bias", "gate", "gate_bias", "down", "down_bias")


class Neurons(eqx.Module):
    """Every neuron reads the MLP's input and writes one direction, its row of the down projection."""

    params: Params  # stacked over layers, as the model has them
    model: ModelConfig = eqx.field(static=True)
    config: CoderConfig = eqx.field(static=True)

    def _project(self, name: str, layer: int, x: Array) -> Array:
        """In the type of x, or a wider one of the weights."""
        n, weight = letters(x), self.params[name][layer]
        x = exact(x, weight)
        out = contract(f"{n}d,de->{n}e", x, weight.astype(x.dtype)).astype(x.dtype)
        bias = self.params.get(f"{name}_bias")
        return out if bias is None else out + bias[layer].astype(x.dtype)[(None,) * (x.ndim - 1)]

    def encode(self, layer: int, x: Float[Array, "*N D"]) -> Float[Array, "*N F"]:
        act, up = ACTIVATIONS[self.model.activation], self._project("up", layer, x)
        return act(self._project("gate", layer, x)) * up if self.model.gated else act(up)

    def write(
        self, layer: int, activations: Sequence[Float[Array, "*N F"]], x: Float[Array, "*N D"]
    ) -> Float[Array, "*N D"]:
        return self._project("down", layer, activations[layer])

    def rows(self, layer: int) -> Float[Array, "F R D"]:
        return self.params["down"][layer][:, None]

    def reading(self, layer: int) -> tuple[Float[Array, "F D"], Float[Array, "F"]]:
        """Of a gated neuron the factor that its gate multiplies: the gate is held, like a norm's denominator."""
        up = self.params["up"][layer].T
        bias = self.params.get("up_bias")
        return up, jnp.zeros(up.shape[:1], up.dtype) if bias is None else bias[layer]

    def constant(self, layer: int) -> Float[Array, "D"]:
        bias = self.params.get("down_bias")
        return jnp.zeros_like(self.params["down"][layer, 0]) if bias is None else bias[layer]

    def skip(self, layer: int) -> None:
        return None


def neurons(model: Model) -> Neurons:
    """The neurons of a model as a coder: `mlp_in` to `mlp_raw_out`."""
    config = CoderConfig(
        kind="neurons",
        features=model.config.mlp_width,
        activation="relu",
        reads="mlp_in",
        writes="mlp_raw_out",
    ).fitted(model.config, model.name)
    return Neurons({name: model.params[name] for name in NAMES if name in model.params}, model.config, config)
