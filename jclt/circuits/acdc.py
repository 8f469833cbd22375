"""`find_circuit`: automatic circuit discovery (ACDC). Edges are visited one after the other. An edge is removed for
good if the loss rises by less than the threshold when it is replaced, too; else it is kept.

The loss is the divergence of the circuit's prediction from the model's (`kl`), or how far another metric has fallen,
averaged over pairs. Edges into parts that no longer lead to the logits are removed without a pass. By default receivers
are visited from the logits down, and each receiver's senders from the latest to the earliest; the result depends on the
order.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jclt.attribution.true_pass import widen
from jclt.circuits.edge_ablations import prepare_ablation
from jclt.circuits.edge_methods import EdgeMetric, EdgePlan, check_edge_metric
from jclt.circuits.edge_runs import EdgeState, Writes, begin_edges, read_logits, run_layers
from jclt.circuits.edges import find_readers, find_receiver_layers, list_edges, name_edges, prune_edges
from jclt.circuits.node_runs import Ablation, check_ablation
from jclt.circuits.passes import Prompts, measure_metric, pad_prompts, run_pass
from jclt.errors import UserError
from jclt.interventions.patching.pairs import PromptPairs
from jclt.models import Model, ModelConfig
from jclt.shapes import Array, Bool, Float, Int, Params

STEPS = 32
"""Edges that one call of the program visits."""


@dataclass(frozen=True, eq=False, repr=False)
class EdgeCircuit:
    """A set of edges."""

    kept: Bool[np.ndarray, "s r"]
    config: ModelConfig
    metric: EdgeMetric
    loss: float  # of the circuit before pruning
    passes: int

    @property
    def names(self) -> tuple[str, ...]:
        return name_edges(self.config, self.kept)

    def __repr__(self) -> str:
        return f"<EdgeCircuit: {int(self.kept.sum())} of {int(list_edges(self.config).sum()):,} edges>"


class Search(NamedTuple):
    """How far the search is."""

    kept: Float[Array, "s r"]
    loss: Float[Array, ""]
    state: EdgeState  # of the circuit so far
    passes: Int[Array, ""]


def find_circuit(
    model: Model,
    pairs: PromptPairs,
    threshold: float,
    *,
    metric: EdgeMetric = "kl",
    ablation: Ablation = "counterfactual",
    order: Int[np.ndarray, "n 2"] | None = None,
    start: Bool[np.ndarray, "s r"] | None = None,
    prune: bool = True,
    progress: bool = True,
) -> EdgeCircuit:
    """The circuit that the threshold leaves. The ablation says what goes along replaced edges (`edge_ablations.py`).

    order   the edges to visit, as rows of a sender and a receiver (`edges.py`); others stay
    start   the circuit to begin with, by default all edges: those outside are replaced all along
    prune   whether edges without a way from the input and to the logits are removed at last
    """
    config, edges = model.config, list_edges(model.config)
    check_edge_metric(metric, pairs)
    check_ablation(ablation, pairs)
    if not threshold > 0:
        raise UserError(f"threshold={threshold}: expected more than 0, the rise of the loss that an edge must make")
    begun = edges if start is None else edges & start
    places = list_downwards(edges) if order is None else np.asarray(order)
    if places.ndim != 2 or places.shape[1] != 2 or not edges[tuple(places.T)].all():
        raise UserError("order: expected rows of a sender's and a receiver's number that are an edge")
    places = places[begun[tuple(places.T)]].astype(np.int32)
    plan, params, prompts = EdgePlan(config, metric), widen(dict(model.params)), pad_prompts(pairs)
    other = prepare_ablation(config, params, pairs, ablation)(np.arange(len(pairs))).writes
    clean, search = begin_search(plan, params, prompts, other, jnp.asarray(begun, params["token_embedding"].dtype))
    limit = jnp.asarray(threshold, search.loss.dtype)
    for first in tqdm(range(0, len(places), STEPS), unit_scale=STEPS, disable=None if progress else True):
        some = places[first : first + STEPS]
        some = np.pad(some, ((0, STEPS - len(some)), (0, 0)), constant_values=-1)
        search = visit_edges(plan, params, prompts, clean, other, limit, search, some)
    kept = np.asarray(search.kept) > 0
    return EdgeCircuit(
        prune_edges(config, kept) if prune else kept, config, metric, float(search.loss), int(search.passes)
    )


def list_downwards(edges: Bool[np.ndarray, "s r"]) -> Int[np.ndarray, "n 2"]:
    """From the last receiver to the first, and of each from the last sender to the first."""
    return np.argwhere(edges.T)[::-1, ::-1]


def measure_loss(
    plan: EdgePlan, params: Params, prompts: Prompts, clean: Array, state: EdgeState, kept: Float[Array, "s r"]
) -> Float[Array, ""]:
    logits = read_logits(plan.model, params, state, kept, prompts.last)
    value = measure_metric(plan.metric, logits, prompts.answers, clean).mean()
    return value if plan.metric == "kl" else -value


@partial(jax.jit, static_argnames=("plan",))
def begin_search(
    plan: EdgePlan, params: Params, prompts: Prompts, other: Writes, kept: Float[Array, "s r"]
) -> tuple[Float[Array, "P V"], Search]:
    """The clean logits, and the search before the first edge."""
    clean, _ = run_pass(plan.model, params, prompts.clean, prompts.last)
    state = begin_edges(plan.model, params, prompts.clean, other)
    state = run_layers(plan.model, params, state, kept, other, 0)
    loss = measure_loss(plan, params, prompts, clean, state, kept)
    return clean, Search(kept, loss, state, jnp.zeros((), jnp.int32))


@partial(jax.jit, static_argnames=("plan",), donate_argnames=("search",))
@jax.named_scope("acdc")
def visit_edges(
    plan: EdgePlan,
    params: Params,
    prompts: Prompts,
    clean: Float[Array, "P V"],
    other: Writes,
    threshold: Float[Array, ""],
    search: Search,
    places: Int[Array, "n 2"],
) -> Search:
    """Visits edges; a place of -1 is none."""
    reads, layers = jnp.asarray(find_readers(plan.model)), jnp.asarray(find_receiver_layers(plan.model))

    def visit(search: Search, place: Int[Array, "2"]) -> tuple[Search, None]:
        sender, receiver = place
        without = search.kept.at[sender, receiver].set(0)
        leads_on = (reads[:, receiver] & (search.kept > 0).any(axis=1)).any() | (receiver == reads.shape[1] - 1)

        def run(search: Search) -> Search:
            state = run_layers(plan.model, params, search.state, without, other, layers[receiver])
            loss = measure_loss(plan, params, prompts, clean, state, without)
            found = Search(without, loss, state, search.passes)
            rest = search._replace(passes=search.passes)
            chosen = jax.tree.map(lambda a, b: jnp.where(loss - search.loss < threshold, a, b), found, rest)
            return chosen._replace(passes=search.passes + 1)

        def skip(search: Search) -> Search:
            return search._replace(kept=jnp.where(sender < 0, search.kept, without))

        return jax.lax.cond((sender >= 0) & leads_on, run, skip, search), None

    return jax.lax.scan(visit, search, places)[0]
