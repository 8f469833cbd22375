"""The methods of `score_edges`, each for some pairs: scores `[P, s, r]`, and the metric of the clean run and with every
edge replaced."""

from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jclt.circuits.edge_ablations import Replacement
from jclt.circuits.edge_gradients import Moves, compute_gradients, multiply
from jclt.circuits.edge_runs import (
    EdgeState,
    Writes,
    begin_edges,
    collect_writes,
    list_write_sites,
    read_logits,
    run_layers,
)
from jclt.circuits.edges import (
    ByReceiver,
    count_groups,
    count_readers,
    find_groups,
    find_receiver_layers,
    list_edges,
)
from jclt.circuits.gradients import sum_weighted
from jclt.circuits.passes import Prompts, measure_metric, run_pass
from jclt.errors import UserError
from jclt.interventions.patching.metrics import check_metric
from jclt.interventions.patching.pairs import PromptPairs
from jclt.models import ModelConfig
from jclt.numerics import einsum
from jclt.shapes import Array, Float, Int, Params, Stream

EdgeMetric = Literal["logit_difference", "probability", "difference", "kl"]
Moved = Literal["inputs", "each", "each, averaged"]
"""What goes from the clean run to what replaces it: the embeddings, or one group of senders at a time."""
Points = tuple[Float[Array, "n"], Float[Array, "n"]]
"""Points between the clean run (0) and what replaces it (1), and their weights."""
Found = tuple[Float[Array | np.ndarray, "P s r"], Float[Array, "P"], Float[Array, "P"]]
ROW_TOKENS = 1024
"""Of the passes that run at once where each edge has a pass."""


class EdgePlan(NamedTuple):
    """What programs are compiled for."""

    model: ModelConfig
    metric: EdgeMetric
    rules: tuple[str, ...] = ()
    moved: Moved = "inputs"


class Sides(NamedTuple):
    """The clean run of some pairs, and what replacing does to it."""

    clean: dict[str, Array]  # by site
    clean_writes: Writes
    changes: Float[Array, "s P T D"]  # what goes along replaced edges, minus what senders write in the clean run
    clean_logits: Float[Array, "P V"]
    ablated_logits: Float[Array, "P V"]  # with every edge replaced


def run_sides(plan: EdgePlan, params: Params, prompts: Prompts, other: Writes) -> Sides:
    config = plan.model
    sites = (*list_write_sites(config), "resid_post")
    logits, clean = run_pass(config, params, prompts.clean, prompts.last, capture=sites)
    writes = collect_writes(config, params, clean)
    changes = other.stack() - writes.stack()
    ablated = read_replaced(config, params, clean["resid_post"][-1], changes, prompts.last)
    return Sides(dict(clean), writes, changes, logits, ablated)


def read_replaced(
    config: ModelConfig, params: Params, stream: Stream, changes: Float[Array, "s P T D"], last: Int[Array, "P"]
) -> Float[Array, "P V"]:
    """The logits with every sender replaced, of the last residual stream without it."""
    none = jnp.zeros(list_edges(config).shape, stream.dtype)
    return read_logits(config, params, EdgeState(stream[None], changes), none, last)


def check_edge_metric(metric: str, pairs: PromptPairs) -> None:
    check_metric(metric, pairs)
    if metric not in get_args(EdgeMetric):
        raise UserError(f"metric '{metric}': expected one of: {', '.join(get_args(EdgeMetric))}")


@partial(jax.jit, static_argnames=("plan",))
@jax.named_scope("score_edges")
def score_by_gradients(plan: EdgePlan, params: Params, prompts: Prompts, other: Replacement, curve: Points) -> Found:
    config = plan.model
    sides = run_sides(plan, params, prompts, other.writes)
    changes, ends = sides.changes, measure_sides(plan, prompts, sides)
    measure = partial(measure_metric, plan.metric, clean=sides.clean_logits, answers=prompts.answers)

    def average(group: Array | None) -> ByReceiver:
        """Over the points; only a group of senders moves, or the inputs and all that follows from them."""

        def differentiate(point: Array) -> ByReceiver:
            moves = make_moves(sides, other, group, point)
            return compute_gradients(config, params, prompts.clean, prompts.last, measure, moves, plan.rules)

        return sum_weighted(differentiate, *curve)

    if plan.moved == "inputs":
        return multiply(changes, average(None)), *ends
    groups = jnp.arange(count_groups(config))
    if plan.moved == "each, averaged":
        equal = jnp.full(len(groups), 1 / len(groups), changes.dtype)
        return multiply(changes, sum_weighted(average, groups, equal)), *ends
    group_of = jnp.asarray(find_groups(config))

    def add(total: Array, group: Array) -> tuple[Array, None]:
        own = changes * (group_of == group).astype(changes.dtype)[:, None, None, None]
        return total + multiply(own, average(group)), None

    like = jax.eval_shape(multiply, changes, jax.eval_shape(average, groups[0]))
    return jax.lax.scan(add, jnp.zeros(like.shape, like.dtype), groups)[0], *ends


def make_moves(sides: Sides, other: Replacement, group: Array | None, point: Array) -> Moves:
    """What moves a group of senders from the clean run to what replaces it: the inputs (0 and None), the heads of layer
    l (2 l + 1) or its MLP (2 l + 2)."""
    embeddings = point * sides.changes[0]
    if group is None:
        return Moves(embeddings, {})
    layers = {}
    for site, value, first in (("head_out", other.heads, 1), ("mlp_out", other.writes.layers[:, -1], 2)):
        change = value - sides.clean[site]
        moved = jnp.arange(len(change)) * 2 + first == group
        layers[site] = jnp.where(moved.reshape(-1, *(1,) * (change.ndim - 1)), point * change, 0)
    return Moves(jnp.where(group == 0, embeddings, 0), layers)


def measure_sides(plan: EdgePlan, prompts: Prompts, sides: Sides) -> tuple[Float[Array, "P"], Float[Array, "P"]]:
    """The metric of the clean run, and with every edge replaced."""
    clean = sides.clean_logits
    return (
        measure_metric(plan.metric, clean, prompts.answers),
        measure_metric(plan.metric, sides.ablated_logits, prompts.answers, clean),
    )


@partial(jax.jit, static_argnames=("plan",))
@jax.named_scope("score_edges")
def score_by_flow(plan: EdgePlan, params: Params, prompts: Prompts, other: Replacement, curve: Points) -> Found:
    config = plan.model
    sides = run_sides(plan, params, prompts, other.writes)
    sites = ("resid_pre", "resid_mid", "resid_post")
    _, seen = run_pass(config, params, prompts.clean, prompts.last, capture=sites)
    writes = sides.clean_writes.stack()
    counted = (jnp.arange(prompts.clean.shape[1], dtype=prompts.last.dtype)[None] <= prompts.last[:, None]).astype(
        writes.dtype
    )

    def share(stream_and_senders: tuple[Stream, Array]) -> Float[Array, "s P"]:
        stream, senders = stream_and_senders
        size = jnp.abs(stream).sum(axis=-1)[None]
        near = jnp.maximum(size - jnp.abs(stream[None] - writes).sum(axis=-1), 0) * senders[:, None, None]
        total = near.sum(axis=0, keepdims=True)
        shares = near / jnp.where(total == 0, 1, total)
        return einsum("spt,pt->sp", shares, counted) / counted.sum(axis=1)[None]

    # The receivers of a layer's attention read one stream, so one of them stands for all.
    edges, counts = list_edges(config), count_readers(config)
    ends = np.cumsum(np.tile([sum(list(counts.values())[:-1]), 1], config.layers)) - 1
    streams = jnp.stack([seen["resid_pre"], seen["resid_mid"]], axis=1).reshape(-1, *writes.shape[1:])
    streams = jnp.concatenate([streams, seen["resid_post"][-1:]])
    which = np.searchsorted([*ends, ends[-1] + 1], np.arange(edges.shape[1]))
    senders = jnp.asarray(edges[:, [*ends, ends[-1] + 1]].T, writes.dtype)
    shares = jax.lax.map(share, (streams, senders))
    return shares[which].transpose(2, 1, 0), *measure_sides(plan, prompts, sides)


def score_exactly(plan: EdgePlan, params: Params, prompts: Prompts, other: Replacement, curve: Points) -> Found:
    edges = list_edges(plan.model)
    receivers, senders = np.nonzero(edges.T)  # sorted by the receiver: a pass needs no layer below the first of some
    places = np.stack([senders, receivers], axis=1).astype(np.int32)
    clean, ablated, *begun = begin_exactly(plan, params, prompts, other.writes)
    scores = np.zeros((len(prompts.last), *edges.shape), clean.dtype)
    rows = max(ROW_TOKENS // prompts.clean.size, 1)
    size = min(-(-len(places) // rows), 16) * rows
    for first in range(0, len(places), size):
        some = places[first : first + size]
        batches = np.resize(some, (size, 2)).reshape(-1, rows, 2)
        found = np.asarray(replace_each(plan, params, prompts, *begun, other.writes, batches)).reshape(size, -1)[
            : len(some)
        ]
        scores[:, some[:, 0], some[:, 1]] = (found - np.asarray(clean)[None]).T
    return scores, clean, ablated


@partial(jax.jit, static_argnames=("plan",))
def begin_exactly(
    plan: EdgePlan, params: Params, prompts: Prompts, other: Writes
) -> tuple[Array, Array, Float[Array, "P V"], EdgeState]:
    """The metric of both runs, the clean logits, and the clean run."""
    config = plan.model
    clean, _ = run_pass(config, params, prompts.clean, prompts.last)
    every = jnp.ones(list_edges(config).shape, clean.dtype)
    state = run_layers(config, params, begin_edges(config, params, prompts.clean, other), every, other, 0)
    ablated = read_replaced(config, params, state.streams[-1], state.changes, prompts.last)
    before = measure_metric(plan.metric, clean, prompts.answers)
    return before, measure_metric(plan.metric, ablated, prompts.answers, clean), clean, state


@partial(jax.jit, static_argnames=("plan",))
@jax.named_scope("replace_edges")
def replace_each(
    plan: EdgePlan,
    params: Params,
    prompts: Prompts,
    clean_logits: Float[Array, "P V"],
    state: EdgeState,
    other: Writes,
    places: Int[Array, "b n 2"],
) -> Float[Array, "b n P"]:
    """The metric with each of these edges replaced, a batch at a time."""
    config, layers = plan.model, jnp.asarray(find_receiver_layers(plan.model))
    kept = jnp.ones(list_edges(config).shape, clean_logits.dtype)

    def measure_batch(places: Int[Array, "n 2"]) -> Float[Array, "n P"]:
        first = layers[places[:, 1]].min()

        def measure(place: Int[Array, "2"]) -> Float[Array, "P"]:
            without = kept.at[place[0], place[1]].set(0)
            after = run_layers(config, params, state, without, other, first)
            logits = read_logits(config, params, after, without, prompts.last)
            return measure_metric(plan.metric, logits, prompts.answers, clean_logits)

        return jax.vmap(measure)(places)

    return jax.lax.map(measure_batch, places)
