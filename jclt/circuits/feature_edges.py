"""`score_feature_edges`: how much each feature of a coder matters to the metric through one other feature, as in sparse
feature circuits (2403.19647).

    edge(u -> d) = (u of the reference - u) (gradient of d by u) (gradient of the metric by d)

The gradient of d by u is direct: what u writes reaches d through the residual stream, attention and norms, while what
all MLPs in between write stays as it is. That of the metric by d is along all paths. Sources are all features, and the
errors as whole vectors; the last target is the metric itself, directly. Edges are averaged over pairs. The published
code has plain gradients; `rules` (`rules.py`) may make attention or norms constant.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jclt.circuits.gradients import Setting, differentiate, read_values
from jclt.circuits.node_scores import Reference, change_features
from jclt.circuits.nodes import Basis, encode_reads, find_basis, score_features
from jclt.circuits.passes import (
    Prompts,
    check_gradient_metric,
    check_reference,
    measure_metric,
    pad_prompts,
    run_pass,
    split_prompts,
    take_prompts,
)
from jclt.circuits.rules import make_activate, make_rules_edit, read_rules
from jclt.coders import Coder
from jclt.errors import UserError
from jclt.interventions.patching.metrics import Metric
from jclt.interventions.patching.pairs import PromptPairs
from jclt.interventions.resume import make_rows_mesh, place_weights
from jclt.models import Model, Place
from jclt.numerics import einsum
from jclt.shapes import Array, Float, Int, Params


@dataclass(frozen=True, eq=False, repr=False)
class FeatureEdges:
    """Edges into some features, and into the metric last. The last unit of a source's axis is the error."""

    targets: Int[np.ndarray, "n 3"]  # covered layer, position, feature
    edges: Float[np.ndarray, "t C T U"]
    gradients: Float[np.ndarray, "n"]  # of the metric by each target, averaged over pairs
    layers: tuple[int | None, ...]  # the model's layer of each covered one
    method_rules: tuple[str, ...]

    def __repr__(self) -> str:
        return (
            f"<FeatureEdges: {np.count_nonzero(self.edges):,} edges into {len(self.targets)} features and the metric>"
        )


class Targets(NamedTuple):
    """Features as arrays; padded where a feature's reach is shorter than another's."""

    indices: Int[Array, "n"]  # of covered layers
    layers: Int[Array, "n"]
    positions: Int[Array, "n"]
    features: Int[Array, "n"]
    encoders: Float[Array, "n D"]
    written: Int[Array, "n R"]  # layers
    decoders: Float[Array, "n R D"]


class StopAndShift(eqx.Module):
    """Stops gradients at a site, and adds to its values; each layer has its own part."""

    value: Array
    site: str = eqx.field(static=True)

    def __call__(self, place: Place, value: Array) -> Array:
        return jax.lax.stop_gradient(value) + self.value if place.site == self.site else value


def score_feature_edges(
    model: Model,
    coder: Coder,
    pairs: PromptPairs,
    targets: Int[np.ndarray, "n 3"],
    *,
    metric: Metric = "logit_difference",
    rules: str | Iterable[str] = (),
    reference: Reference = "corrupted",
) -> FeatureEdges:
    """Edges from all features and errors into the targets (covered layer, position, feature) and into the metric."""
    basis, names = find_basis(coder, model.config), read_rules(rules)
    check_gradient_metric(metric, pairs)
    check_reference(reference, pairs)
    prompts = pad_prompts(pairs)
    targets = check_targets(coder, basis, np.asarray(targets), prompts.clean.shape[1])
    setting = Setting(model.config, basis.site, metric, names, (coder.config.reads,))
    mesh, listed = make_rows_mesh(), list_targets(coder, targets, model.config.width)
    params, by_row = place_weights(model, mesh), NamedSharding(mesh, P("rows"))
    edges, gradients = [], []
    for numbers in split_prompts(model.config, pairs, mesh.size):
        _, first = np.unique(numbers, return_index=True)  # the last part repeats pairs
        weights = jnp.asarray(np.isin(np.arange(len(numbers)), first) / len(pairs), params["token_embedding"].dtype)
        part, weights = jax.device_put((take_prompts(prompts, numbers), weights), by_row)
        found = score_into_targets(setting, params, coder, part, weights, listed, reference == "zero")
        edges.append(np.asarray(found[0]))
        gradients.append(np.asarray(found[1]))
    layers = basis.list_layers(model.config)
    return FeatureEdges(targets, np.sum(edges, axis=0), np.sum(gradients, axis=0), layers, names)


def check_targets(coder: Coder, basis: Basis, targets: np.ndarray, length: int) -> Int[np.ndarray, "n 3"]:
    if coder.config.reads == coder.config.writes:
        raise UserError(f"coder: reads and writes {coder.config.reads}, expected one that reads before it writes")
    sizes = np.array([len(basis.covered), length, coder.config.features])
    if targets.ndim != 2 or targets.shape[1] != 3:
        raise UserError(f"targets: shape {list(targets.shape)}, expected rows of covered layer, position and feature")
    outside = ((targets < 0) | (targets >= sizes)).any(axis=1)
    if outside.any():
        raise UserError(f"target {targets[outside][0].tolist()}: expected numbers below {sizes.tolist()}")
    return targets.astype(np.int64)


def list_targets(coder: Coder, targets: Int[np.ndarray, "n 3"], width: int) -> Targets:
    covered, (indices, positions, features) = np.array(coder.config.covered), targets.T
    reach = max(coder.config.reach(i) for i in range(len(covered)))
    encoders, written = np.zeros((len(targets), width)), np.zeros((len(targets), reach), int)
    decoders = np.zeros((len(targets), reach, width))
    for index in np.unique(indices):
        own = indices == index
        rows = np.asarray(coder.take_decoder_rows(int(index), features[own]), np.float64)
        encoders[own] = np.asarray(coder.load_encoder(int(index)).encoder(0)[0])[features[own]]
        decoders[own, : rows.shape[1]] = rows
        written[own, : rows.shape[1]] = covered[index : index + rows.shape[1]]
    columns = (indices, covered[indices], positions, features, encoders, written, decoders)
    return Targets(*(jnp.asarray(column) for column in columns))


@partial(jax.jit, static_argnames=("setting", "to_zero"))
@jax.named_scope("score_feature_edges")
def score_into_targets(
    setting: Setting,
    params: Params,
    coder: Any,
    prompts: Prompts,
    weights: Float[Array, "P"],
    targets: Targets,
    to_zero: bool,
) -> tuple[Float[Array, "t C T U"], Float[Array, "n"]]:
    """The edges, and the metric's gradients, summed over pairs with these weights."""
    config, site, (read_site,) = setting.model, setting.site, setting.reads
    clean = read_values(setting, params, prompts.clean, prompts.last)
    other = None if to_zero else read_values(setting, params, prompts.corrupted, prompts.last)
    changes = change_features(coder, clean, other)
    active = jnp.stack(encode_reads(coder, clean[read_site])) > 0
    gradient = differentiate(setting, params, prompts, prompts.clean, clean[site])

    def read(added: Array) -> tuple[Array, Array]:
        options: Any = {"edit": make_rules_edit(config, setting.rules), "activate": make_activate(setting.rules)}
        options |= {"layer_edit": StopAndShift(added, site), "capture": (read_site,)}
        logits, seen = run_pass(config, params, prompts.clean, prompts.last, **options)
        return seen[read_site], measure_metric(setting.metric, logits, prompts.answers)

    (reads, metric), back = jax.vjp(read, jnp.zeros_like(clean[site]))

    def sum_edges(at_reads: Array, at_metric: Array) -> Float[Array, "C T U"]:
        scores = score_features(coder, *changes, back((at_reads, at_metric))[0])
        return einsum("p,pctu->ctu", weights, scores)

    def score_target(target: Targets) -> tuple[Array, Array]:
        dtype = reads.dtype
        of_metric = einsum("rpd,rd->p", gradient[target.written, :, target.positions], target.decoders.astype(dtype))
        of_metric = of_metric * active[target.indices, :, target.positions, target.features].astype(dtype)
        into = of_metric[:, None] * target.encoders.astype(dtype)[None]
        at_reads = jnp.zeros_like(reads).at[target.layers, :, target.positions].set(into)
        return sum_edges(at_reads, jnp.zeros_like(metric)), einsum("p,p->", weights, of_metric)

    edges, gradients = jax.lax.map(score_target, targets)
    direct = sum_edges(jnp.zeros_like(reads), jnp.ones_like(metric))
    return jnp.concatenate([edges, direct[None]]), gradients
