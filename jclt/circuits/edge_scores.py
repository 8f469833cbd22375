"""`score_edges`: how much every edge of a model matters on pairs of prompts, by a method's name.

A score is negative where the edge supports the answer: it estimates the metric with this edge replaced, minus the
metric of the clean run. By gradients of what receivers read (`edge_gradients.py`)

    eap                  on the clean run
    relp                 the same under the rules of relevance patching
    clean corrupted      half of it on the clean run, and half with all embeddings replaced
    eap ig inputs        averaged over runs whose embeddings go from the clean run's to what replaces them
    eap ig activations   for each sender averaged over clean runs in which what it writes goes to what replaces it;
                         heads of a layer go together
    eap ig activations, all    the gradients of all these runs are averaged and serve all senders: EAP-IG's code

and without

    information flow     max(0, |x| - |x - s|), divided by its sum over senders; x is what the receiver reads, s what
                         the sender writes on the clean prompt, | | a sum of absolute values; averaged over positions.
                         Nothing is replaced
    exact                one pass for each edge

By default what replaces a sender's output is that of the corrupted run; `ablation` names others (`edge_ablations.py`).
Averages are sums over points between the two, by the quadrature's name (`gradients.py`). `left` with m steps has those
of EAP-IG's paper, so that one step is `eap`; `right` has those of EAP-IG's code, of which one step is at the other end.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from jclt.circuits.edge_ablations import prepare_ablation, split_pairs_for_edges
from jclt.circuits.edge_methods import (
    EdgeMetric,
    EdgePlan,
    Moved,
    check_edge_metric,
    score_by_flow,
    score_by_gradients,
    score_exactly,
)
from jclt.circuits.edges import list_edges, list_receivers, list_senders, take_best
from jclt.circuits.gradients import find_points
from jclt.circuits.node_runs import Ablation, check_ablation
from jclt.circuits.passes import pad_prompts, take_prompts
from jclt.circuits.rules import RULE_SETS, read_rules
from jclt.errors import UserError
from jclt.interventions.patching.pairs import PromptPairs
from jclt.interventions.resume import make_rows_mesh, place_weights
from jclt.models import Model, ModelConfig
from jclt.shapes import Bool, Float

EDGE_METHODS = (
    "eap",
    "relp",
    "clean corrupted",
    "eap ig inputs",
    "eap ig activations",
    "eap ig activations, all",
    "information flow",
    "exact",
)
ENDS = {"eap": (0.0,), "relp": (0.0,), "clean corrupted": (0.0, 1.0)}
"""The points of the methods that have no quadrature."""
MOVED: dict[str, Moved] = {"eap ig activations": "each", "eap ig activations, all": "each, averaged"}


@dataclass(frozen=True, eq=False, repr=False)
class EdgeScores:
    """The scores of all edges, for each pair."""

    per_pair: Float[np.ndarray, "P s r"]  # 0 where there is no edge
    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    method: str
    rules: tuple[str, ...]
    metric: EdgeMetric
    ablation: str
    clean: Float[np.ndarray, "P"]  # the metric of the clean runs
    ablated: Float[np.ndarray, "P"]  # and with every edge replaced: of counterfactual ones that of the corrupted runs
    config: ModelConfig
    source: str  # what the scores are of

    @property
    def values(self) -> Float[np.ndarray, "s r"]:
        """The mean over pairs."""
        return self.per_pair.mean(axis=0)

    def take_best(self, count: int) -> Bool[np.ndarray, "s r"]:
        """The edges with the largest scores in size."""
        return take_best(self.config, self.values, count)

    def __repr__(self) -> str:
        count = int(list_edges(self.config).sum())
        return f"<EdgeScores: {self.method} of {count:,} edges, {self.ablation} ablation, {self.source}>"

    def summarize(self, shown: int = 10) -> str:
        """The edges with the largest scores, as text."""
        values, lines = self.values, [repr(self)]
        for flat in np.argsort(-np.abs(values), axis=None, kind="stable")[:shown].tolist():
            sender, receiver = divmod(flat, values.shape[1])
            lines.append(f"  {values.flat[flat]:+9.4f}  {self.senders[sender]}->{self.receivers[receiver]}")
        return "\n".join(lines)


def score_edges(
    model: Model,
    pairs: PromptPairs,
    method: str = "eap ig inputs",
    *,
    metric: EdgeMetric = "logit_difference",
    ablation: Ablation = "counterfactual",
    mean_of: PromptPairs | None = None,
    rules: str | Iterable[str] | None = None,
    quadrature: str = "gauss",
    steps: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> EdgeScores:
    """Scores of all edges, by a method of `EDGE_METHODS`.

    ablation    what replaces a sender's output; the means are of `pairs` themselves, or of other pairs
    rules       of the backward pass (`rules.py`): a set by name, or rules; by default the method's own
    quadrature  of integrated gradients, with `steps` points: gauss, midpoint, left or right (`gradients.py`)
    """
    plan = make_edge_plan(model, pairs, method, metric, rules)
    check_ablation(ablation, pairs)
    config, mesh = model.config, make_rows_mesh()
    params, by_row = place_weights(model, mesh), NamedSharding(mesh, P("rows"))
    dtype = params["token_embedding"].dtype
    points, weights = find_points(quadrature, steps)
    if method in ENDS:
        points, weights = np.array(ENDS[method]), np.full(len(ENDS[method]), 1 / len(ENDS[method]))
    curve = (jnp.asarray(points, dtype), jnp.asarray(weights, dtype))
    prompts = pad_prompts(pairs)
    replace = prepare_ablation(config, params, pairs, ablation, mean_of=mean_of, seed=seed, placed=by_row)
    score = {"information flow": score_by_flow, "exact": score_exactly}.get(method, score_by_gradients)
    parts: list[list[np.ndarray]] = []
    with tqdm(total=len(pairs), unit="pair", disable=None if progress else True) as bar:
        for numbers in split_pairs_for_edges(config, pairs, mesh.size):
            part = jax.device_put(take_prompts(prompts, numbers), by_row)
            found = score(plan, params, part, replace(numbers), curve)
            parts.append([np.asarray(x) for x in found])
            bar.update(min(len(numbers), len(pairs) - bar.n))
    scores, clean, ablated = (np.concatenate(column)[: len(pairs)] for column in zip(*parts, strict=True))
    names, source = (list_senders(config), list_receivers(config)), f"{len(pairs)} pairs"
    scores = np.where(list_edges(config), scores, 0)
    return EdgeScores(scores, *names, method, plan.rules, metric, ablation, clean, ablated, config, source)


def make_edge_plan(
    model: Model, pairs: PromptPairs, method: str, metric: EdgeMetric, rules: str | Iterable[str] | None
) -> EdgePlan:
    """What all parts share, after all checks."""
    if method not in EDGE_METHODS:
        raise UserError(f"method '{method}': does not exist, expected one of: {', '.join(EDGE_METHODS)}")
    check_edge_metric(metric, pairs)
    if metric == "kl" and method in ("eap", "relp"):
        raise UserError(
            f"metric 'kl' with method '{method}': its gradient on the clean run is 0, expected 'eap ig inputs'"
        )
    if method in ("information flow", "exact") and rules is not None:
        raise UserError(f"rules with method '{method}': expected none, it has no backward pass")
    names = read_rules(rules) if rules is not None else RULE_SETS["relp"] if method == "relp" else ()
    return EdgePlan(model.config, metric, names, MOVED.get(method, "inputs"))
