"""Grades of circuits: does a part of the model do what the whole does, and does the rest not do it?

With m(C) the metric, averaged over pairs, when everything outside C is ablated, M all nodes and 0 none:

    faithfulness  F(C) = (m(C) - m(0)) / (m(M) - m(0))          1 is best
    completeness  F(M without C)                                0 is best
    minimality    F(C) - F(C without v), of each node v of C    0: the node is not needed
    CPR           area under F over the share of nodes kept     larger is better, also above 1
    CMD           area under |1 - F| over the same              0 is best

Areas are by trapezoids, from the smallest size to all nodes, where F is 1. A metric whose range m(M) - m(0) cannot be
told from 0 is refused. What is ablated, and how, is part of every figure.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from jclt.circuits import NodeScores, run_circuits
from jclt.circuits.node_runs import Ablation
from jclt.errors import UserError
from jclt.evaluation.intervals import DRAWS, Figure, average_prompts, divide_sums, rank, summarize_figures
from jclt.interventions import PromptPairs
from jclt.interventions.patching.metrics import LEAST_RANGE, Metric
from jclt.models import Model
from jclt.shapes import Bool, Float, Int

Axis = Literal["share", "log share"]
RANDOM = "random"
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Of all edges: the sizes of circuits in the MIB benchmark."""


@dataclass(frozen=True, eq=False, repr=False)
class CircuitGrades:
    """The grades of circuits that grow by one order of the nodes (or edges)."""

    name: str  # of the order
    unit: str  # what circuits consist of
    total: int  # number of all nodes
    sizes: tuple[int, ...]
    circuit: Float[np.ndarray, "S P"]  # the metric of each pair with the circuit alone
    rest: Float[np.ndarray, "S P"]  # and without it
    whole: Float[np.ndarray, "P"]
    empty: Float[np.ndarray, "P"]
    ablation: str
    metric: str

    @property
    def faithfulness(self) -> tuple[Figure, ...]:
        return tuple(compute_faithfulness(row, self.whole, self.empty) for row in self.circuit)

    @property
    def completeness(self) -> tuple[Figure, ...]:
        return tuple(compute_faithfulness(row, self.whole, self.empty) for row in self.rest)

    def cpr(self, axis: Axis = "share") -> Figure:
        """The area under the faithfulness."""
        return self._measure_area(axis, distance=False)

    def cmd(self, axis: Axis = "share") -> Figure:
        """The area between the faithfulness and 1. Draws of the bootstrap lie above it where it is near 0."""
        return self._measure_area(axis, distance=True)

    def _measure_area(self, axis: Axis, distance: bool) -> Figure:
        drawn = np.random.default_rng(0).integers(len(self.whole), size=(DRAWS, len(self.whole)))

        def measure(numbers: Int[np.ndarray, "... P"]) -> Float[np.ndarray, "..."]:
            empty = self.empty[numbers].sum(axis=-1)
            spans = self.whole[numbers].sum(axis=-1) - empty
            curve = np.stack([(row[numbers].sum(axis=-1) - empty) / spans for row in self.circuit])
            return compute_area(self.sizes, self.total, curve, axis, distance)

        value = float(measure(np.arange(len(self.whole))))
        low, high = np.quantile(measure(drawn), [0.025, 0.975])
        return Figure(value, float(low), float(high), len(self.whole))

    def find_size(self, least: float = 0.9) -> int | None:
        """The smallest of the sizes whose faithfulness is at least this; None if there is none."""
        enough = [size for size, figure in zip(self.sizes, self.faithfulness, strict=True) if figure.value >= least]
        return min(enough, default=None)

    def summary(self) -> dict[str, Any]:
        """The figures as plain numbers, those of curves by size."""
        settings = {"name": self.name, "unit": self.unit, "total": self.total}
        settings |= {"ablation": self.ablation, "metric": self.metric}
        ends = {"all": average_prompts(self.whole), "none": average_prompts(self.empty)}
        curves = {"faithfulness": self.faithfulness, "completeness": self.completeness}
        by_size = {
            name: summarize_figures(dict(zip(map(str, self.sizes), row, strict=True))) for name, row in curves.items()
        }
        return settings | by_size | summarize_figures(ends | {"CPR": self.cpr(), "CMD": self.cmd()})

    def __repr__(self) -> str:
        return f"<CircuitGrades: {self.name}, {len(self.sizes)} sizes of {self.total:,} {self.unit}>"

    def __str__(self) -> str:
        whole, empty = average_prompts(self.whole), average_prompts(self.empty)
        lines = [f"{self.name}: {self.total:,} {self.unit}, {self.ablation} ablation, {self.metric}"]
        lines += [f"m(all) {whole}, m(none) {empty}, {len(self.whole)} pairs"]
        lines += [f"{'kept':>8} {'faithfulness':>26} {'completeness':>26}"]
        rows = zip(self.sizes, self.faithfulness, self.completeness, strict=True)
        lines += [f"{size:>8,} {faith!s:>26} {rest!s:>26}" for size, faith, rest in rows]
        lines += [f"CPR {self.cpr()}, CMD {self.cmd()} over the share kept"]
        return "\n".join(lines)


def compute_faithfulness(
    values: Float[np.ndarray, "P"], whole: Float[np.ndarray, "P"], empty: Float[np.ndarray, "P"]
) -> Figure:
    """A ratio of means over pairs, with a bootstrap interval."""
    check_range(whole, empty)
    return divide_sums(values - empty, whole - empty)


def check_range(whole: Float[np.ndarray, "P"], empty: Float[np.ndarray, "P"]) -> None:
    """An error if the metrics of the whole model and of nothing cannot be told apart."""
    difference = average_prompts(np.asarray(whole, np.float64) - np.asarray(empty, np.float64))
    if not abs(difference.value) >= LEAST_RANGE or difference.low <= 0 <= difference.high:
        raise UserError(
            f"metric: {np.mean(whole):.4g} with all nodes and {np.mean(empty):.4g} with none, difference {difference}, "
            "expected two values that can be told apart (is it saturated?)"
        )


def compute_area(
    sizes: Sequence[int], total: int, curve: Float[np.ndarray, "S ..."], axis: str, distance: bool
) -> Float[np.ndarray, "..."]:
    """The area under the curve, or between it and 1, from the smallest size to all nodes, over an axis of length 1
    ("log share"; of "share", of that length without what lies before the smallest size)."""
    if axis not in get_args(Axis):
        raise UserError(f"axis '{axis}': expected 'share' or 'log share'")
    shares = np.array([size for size in (*sizes, total)], np.float64) / total
    places = shares if axis == "share" else np.log(shares) / -np.log(shares[0]) + 1
    curve = np.concatenate([curve, np.ones_like(curve[:1])])
    return np.asarray(np.trapezoid(np.abs(1 - curve) if distance else curve, places, axis=0))


def area_under_roc(scores: Float[np.ndarray, "*nodes"], planted: Bool[np.ndarray, "*nodes"]) -> float:
    """The probability that a planted node or edge has a larger score than another one; ties count half."""
    scores, planted = np.ravel(scores), np.ravel(planted).astype(bool)
    hits = int(planted.sum())
    if hits in (0, len(planted)):
        raise UserError(f"planted: {hits} of {len(planted)}, expected some but not all")
    return float((rank(scores)[planted].sum() - hits * (hits - 1) / 2) / (hits * (len(planted) - hits)))


def choose_best(order: Int[np.ndarray, "n"], size: int, shape: tuple[int, ...]) -> Bool[np.ndarray, "..."]:
    """A mask of the first nodes of an order."""
    mask = np.zeros(int(np.prod(shape)), bool)
    mask[order[:size]] = True
    return mask.reshape(shape)


def share_sizes(total: int, shares: Sequence[float] = SHARES) -> tuple[int, ...]:
    """Shares of a total as numbers, each once."""
    return tuple(sorted({min(max(round(share * total), 1), total - 1) for share in shares}))


def check_sizes(sizes: Sequence[int], total: int) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in sizes)
    if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1 or sizes[-1] >= total:
        raise UserError(f"sizes {sizes}: expected increasing numbers of nodes from 1 to {total - 1}")
    return sizes


def grade_nodes(
    model: Model,
    pairs: PromptPairs,
    scores: NodeScores | Sequence[NodeScores],
    sizes: Sequence[int] | None = None,
    *,
    by: Literal["size", "support"] = "size",
    ablation: Ablation = "mean",
    mean_of: PromptPairs | None = None,
    metric: Metric | None = None,
    draws: int = 3,
    seed: int = 0,
) -> list[CircuitGrades]:
    """Grades circuits of the best nodes by each of the scores, all of one basis, and last random circuits.

    pairs       those that grade; better not those that the scores are of
    sizes       numbers of nodes, by default `SHARES` of all
    by          how nodes are ranked (`NodeScores.rank_nodes`)
    ablation    of the nodes outside: mean, zero, resample or counterfactual; `mean_of` other pairs if given
    draws       of random orders, whose values are averaged; each contains its smaller circuits, as the others do
    """
    all_scores = [scores] if isinstance(scores, NodeScores) else list(scores)
    first = all_scores[0]
    shape = first.values.shape
    if len({(s.basis.name, s.values.shape) for s in all_scores}) > 1:
        raise UserError("scores: of several bases, expected those of one basis and of prompts of one length")
    total = first.values.size
    sizes = check_sizes(share_sizes(total) if sizes is None else sizes, total)
    generator = np.random.default_rng(seed)
    orders = [s.rank_nodes(by) for s in all_scores] + [generator.permutation(total) for _ in range(draws)]
    circuits = [choose_best(order, size, shape) for order in orders for size in sizes]
    ends = [np.ones(shape, bool), np.zeros(shape, bool)]
    metric = metric or first.metric
    masks = np.stack([*circuits, *(~circuit for circuit in circuits), *ends])
    options = {"ablation": ablation, "mean_of": mean_of, "metric": metric, "seed": seed}
    values = run_circuits(model, pairs, first.basis, masks, **options)
    check_range(values[-2], values[-1])
    circuit, rest = values[:-2].reshape(2, len(orders), len(sizes), -1)
    count = len(all_scores)
    names = [f"{s.method}{'' if s.reference == 'corrupted' else ', unpaired'}" for s in all_scores]
    rows = [(name, circuit[i], rest[i]) for i, name in enumerate(names)]
    if draws:
        rows.append((RANDOM, circuit[count:].mean(axis=0), rest[count:].mean(axis=0)))
    unit = f"nodes ({first.basis.name})"
    ends_of_range = (values[-2], values[-1])
    return [CircuitGrades(n, unit, total, sizes, c, r, *ends_of_range, ablation, metric) for n, c, r in rows]


def measure_minimality(
    model: Model,
    pairs: PromptPairs,
    scores: NodeScores,
    size: int,
    *,
    by: Literal["size", "support"] = "size",
    ablation: Ablation = "mean",
    mean_of: PromptPairs | None = None,
    controls: int = 10,
    seed: int = 0,
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "c"]]:
    """How much the faithfulness falls without each node of the circuit, best node first; and, as a control, how much it
    rises with each of a few random nodes of the rest."""
    (size,) = check_sizes((size,), scores.values.size)
    shape, order = scores.values.shape, scores.rank_nodes(by)
    others = np.random.default_rng(seed).permutation(order[size:])[:controls]
    changed = [np.setdiff1d(order[:size], [node]) for node in order[:size]]
    changed += [np.append(order[:size], node) for node in others]
    masks = [choose_best(nodes, len(nodes), shape) for nodes in (order[:size], *changed)]
    masks += [np.ones(shape, bool), np.zeros(shape, bool)]
    options = {"ablation": ablation, "mean_of": mean_of, "metric": scores.metric}
    means = run_circuits(model, pairs, scores.basis, np.stack(masks), **options)
    check_range(means[-2], means[-1])
    shares = (means.mean(axis=1) - means[-1].mean()) / (means[-2] - means[-1]).mean()
    return shares[0] - shares[1 : size + 1], shares[size + 1 : -2] - shares[0]
