"""`run_edge_circuits`: the metric with every edge outside a circuit replaced, for many circuits."""

from functools import partial

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jclt.circuits.edge_ablations import prepare_ablation, split_pairs_for_edges
from jclt.circuits.edge_methods import EdgeMetric, EdgePlan, check_edge_metric
from jclt.circuits.edge_runs import Writes, run_edges
from jclt.circuits.edges import list_edges
from jclt.circuits.node_runs import Ablation, check_ablation
from jclt.circuits.passes import Prompts, measure_metric, pad_prompts, run_pass, take_prompts
from jclt.errors import UserError
from jclt.interventions.patching.pairs import PromptPairs
from jclt.interventions.resume import make_rows_mesh, place_weights
from jclt.models import Model
from jclt.shapes import Array, Bool, Float, Params


def run_edge_circuits(
    model: Model,
    pairs: PromptPairs,
    circuits: Bool[np.ndarray, "c s r"],
    *,
    ablation: Ablation = "counterfactual",
    mean_of: PromptPairs | None = None,
    metric: EdgeMetric = "logit_difference",
    seed: int = 0,
) -> Float[np.ndarray, "c P"]:
    """The metric of each pair's clean prompt along the edges of each circuit. The means are of `pairs` themselves, or
    of other pairs."""
    edges = list_edges(model.config)
    if circuits.shape[1:] != edges.shape or circuits.dtype != bool:
        found = f"{circuits.dtype} of shape {circuits.shape}"
        raise UserError(f"circuits: {found}, expected booleans [circuits, {edges.shape[0]} senders, {edges.shape[1]}]")
    check_edge_metric(metric, pairs)
    check_ablation(ablation, pairs)
    mesh, plan, prompts = make_rows_mesh(), EdgePlan(model.config, metric), pad_prompts(pairs)
    by_row, params = NamedSharding(mesh, P("rows")), place_weights(model, mesh)
    replace = prepare_ablation(model.config, params, pairs, ablation, mean_of=mean_of, seed=seed, placed=by_row)
    parts: list[np.ndarray] = []
    for numbers in split_pairs_for_edges(model.config, pairs, mesh.size):
        part = jax.device_put(take_prompts(prompts, numbers), by_row)
        clean, other = run_clean(plan, params, part), replace(numbers).writes
        values = [np.asarray(run_edge_circuit(plan, params, part, clean, other, kept)) for kept in circuits]
        parts.append(np.stack(values) if values else np.zeros((0, len(numbers)), np.float32))
    return np.concatenate(parts, axis=1)[:, : len(pairs)]


@partial(jax.jit, static_argnames=("plan",))
def run_clean(plan: EdgePlan, params: Params, prompts: Prompts) -> Float[Array, "P V"]:
    """The logits of the plain pass."""
    return run_pass(plan.model, params, prompts.clean, prompts.last)[0]


@partial(jax.jit, static_argnames=("plan",))
@jax.named_scope("run_edges")
def run_edge_circuit(
    plan: EdgePlan,
    params: Params,
    prompts: Prompts,
    clean: Float[Array, "P V"],
    other: Writes,
    kept: Bool[Array, "s r"],
) -> Float[Array, "P"]:
    logits = run_edges(plan.model, params, prompts.clean, prompts.last, kept.astype(clean.dtype), other)
    return measure_metric(plan.metric, logits, prompts.answers, clean)
