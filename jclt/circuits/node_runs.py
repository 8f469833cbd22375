"""Runs of the model in which all nodes outside a circuit are ablated: `run_circuits`.

The nodes of the circuit stay free: they react to what the ablated ones do. An ablated node has

    zero            the value 0
    mean            the mean of its values at its position over the corrupted prompts (over the clean ones without them)
    resample        its value in another pair's clean prompt of the same length
    counterfactual  its value in the pair's own corrupted prompt
"""

from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jclt.circuits.gradients import Setting, read_values
from jclt.circuits.nodes import Basis, encode_reads, find_basis, find_errors
from jclt.circuits.passes import (
    Prompts,
    average_positions,
    check_gradient_metric,
    measure_metric,
    pad_prompts,
    run_pass,
    split_prompts,
    take_prompts,
)
from jclt.coders import Coder
from jclt.errors import UserError
from jclt.interventions.patching.metrics import Metric
from jclt.interventions.patching.pairs import PromptPairs
from jclt.interventions.patching.patch import check_source, choose_donors
from jclt.interventions.patching.runs import check_corrupted
from jclt.interventions.resume import make_rows_mesh, place_weights
from jclt.models import LAYER_SITES, Model, Place, forward
from jclt.shapes import Array, Bool, Float, Int, Params

Ablation = Literal["zero", "mean", "resample", "counterfactual"]
NodeValues = tuple[Float[Array, "L _ T ..."], ...]
"""Of a site, its values; of a coder, its features and its errors. The axis of pairs may have one entry for all."""


class Keep(eqx.Module):
    """Keeps a site's values at some nodes and puts others elsewhere. In a scan over layers each has its own part."""

    keep: Bool[Array, "... T U"]
    other: Float[Array, "..."]
    site: str = eqx.field(static=True)

    def __call__(self, place: Place, value: Array) -> Array:
        if place.site != self.site:
            return value
        keep = self.keep.reshape(1, *value.shape[1:-1], -1)
        return jnp.where(keep, value, self.other.astype(value.dtype))


class KeepFeatures:
    """Keeps some features and errors of a coder, as the changed pass has them, and puts others elsewhere."""

    def __init__(self, coder: Coder, keep: Bool[Array, "C T U"], other: NodeValues):
        self.coder, self.keep, self.other = coder, keep, other
        self.found: list[Array] = []  # activations of the layers so far, as the pass has them
        self.put: list[Array] = []  # those with which it goes on
        self.read: Array | None = None

    def __call__(self, place: Place, value: Array) -> Array:
        coder, config = self.coder, self.coder.config
        index = config.index(place.layer)
        if index is None:
            return value
        keep, (features, errors) = self.keep[index][None], self.other
        if place.site == config.reads:
            found = coder.encode(index, value)
            self.found.append(found)
            self.put.append(jnp.where(keep[..., :-1], found, features[index].astype(found.dtype)))
            self.read = value
        if place.site != config.writes:
            return value
        assert self.read is not None
        error = value - coder.write(index, self.found, self.read)
        error = jnp.where(keep[..., -1:], error, errors[index].astype(error.dtype))
        return coder.write(index, self.put, self.read) + error


class CircuitRuns(NamedTuple):
    """What all circuits of one call share."""

    setting: Setting
    coder: Any
    params: Params
    mesh: Mesh


def run_circuits(
    model: Model,
    pairs: PromptPairs,
    basis: str | Basis | Coder,
    circuits: Bool[np.ndarray, "C L T U"],
    *,
    ablation: Ablation = "mean",
    mean_of: PromptPairs | None = None,
    metric: Metric = "logit_difference",
    seed: int = 0,
) -> Float[np.ndarray, "C P"]:
    """The metric of each pair's clean prompt with all nodes outside each circuit ablated.

    `circuits` has the axes of `NodeScores.values`. The means are of `pairs` themselves, or of other pairs.
    """
    found = find_basis(basis, model.config)
    check_gradient_metric(metric, pairs)
    check_ablation(ablation, pairs)
    prompts = pad_prompts(pairs)
    shape = (len(found.list_layers(model.config)), prompts.clean.shape[1])
    if circuits.ndim != 4 or circuits.shape[1:3] != shape or circuits.dtype != bool:
        raise UserError(
            f"circuits: {circuits.dtype} of shape {circuits.shape}, expected booleans "
            f"[circuits, {shape[0]} layers, {shape[1]} positions, units]"
        )
    reads = () if found.coder is None else (found.coder.config.reads,)
    mesh = make_rows_mesh()
    params = place_weights(model, mesh)
    runs = CircuitRuns(Setting(model.config, found.site, metric, (), reads), found.coder, params, mesh)
    mean = average_nodes(runs, mean_of or pairs, shape[1]) if ablation == "mean" else None
    donors = choose_donors(pairs, seed) if ablation == "resample" else np.arange(len(pairs))
    parts: list[np.ndarray] = []
    for numbers in split_prompts(model.config, pairs, mesh.size):
        part = place_prompts(runs, take_prompts(prompts, numbers))
        if mean is not None:
            other = mean
        elif ablation == "resample":
            other = read_nodes(runs, place_prompts(runs, take_prompts(prompts, donors[numbers])), "clean")
        else:
            other = read_nodes(runs, part, "corrupted" if ablation == "counterfactual" else "clean")
            other = jax.tree.map(jnp.zeros_like, other) if ablation == "zero" else other
        values = [run_circuit(runs.setting, params, runs.coder, part, keep, other) for keep in circuits]
        parts.append(np.stack([np.asarray(row) for row in values]))
    return np.concatenate(parts, axis=1)[:, : len(pairs)]


def check_ablation(ablation: str, pairs: PromptPairs) -> None:
    if ablation not in get_args(Ablation):
        raise UserError(f"ablation '{ablation}': expected one of: {', '.join(get_args(Ablation))}")
    if ablation == "counterfactual":
        check_corrupted(pairs)
    if ablation == "resample":
        check_source(pairs, (), "resample", "noising")


def place_prompts(runs: CircuitRuns, prompts: Prompts) -> Prompts:
    return jax.device_put(prompts, NamedSharding(runs.mesh, P("rows")))


def read_nodes(runs: CircuitRuns, prompts: Prompts, side: str) -> NodeValues:
    tokens = prompts.clean if side == "clean" else prompts.corrupted
    return _read_nodes(runs.setting, runs.params, runs.coder, tokens, prompts.last)


@partial(jax.jit, static_argnames=("setting",))
def _read_nodes(
    setting: Setting, params: Params, coder: Any, tokens: Int[Array, "P T"], last: Int[Array, "P"]
) -> NodeValues:
    values = read_values(setting, params, tokens, last)
    if coder is None:
        return (values[setting.site],)
    reads, writes = values[coder.config.reads], values[coder.config.writes]
    activations = encode_reads(coder, reads)
    return jnp.stack(activations), jnp.stack(find_errors(coder, activations, reads, writes))


def average_nodes(runs: CircuitRuns, pairs: PromptPairs, length: int) -> NodeValues:
    """The mean at each position over the corrupted prompts that reach it; 0 where none does."""
    side = "clean" if any(ids is None for ids in pairs.corrupted) else "corrupted"
    parts = split_prompts(runs.setting.model, pairs, 1)
    return average_positions(lambda prompts: read_nodes(runs, prompts, side), pairs, parts, length)


@partial(jax.jit, static_argnames=("setting",))
@jax.named_scope("run_circuit")
def run_circuit(
    setting: Setting,
    params: Params,
    coder: Any,
    prompts: Prompts,
    keep: Bool[Array, "L T U"],
    other: NodeValues,
) -> Float[Array, "P"]:
    """The metric of each pair."""
    config, tokens, last = setting.model, prompts.clean, prompts.last
    if coder is not None:
        edit = KeepFeatures(coder, keep, other)
        logits = forward(config, params, tokens, edit=edit, unroll=True)[0]
        logits = jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]
    elif setting.site in LAYER_SITES:
        kept = Keep(keep, other[0], setting.site)
        logits, _ = run_pass(config, params, tokens, last, layer_edit=kept)
    else:
        logits, _ = run_pass(config, params, tokens, last, edit=Keep(keep[0], other[0][0], setting.site))
    return measure_metric(setting.metric, logits, prompts.answers)
