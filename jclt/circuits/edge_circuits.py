"""`run_edge_circuits`: the metric with every edge outside a circuit replaced, for many circuits.

Along a replaced edge goes, by the name of the ablation,

    counterfactual  what the sender writes in the pair's corrupted prompt
    resample        what it writes in another pair's clean prompt of the same length
    mean            the mean of what it writes at that position over the corrupted prompts (over the clean ones without)
    zero            nothing
"""

from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jclt.circuits.edge_methods import EdgeMetric, EdgePlan, check_edge_metric, split_pairs_for_edges
from jclt.circuits.edge_runs import Writes, collect_writes, list_write_sites, run_edges
from jclt.circuits.edges import list_edges
from jclt.circuits.node_runs import Ablation
from jclt.circuits.passes import Prompts, average_positions, measure_metric, pad_prompts, run_pass, take_prompts
from jclt.errors import UserError
from jclt.interventions.patching.pairs import PromptPairs
from jclt.interventions.patching.patch import check_source, choose_donors
from jclt.interventions.patching.runs import check_corrupted
from jclt.interventions.resume import make_rows_mesh, place_weights
from jclt.models import Model
from jclt.shapes import Array, Bool, Float, Int, Params, Tokens


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
    if ablation not in get_args(Ablation):
        raise UserError(f"ablation '{ablation}': expected one of: {', '.join(get_args(Ablation))}")
    check_edge_metric(metric, pairs)
    if ablation == "counterfactual":
        check_corrupted(pairs)
    if ablation == "resample":
        check_source(pairs, (), "resample", "noising")
    mesh, plan, prompts = make_rows_mesh(), EdgePlan(model.config, metric), pad_prompts(pairs)
    by_row, params = NamedSharding(mesh, P("rows")), place_weights(model, mesh)
    donors = choose_donors(pairs, seed) if ablation == "resample" else np.arange(len(pairs))
    mean = None
    if ablation == "mean":
        averaged = mean_of or pairs
        averaged_parts = split_pairs_for_edges(model.config, averaged, 1)
        mean = average_writes(plan, params, averaged, averaged_parts, prompts.clean.shape[1])
    parts: list[np.ndarray] = []
    for numbers in split_pairs_for_edges(model.config, pairs, mesh.size):
        part = jax.device_put(take_prompts(prompts, numbers), by_row)
        tokens = prompts.clean[donors[numbers]] if ablation == "resample" else np.asarray(part.corrupted)
        other = run_writes(plan, params, jax.device_put(tokens, by_row), part.last) if mean is None else mean
        other = jax.tree.map(jnp.zeros_like, other) if ablation == "zero" else other
        clean, _ = run_clean(plan, params, part)
        values = [np.asarray(run_edge_circuit(plan, params, part, clean, other, kept)) for kept in circuits]
        parts.append(np.stack(values) if values else np.zeros((0, len(numbers)), np.float32))
    return np.concatenate(parts, axis=1)[:, : len(pairs)]


@partial(jax.jit, static_argnames=("plan",))
def run_writes(plan: EdgePlan, params: Params, tokens: Tokens, last: Int[Array, "P"]) -> Writes:
    """What senders write in the plain pass."""
    _, seen = run_pass(plan.model, params, tokens, last, capture=list_write_sites(plan.model))
    return collect_writes(plan.model, params, seen)


@partial(jax.jit, static_argnames=("plan",))
def run_clean(plan: EdgePlan, params: Params, prompts: Prompts) -> tuple[Float[Array, "P V"], Float[Array, "P"]]:
    """The logits and the metric of the plain pass."""
    logits, _ = run_pass(plan.model, params, prompts.clean, prompts.last)
    return logits, measure_metric(plan.metric, logits, prompts.answers)


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


def average_writes(plan: EdgePlan, params: Params, pairs: PromptPairs, parts: list[np.ndarray], length: int) -> Writes:
    """The mean at each position over the corrupted prompts that reach it, 0 where none does; one for all pairs."""

    def read(prompts: Prompts) -> tuple[Array, Array]:
        writes = run_writes(plan, params, prompts.corrupted, prompts.last)
        return writes.input[None], writes.layers.reshape(-1, *writes.input.shape)

    embeddings, layers = average_positions(read, pairs, parts, length)
    return Writes(embeddings[0], layers.reshape(plan.model.layers, -1, *layers.shape[1:]))
