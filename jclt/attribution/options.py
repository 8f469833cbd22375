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
MOST_HEADS = 2000
"""Of `heads=True`."""


class Options(NamedTuple):
    """The arguments of `attribute` with these names."""

    targets: Sequence[Target] | None = None
    max_features: int = 7500
    tolerance: float = 0.0
    conventions: Conventions = "jclt"
    nodes: Nodes | None = None  # None: all active features, or `NODES_OF_DENSE_BASIS` if nearly all are active
    precision: Precision = "float32"
    heads: int | bool | None = None  # how many are nodes
    cuts: Sequence[int] = ()  # the layers at whose input the residual stream is a node

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
            heads=parse_heads(self.heads),
            cuts=parse_cuts(self.cuts),
        )

    @property
    def has_vectors(self) -> bool:
        """Whether heads or residual streams are nodes."""
        return self.heads is not None or len(self.cuts) > 0

    def count_nodes(self, config: CoderConfig) -> Nodes | None:
        """How many nodes are chosen from this coder's active features, or the share of the scores that they have; None
        if all are nodes."""
        return NODES_OF_DENSE_BASIS if self.nodes is None and config.dense else self.nodes

    def has_scores(self, config: CoderConfig) -> bool:
        return self.count_nodes(config) is not None or self.has_vectors

    def summary(self) -> dict[str, Any]:
        """For a graph's file."""
        targets = [t.summary() if isinstance(t, Direction) else t for t in self.targets or ()]
        summary = {**self._asdict(), "targets": targets or "likeliest", "cuts": list(self.cuts)}
        absent = [name for name, absent in (("heads", self.heads is None), ("cuts", not self.cuts)) if absent]
        return {name: value for name, value in summary.items() if name not in absent}


def parse_nodes(nodes: Any) -> Nodes | None:
    """In plain types."""
    if nodes is None:
        return None
    if isinstance(nodes, int | np.integer) and not isinstance(nodes, bool) and nodes >= 1:
        return int(nodes)
    if isinstance(nodes, float | np.floating) and 0 < nodes <= 1:
        return float(nodes)
    raise UserError(f"nodes={nodes}: expected a number from 1 on, or a share of the scores: a float up to 1.0")


def parse_heads(heads: Any) -> int | None:
    """The most heads that are nodes, None for none."""
    if heads is None or heads is False:
        return None
    if heads is True:
        return MOST_HEADS
    if isinstance(heads, int | np.integer) and heads >= 1:
        return int(heads)
    raise UserError(f"heads={heads}: expected a number from 1 on, or True for the {MOST_HEADS} with the highest values")


def parse_cuts(cuts: Any) -> tuple[int, ...]:
    """In plain types, sorted."""
    cuts = () if cuts is None else cuts
    listed = isinstance(cuts, Sequence | np.ndarray) and not isinstance(cuts, str)
    if not listed or not all(isinstance(layer, Integral) and not isinstance(layer, bool) for layer in cuts):
        raise UserError(f"cuts={cuts!r}: expected numbers of layers, such as (6, 12)")
    return tuple(sorted({int(layer) for layer in cuts}))


def check_vectors(model: Model, options: Options) -> None:
    """An error of one line where heads and residual streams cannot be nodes."""
    last = model.config.layers - 1
    if wrong := [layer for layer in options.cuts if not 1 <= layer <= last]:
        raise UserError(f"cuts: layer {wrong[0]}, expected one from 1 to {last}, whose inputs can be nodes")


def count_silent_positions(model: Model, options: Options) -> int:
    """How many positions at the beginning have no nodes: none; under circuit-tracer's conventions the first, and with
    an instruction-tuned Gemma 3 the four with which each of its prompts begins."""
    if options.conventions == "jclt":
        return 0
    return 4 if is_gemma_3_it(model) else 1


def is_gemma_3_it(model: Model) -> bool:
    """Whether the model is an instruction-tuned Gemma 3; by its name, as circuit-tracer does it."""
    return "gemma-3" in model.name and model.name.rstrip("/").endswith("-it")
