"""The methods of `score_edges`, each for some pairs: scores `[P, s, r]`, and the metric of both runs."""

from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

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
    list_receivers,
    list_senders,
)
from jclt.circuits.gradients import sum_weighted
from jclt.circuits.passes import Prompts, measure_metric, run_pass, split_evenly
from jclt.errors import UserError
from jclt.interventions.patching.metrics import check_metric
from jclt.interventions.patching.pairs import PromptPairs
from jclt.models import ModelConfig
from jclt.numerics import einsum
from jclt.shapes import Array, Float, Int, Params, Stream

EdgeMetric = Literal["logit_difference", "probability", "difference", "kl"]
Moved = Literal["inputs", "each", "each, averaged"]
"""What goes from the clean to the corrupted run: the embeddings, or one group of senders at a time."""
Points = tuple[Float[Array, "n"], Float[Array, "n"]]
"""Points between the clean (0) and the corrupted run (1), and their weights."""
Found = tuple[Float[Array | np.ndarray, "P s r"], Float[Array, "P"], Float[Array, "P"]]
BATCH_BYTES = {"cpu": 2**29}
"""Of what senders write and of receivers' gradients, at once."""
ROW_TOKENS = 1024
"""Of the passes that run at once where each edge has a pass."""


class EdgePlan(NamedTuple):
    """What programs are compiled for."""

    model: ModelConfig
    metric: EdgeMetric
    rules: tuple[str, ...] = ()
    moved: Moved = "inputs"


class Sides(NamedTuple):
    """The clean and the corrupted run of some pairs."""

    clean: dict[str, Array]  # by site
    corrupted: dict[str, Array]
    clean_logits: Float[Array, "P V"]
    corrupted_logits: Float[Array, "P V"]

    def subtract(self, config: ModelConfig, params: Params) -> Float[Array, "s P T D"]:
        """What senders write in the corrupted run, minus what they write in the clean one."""
        clean, corrupted = (collect_writes(config, params, side) for side in (self.clean, self.corrupted))
        return corrupted.stack() - clean.stack()


def run_sides(plan: EdgePlan, params: Params, prompts: Prompts) -> Sides:
    sites = list_write_sites(plan.model)
    (clean_logits, clean), (corrupted_logits, corrupted) = (
        run_pass(plan.model, params, tokens, prompts.last, capture=sites)
        for tokens in (prompts.clean, prompts.corrupted)
    )
    return Sides(dict(clean), dict(corrupted), clean_logits, corrupted_logits)


def check_edge_metric(metric: str, pairs: PromptPairs) -> None:
    check_metric(metric, pairs)
    if metric not in get_args(EdgeMetric):
        raise UserError(f"metric '{metric}': expected one of: {', '.join(get_args(EdgeMetric))}")


def split_pairs_for_edges(config: ModelConfig, pairs: PromptPairs, devices: int) -> list[Int[np.ndarray, "n"]]:
    """The numbers of the pairs that run at once."""
    vectors = len(list_senders(config)) + 2 * len(list_receivers(config))
    bytes_of_pair = 4 * config.width * vectors * max(map(len, pairs.clean))
    most = max(BATCH_BYTES.get(jax.default_backend(), 2**33) // bytes_of_pair, 1)
    return split_evenly(len(pairs), most, devices)


@partial(jax.jit, static_argnames=("plan",))
@jax.named_scope("score_edges")
def score_by_gradients(plan: EdgePlan, params: Params, prompts: Prompts, curve: Points) -> Found:
    config = plan.model
    sides = run_sides(plan, params, prompts)
    changes = sides.subtract(config, params)
    clean, corrupted = measure_sides(plan, prompts, sides)
    measure = partial(measure_metric, plan.metric, clean=sides.clean_logits, answers=prompts.answers)

    def average(group: Array | None) -> ByReceiver:
        """Over the points; only a group of senders moves, or the inputs and all that follows from them."""

        def differentiate(point: Array) -> ByReceiver:
            moves = make_moves(sides, group, point)
            return compute_gradients(config, params, prompts.clean, prompts.last, measure, moves, plan.rules)

        return sum_weighted(differentiate, *curve)

    if plan.moved == "inputs":
        return multiply(changes, average(None)), clean, corrupted
    groups = jnp.arange(count_groups(config))
    if plan.moved == "each, averaged":
        equal = jnp.full(len(groups), 1 / len(groups), changes.dtype)
        return multiply(changes, sum_weighted(average, groups, equal)), clean, corrupted
    group_of = jnp.asarray(find_groups(config))

    def add(total: Array, group: Array) -> tuple[Array, None]:
        own = changes * (group_of == group).astype(changes.dtype)[:, None, None, None]
        return total + multiply(own, average(group)), None

    like = jax.eval_shape(multiply, changes, jax.eval_shape(average, groups[0]))
    return jax.lax.scan(add, jnp.zeros(like.shape, like.dtype), groups)[0], clean, corrupted


def make_moves(sides: Sides, group: Array | None, point: Array) -> Moves:
    """What moves a group of senders from the clean to the corrupted run: the inputs (0 and None), the heads of layer l
    (2 l + 1) or its MLP (2 l + 2)."""
    embeddings = point * (sides.corrupted["token_embedding"] - sides.clean["token_embedding"])
    if group is None:
        return Moves(embeddings, {})
    layers = {}
    for site, first in (("head_out", 1), ("mlp_out", 2)):
        change = sides.corrupted[site] - sides.clean[site]
        moved = jnp.arange(len(change)) * 2 + first == group
        layers[site] = jnp.where(moved.reshape(-1, *(1,) * (change.ndim - 1)), point * change, 0)
    return Moves(jnp.where(group == 0, embeddings, 0), layers)


def measure_sides(plan: EdgePlan, prompts: Prompts, sides: Sides) -> tuple[Float[Array, "P"], Float[Array, "P"]]:
    """The metric of the clean and of the corrupted run."""
    clean = sides.clean_logits
    return (
        measure_metric(plan.metric, clean, prompts.answers),
        measure_metric(plan.metric, sides.corrupted_logits, prompts.answers, clean),
    )


@partial(jax.jit, static_argnames=("plan",))
@jax.named_scope("score_edges")
def score_by_flow(plan: EdgePlan, params: Params, prompts: Prompts, curve: Points) -> Found:
    config = plan.model
    sides = run_sides(plan, params, prompts)
    sites = ("resid_pre", "resid_mid", "resid_post")
    _, seen = run_pass(config, params, prompts.clean, prompts.last, capture=sites)
    writes = collect_writes(config, params, sides.clean).stack()
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


def score_exactly(plan: EdgePlan, params: Params, prompts: Prompts, curve: Points) -> Found:
    edges = list_edges(plan.model)
    receivers, senders = np.nonzero(edges.T)  # sorted by the receiver: a pass needs no layer below the first of some
    places = np.stack([senders, receivers], axis=1).astype(np.int32)
    clean, corrupted, *begun = begin_exactly(plan, params, prompts)
    scores = np.zeros((len(prompts.last), *edges.shape), clean.dtype)
    rows = max(ROW_TOKENS // prompts.clean.size, 1)
    size = min(-(-len(places) // rows), 16) * rows
    for first in range(0, len(places), size):
        some = places[first : first + size]
        batches = np.resize(some, (size, 2)).reshape(-1, rows, 2)
        found = np.asarray(replace_each(plan, params, prompts, *begun, batches)).reshape(size, -1)[: len(some)]
        scores[:, some[:, 0], some[:, 1]] = (found - np.asarray(clean)[None]).T
    return scores, clean, corrupted


@partial(jax.jit, static_argnames=("plan",))
def begin_exactly(
    plan: EdgePlan, params: Params, prompts: Prompts
) -> tuple[Array, Array, Float[Array, "P V"], Writes, EdgeState]:
    """The metric of both runs, the clean logits, what the corrupted run writes, and the clean run."""
    config, sides = plan.model, run_sides(plan, params, prompts)
    other = collect_writes(config, params, sides.corrupted)
    every = jnp.ones(list_edges(config).shape, sides.clean_logits.dtype)
    state = run_layers(config, params, begin_edges(config, params, prompts.clean, other), every, other, 0)
    return *measure_sides(plan, prompts, sides), sides.clean_logits, other, state


@partial(jax.jit, static_argnames=("plan",))
@jax.named_scope("replace_edges")
def replace_each(
    plan: EdgePlan,
    params: Params,
    prompts: Prompts,
    clean_logits: Float[Array, "P V"],
    other: Writes,
    state: EdgeState,
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
