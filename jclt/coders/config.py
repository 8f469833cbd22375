"""What a sparse coder is: its kind, its size, where it reads and writes, and its rule at inference."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from jclt.coders.activations import Through
from jclt.errors import UserError
from jclt.models import ModelConfig, check_sites
from jclt.shapes import Layer

Kind = Literal["clt", "transcoder", "sae", "neurons"]
Activation = Literal["relu", "jumprelu", "topk", "batchtopk"]


@dataclass(frozen=True)
class CoderConfig:
    """`layers` and `width` are those of the model where they are not given."""

    kind: Kind = "clt"
    features: int = 1024  # a layer
    activation: Activation = "jumprelu"
    k: int | None = None  # active features: a layer's under topk, those of all layers on average under batchtopk
    reads: str = "mlp_in"
    writes: str = "mlp_out"
    bandwidth: float = 1.0  # of JumpReLU's straight-through gradient (Circuit Tracing 2025)
    through: Through = "all"  # whom that gradient reaches (Circuit Tracing 2025)
    skip: bool = False  # an affine map from what a layer reads to what it writes, beside the features
    tied: bool = False  # decoders are the encoders transposed (SAEs)
    layers: tuple[int, ...] | None = None  # the model's layers that it covers, in order
    width: int | None = None
    model: str = ""
    model_fingerprint: str = ""  # of the model's weights (`jclt.fingerprints`); empty where nothing says it

    @property
    def rule(self) -> Literal["relu", "jumprelu", "topk"]:
        """How activations are decided at inference: BatchTopK's threshold makes a JumpReLU."""
        return "jumprelu" if self.activation == "batchtopk" else self.activation

    @property
    def covered(self) -> tuple[int, ...]:
        assert self.layers is not None
        return self.layers

    @property
    def size(self) -> int:
        assert self.width is not None
        return self.width

    def index(self, layer: Layer) -> int | None:
        """Where a layer of the model stands among the covered ones, if it is one of them."""
        return self.covered.index(layer) if isinstance(layer, int) and layer in self.covered else None

    def reach(self, index: int) -> int:
        """How many of the covered layers the features of one write to: its own, or all from its own on."""
        return len(self.covered) - index if self.kind == "clt" else 1

    def fitted(self, model: ModelConfig, name: str, fingerprint: str = "") -> "CoderConfig":
        """The configuration with everything that follows from the model filled in, or one line on what is wrong."""
        check_sites((self.reads, self.writes), model)
        layers = tuple(range(model.layers)) if self.layers is None else self.layers
        if not layers or list(layers) != sorted(set(layers)) or layers[-1] >= model.layers or layers[0] < 0:
            raise UserError(f"setting 'coder.layers': {layers}, expected layers from 0 to {model.layers - 1}, in order")
        if self.width not in (None, model.width):
            raise UserError(f"setting 'coder.width': {self.width}, expected {model.width}, the model's")
        fitted = replace(self, layers=layers, width=model.width, model=self.model or name)
        fitted = replace(fitted, model_fingerprint=self.model_fingerprint or fingerprint)
        fitted.check()
        return fitted

    def check(self) -> None:
        if self.features < 1:
            raise UserError(f"setting 'coder.features': {self.features}, expected at least 1")
        if self.width is not None and self.width < 1:
            raise UserError(f"setting 'coder.width': {self.width}, expected at least 1")
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
