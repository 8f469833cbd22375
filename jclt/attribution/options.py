"""What a user can choose about an attribution graph."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

import numpy as np

from jclt.attribution.targets import Direction, Target, parse_targets
from jclt.coders import CoderConfig
from jclt.errors import UserError
from jclt.models import Model
from jclt.numerics import Precision, check_precision

Conventions = Literal["jclt", "circuit-tracer"]
"""Under circuit-tracer's conventions prompts begin with a special token; what is written at its position belongs to no
node; position embeddings are no nodes; as many features are traced between two rankings as in that tool; and the
outputs' probabilities are not normalised. What belongs to no node is part of the bias."""


Nodes = int | float
"""How many active features are nodes of a graph, those with the highest scores (`scores.py`); as a float from 0 to 1,
with what share of the sum of all scores."""

NODES_OF_DENSE_BASIS = 2000


class Options(NamedTuple):
    """The arguments of `attribute` with these names."""

    targets: Sequence[Target] | None = None
    max_features: int = 7500
    tolerance: float = 0.0
    conventions: Conventions = "jclt"
    nodes: Nodes | None = None  # None: all active features, or `NODES_OF_DENSE_BASIS` if nearly all are active
    precision: Precision = "float32"

    def check(self) -> "Options":
        """The same options in plain types; an error of one line where one is wrong."""
        if self.conventions not in ("jclt", "circuit-tracer"):
            raise UserError(f"conventions '{self.conventions}': expected jclt or circuit-tracer")
        if not isinstance(self.max_features, Integral) or isinstance(self.max_features, bool) or self.max_features < 1:
            raise UserError(f"max_features={self.max_features}: expected at least 1")
        if not isinstance(self.tolerance, Real) or not 0 <= self.tolerance < 1:
            raise UserError(f"tolerance={self.tolerance}: expected from 0 to below 1")
        check_precision(self.precision)
        return Options(
            targets=parse_targets(self.targets),
            max_features=int(self.max_features),
            tolerance=float(self.tolerance),
            conventions=self.conventions,
            nodes=parse_nodes(self.nodes),
            precision=self.precision,
        )

    def count_nodes(self, config: CoderConfig) -> Nodes | None:
        """How many nodes are chosen from this coder's active features, or the share of the scores that they have; None
        if all are nodes."""
        return NODES_OF_DENSE_BASIS if self.nodes is None and config.dense else self.nodes

    def summary(self) -> dict[str, Any]:
        """For a graph's file."""
        targets = [t.summary() if isinstance(t, Direction) else t for t in self.targets or ()]
        return {**self._asdict(), "targets": targets or "likeliest"}


def parse_nodes(nodes: Any) -> Nodes | None:
    """In plain types."""
    if nodes is None:
        return None
    if isinstance(nodes, int | np.integer) and not isinstance(nodes, bool) and nodes >= 1:
        return int(nodes)
    if isinstance(nodes, float | np.floating) and 0 < nodes <= 1:
        return float(nodes)
    raise UserError(f"nodes={nodes}: expected a number from 1 on, or a share of the scores: a float up to 1.0")


def count_silent_positions(model: Model, options: Options) -> int:
    """How many positions at the beginning have no nodes: none; under circuit-tracer's conventions the first, and with
    an instruction-tuned Gemma 3 the four with which each of its prompts begins."""
    if options.conventions == "jclt":
        return 0
    return 4 if is_gemma_3_it(model) else 1


def is_gemma_3_it(model: Model) -> bool:
    """Whether the model is an instruction-tuned Gemma 3; by its name, as circuit-tracer does it."""
    return "gemma-3" in model.name and model.name.rstrip("/").endswith("-it")
