"""The settings of a sparse coder: its kind, its size, the sites that it reads and writes, and its activation."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from jclt.coders.activations import GradientTo
from jclt.errors import UserError
from jclt.models import ModelConfig, check_sites
from jclt.shapes import Layer

Kind = Literal["clt", "transcoder", "sae", "neurons"]
Activation = Literal["relu", "jumprelu", "topk", "batchtopk"]


@dataclass(frozen=True)
class CoderConfig:
    """Settings of a coder. `layers` and `width` are None until they are known from the model (`fit_to_model`)."""

    kind: Kind = "clt"
    features: int = 1024  # in each layer
    activation: Activation = "jumprelu"
    k: int | None = None  # active features per token: topk, in each layer; batchtopk, in all layers together on average
    reads: str = "mlp_in"  # the site of the input
    writes: str = "mlp_out"  # the site of the output
    bandwidth: float = 1.0  # of JumpReLU's straight-through gradient (Circuit Tracing 2025)
    through: GradientTo = "all"  # the arguments that receive that gradient (Circuit Tracing 2025)
    skip: bool = False  # a linear map from input to output of each layer, beside the features
    tied: bool = False  # the decoder is the encoder (SAEs)
    first_position: int = 0  # positions of a text before this one stay the model's own; 1 leaves out an attention sink
    layers: tuple[int, ...] | None = None  # the covered layers of the model, in order
    width: int | None = None
    model: str = ""
    model_fingerprint: str = ""  # of the model's weights (`jclt.fingerprints`); empty if not known

    @property
    def rule(self) -> Literal["relu", "jumprelu", "topk"]:
        """The activation at inference: BatchTopK becomes a JumpReLU with a fixed threshold."""
        return "jumprelu" if self.activation == "batchtopk" else self.activation

    @property
    def dense(self) -> bool:
        """Whether nearly all features are active on every token, so that a graph must choose its nodes."""
        return self.kind == "neurons"

    @property
    def covered(self) -> tuple[int, ...]:
        assert self.layers is not None
        return self.layers

    @property
    def size(self) -> int:
        assert self.width is not None
        return self.width

    def index(self, layer: Layer) -> int | None:
        """The index of a model's layer among the covered layers; None if it is not covered."""
        return self.covered.index(layer) if isinstance(layer, int) and layer in self.covered else None

    def reach(self, index: int) -> int:
        """The number of covered layers that the features of one layer write to: that layer alone, or all from it on."""
        return len(self.covered) - index if self.kind == "clt" else 1

    def keep_one_layer(self) -> "CoderConfig":
        """The settings of any layer by itself. They are the same for all layers, so that layers share programs."""
        return replace(self, layers=(0,))

    def fit_to_model(self, model: ModelConfig, name: str, fingerprint: str = "") -> "CoderConfig":
        """The settings with all that follows from the model filled in, or an error if they do not fit the model."""
        check_sites((self.reads, self.writes), model)
        layers = tuple(range(model.layers)) if self.layers is None else self.layers
        if not layers or list(layers) != sorted(set(layers)) or layers[-1] >= model.layers or layers[0] < 0:
            raise UserError(f"setting 'coder.layers': {layers}, expected layers from 0 to {model.layers - 1}, in order")
        if self.width not in (None, model.width):
            raise UserError(f"setting 'coder.width': {self.width}, expected {model.width}, the model's")
        config = replace(self, layers=layers, width=model.width, model=self.model or name)
        config = replace(config, model_fingerprint=self.model_fingerprint or fingerprint)
        config.check()
        return config

    def check(self) -> None:
        if self.features < 1:
            raise UserError(f"setting 'coder.features': {self.features}, expected at least 1")
        if self.width is not None and self.width < 1:
            raise UserError(f"setting 'coder.width': {self.width}, expected at least 1")
        if self.first_position < 0:
            raise UserError(f"setting 'coder.first_position': {self.first_position}, expected at least 0")
        if not (self.bandwidth > 0 and math.isfinite(self.bandwidth)):
            raise UserError(f"setting 'coder.bandwidth': {self.bandwidth}, expected a number above 0")
        if (self.k is None) == (self.activation in ("topk", "batchtopk")):
            wanted = "a number of active features" if self.k is None else "none"
            raise UserError(f"setting 'coder.k': {self.k}, expected {wanted} under activation '{self.activation}'")
        most = self.features * (len(self.covered) if self.activation == "batchtopk" else 1)
        if self.k is not None and not 1 <= self.k <= most:
            raise UserError(f"setting 'coder.k': {self.k}, expected 1 to {most}")
        if self.tied and self.kind != "sae":
            raise UserError(f"setting 'coder.tied': expected false, a {self.kind} writes elsewhere than it reads")
        if self.kind == "sae" and self.reads != self.writes:
            raise UserError(
                f"setting 'coder.writes': '{self.writes}', expected '{self.reads}': an SAE writes where it reads"
            )
