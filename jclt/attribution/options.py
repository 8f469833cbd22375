"""What a user can choose of an attribution graph."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

from jclt.attribution.targets import Direction, Target, as_targets
from jclt.errors import UserError
from jclt.models import Model

Conventions = Literal["jclt", "circuit-tracer"]
"""circuit-tracer's: prompts begin with a special token, nothing written at its position is a node, nor are position
embeddings, features are chosen in its rounds, and the outputs' probabilities are not made to sum to one. What is no
node is part of the bias."""


class Options(NamedTuple):
    targets: Sequence[Target] | None = None
    max_features: int = 7500
    tolerance: float = 0.0
    conventions: Conventions = "jclt"

    def check(self) -> "Options":
        """The same in plain types, or one line on what is wrong."""
        if self.conventions not in ("jclt", "circuit-tracer"):
            raise UserError(f"conventions '{self.conventions}': expected jclt or circuit-tracer")
        if not isinstance(self.max_features, Integral) or isinstance(self.max_features, bool) or self.max_features < 1:
            raise UserError(f"max_features={self.max_features}: expected at least 1")
        if not isinstance(self.tolerance, Real) or not 0 <= self.tolerance < 1:
            raise UserError(f"tolerance={self.tolerance}: expected from 0 to below 1")
        return Options(as_targets(self.targets), int(self.max_features), float(self.tolerance), self.conventions)

    def summary(self) -> dict[str, Any]:
        """For a graph's file."""
        own = [t.summary() if isinstance(t, Direction) else t for t in self.targets or ()]
        return {**self._asdict(), "targets": own or "likeliest"}


def silent_positions(model: Model, options: Options) -> int:
    """At how many positions nothing is a node: under circuit-tracer's conventions that of the first token, and those of
    the four that begin each prompt of an instruction-tuned Gemma 3."""
    if options.conventions == "jclt":
        return 0
    return 4 if is_gemma_3_it(model) else 1


def is_gemma_3_it(model: Model) -> bool:
    """By its name, as circuit-tracer tells it."""
    return "gemma-3" in model.name and model.name.rstrip("/").endswith("-it")
