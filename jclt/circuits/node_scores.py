"""`score_nodes`: how much each node of a circuit matters to the metric, estimated by gradients or measured.

A score estimates how the metric of the clean run changes if one node alone takes its value of the other run:

    score = (value of the reference - value of the clean run) x gradient

| method | gradient |
|---|---|
| atp | at the clean run (attribution patching) |
| relp | the same under the rules of relevance patching |
| gim | the same under GIM's rules |
| ig inputs, ig activations | averaged between the runs (`gradients.py`) |
| saturation fix | as atp, with exact softmaxes for queries and keys (`saturation.py`) |
| exact | none: each node is patched (`exact.py`) |

A node that supports the answer has a negative score. The reference is the corrupted run, or zero: then the score is
minus value x gradient, and needs no corrupted prompt.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jclt.circuits.exact import patch_nodes
from jclt.circuits.gradients import (
    Setting,
    average_over_activations,
    average_over_inputs,
    change_values,
    find_points,
    list_read_sites,
    read_and_differentiate,
    read_values,
)
from jclt.circuits.nodes import Basis, encode_reads, find_basis, find_errors, locate_nodes, score_features, score_units
from jclt.circuits.passes import (
    Prompts,
    check_gradient_metric,
    check_reference,
    pad_prompts,
    split_prompts,
    take_prompts,
)
from jclt.circuits.rules import RULE_SETS, read_rules
from jclt.circuits.saturation import score_exact_softmax
from jclt.coders import Coder
from jclt.errors import UserError
from jclt.interventions.patching.metrics import Metric
from jclt.interventions.patching.pairs import PromptPairs
from jclt.interventions.resume import make_rows_mesh, place_weights
from jclt.models import Model
from jclt.shapes import Array, Float, Int, Params, Tokens

Reference = Literal["corrupted", "zero"]
METHODS = ("atp", "relp", "gim", "ig inputs", "ig activations", "saturation fix", "exact")


@dataclass(frozen=True, eq=False, repr=False)
class NodeScores:
    """The scores of all nodes of a basis, for each pair. Positions beyond a prompt's end have scores of 0."""

    per_pair: Float[np.ndarray, "P L T U"]
    basis: Basis
    layers: tuple[int | None, ...]  # the model's layer of each entry of the axis of layers
    method: str
    rules: tuple[str, ...]
    metric: Metric
    reference: Reference
    pairs: PromptPairs

    @property
    def values(self) -> Float[np.ndarray, "L T U"]:
        """The mean over pairs, position by position."""
        return self.per_pair.mean(axis=0)

    @property
    def over_positions(self) -> Float[np.ndarray, "L U"]:
        """Summed over positions, then averaged over pairs: for prompts whose positions do not correspond."""
        return self.per_pair.sum(axis=2).mean(axis=0)

    def rank_nodes(self, by: Literal["size", "support"] = "size") -> Int[np.ndarray, "N"]:
        """The numbers of all nodes in `values`, best first: those with the largest scores of either sign, or those that
        support the answer most."""
        if by not in ("size", "support"):
            raise UserError(f"rank_nodes by '{by}': expected 'size' or 'support'")
        flat = self.values.ravel()
        return np.argsort(-np.abs(flat) if by == "size" else flat, kind="stable")

    def __repr__(self) -> str:
        count, pairs = self.values.size, len(self.pairs)
        return f"<NodeScores: {self.method} of {count:,} nodes ({self.basis.name}) over {pairs} pairs>"

    def summarize(self, shown: int = 10) -> str:
        """The nodes with the largest scores, as text."""
        lines = [repr(self)]
        for layer, position, unit in locate_nodes(self.values.shape, self.rank_nodes()[:shown]).tolist():
            is_error = self.basis.coder is not None and unit == self.values.shape[2] - 1
            name = f"position {position} {'error' if is_error else f'unit {unit}'}"
            name = name if self.layers[layer] is None else f"layer {self.layers[layer]} {name}"
            lines.append(f"  {self.values[layer, position, unit]:+9.4f}  {name}")
        return "\n".join(lines)


class Plan(NamedTuple):
    """How scores are computed; programs are compiled for it."""

    setting: Setting
    method: str
    whole: bool
    reference: Reference
    at: Literal["clean", "corrupted"]


def score_nodes(
    model: Model,
    pairs: PromptPairs,
    basis: str | Basis | Coder = "neurons",
    method: str = "relp",
    *,
    metric: Metric = "logit_difference",
    rules: str | Iterable[str] | None = None,
    reference: Reference = "corrupted",
    at: Literal["clean", "corrupted"] = "clean",
    quadrature: str = "gauss",
    steps: int = 5,
) -> NodeScores:
    """Scores of all nodes of a basis (`nodes.py`), by a method of `METHODS`.

    rules       of the backward pass (`rules.py`): a set by name, or rules; by default the method's own
    at          the run whose gradient counts; of corrupted, the score is still an estimate of the same change
    quadrature  of integrated gradients, with `steps` points: gauss, midpoint, left or right (`gradients.py`)
    """
    found = find_basis(basis, model.config)
    plan = make_plan(model, pairs, found, method, metric, rules, reference, at)
    points, weights = find_points(quadrature, steps)
    layers = found.list_layers(model.config)
    prompts = pad_prompts(pairs)
    parts: list[np.ndarray] = []
    mesh = make_rows_mesh()
    params = place_weights(model, mesh)
    dtype = params["token_embedding"].dtype
    curve = (jnp.asarray(points, dtype), jnp.asarray(weights, dtype))
    for numbers in split_prompts(model.config, pairs, mesh.size):
        part = jax.device_put(take_prompts(prompts, numbers), NamedSharding(mesh, P("rows")))
        if method == "exact":
            scores = patch_nodes(plan.setting, params, part, found.whole, reference == "zero")
        elif method == "saturation fix":
            scores = score_exact_softmax(plan.setting, params, part, reference == "zero")
        elif found.coder is not None:
            scores = score_part_of_coder(plan, params, found.coder, part, curve)
        else:
            scores = score_part(plan, params, part, curve)
        parts.append(np.asarray(scores))
    per_pair = (parts[0] if len(parts) == 1 else np.concatenate(parts))[: len(pairs)]
    has_token = mark_tokens(pairs, per_pair.shape[2])
    if not has_token.all():
        per_pair = np.where(has_token[:, None, :, None], per_pair, 0)
    return NodeScores(per_pair, found, layers, method, plan.setting.rules, metric, reference, pairs)


def mark_tokens(pairs: PromptPairs, length: int) -> np.ndarray:
    """Where each clean prompt has tokens, `[P, T]`."""
    lengths = np.array([len(ids) for ids in pairs.clean])
    return np.arange(length)[None] < lengths[:, None]


def make_plan(
    model: Model,
    pairs: PromptPairs,
    basis: Basis,
    method: str,
    metric: Metric,
    rules: str | Iterable[str] | None,
    reference: Reference,
    at: Literal["clean", "corrupted"],
) -> Plan:
    """What all parts share, after all checks."""
    if method not in METHODS:
        raise UserError(f"method '{method}': does not exist, expected one of: {', '.join(METHODS)}")
    check_gradient_metric(metric, pairs)
    check_reference(reference, pairs)
    if at not in ("clean", "corrupted") or (at == "corrupted" and (method.startswith(("ig", "sat", "ex")))):
        raise UserError(f"at '{at}' with method '{method}': expected 'clean'; 'corrupted' for atp, relp and gim")
    if at == "corrupted" and reference == "zero":
        raise UserError("at 'corrupted' with reference 'zero': expected reference 'corrupted'")
    if method == "exact" and rules is not None:
        raise UserError("rules with method 'exact': expected none, it has no backward pass")
    if method == "saturation fix" and basis.name not in ("queries", "keys"):
        raise UserError(f"method 'saturation fix' of basis '{basis.name}': expected 'queries' or 'keys'")
    if method == "ig activations" and not basis.layered:
        method = "ig inputs"  # the same where the inputs are the nodes
    if method == "exact" and basis.coder is not None:
        raise UserError("method 'exact' of a coder: expected a basis of sites; `jclt.ablate` measures features")
    own = RULE_SETS[method] if method in ("relp", "gim") else ()
    names = own if rules is None else read_rules(rules)
    reads = () if basis.coder is None else (basis.coder.config.reads,)
    setting = Setting(model.config, basis.site, metric, names, reads)
    return Plan(setting, method, basis.whole, reference, at)


Curve = tuple[Float[Array, "n"], Float[Array, "n"]]
Values = dict[str, Float[Array, "L P T ..."]]


def read_both_runs(
    plan: Plan, params: Params, prompts: Prompts, curve: Curve, coder: Any = None
) -> tuple[Values, Values | None, Float[Array, "L P T ..."]]:
    """The values of the clean run and of the reference (None is zero), and the gradient at the site."""
    setting, inputs = plan.setting, "token_embedding"
    extra = {"ig inputs": (inputs,), "ig activations": ("resid_pre",)}.get(plan.method, ())

    def read(tokens: Tokens) -> Values:
        return read_values(setting, params, tokens, prompts.last, extra)

    if not extra:  # the run that is differentiated has its values, too
        is_clean = plan.at == "clean"
        tokens, like = prompts.clean if is_clean else prompts.corrupted, jax.eval_shape(read, prompts.clean)
        sites = list_read_sites(setting)
        own, gradient = read_and_differentiate(setting, params, prompts, tokens, like[setting.site], None, sites)
        clean = own if is_clean else read(prompts.clean)
        if plan.reference == "zero":
            return clean, None, gradient
        return clean, read(prompts.corrupted) if is_clean else own, gradient
    clean, other = read(prompts.clean), read(prompts.corrupted) if plan.reference == "corrupted" else None
    like = clean[setting.site]
    if plan.method == "ig inputs":
        start = clean[inputs][0]
        ends = (start, jnp.zeros_like(start) if other is None else other[inputs][0])
        return clean, other, average_over_inputs(setting, params, prompts, like, ends, *curve)
    ends = (like, write_nothing(like, clean, coder) if other is None else other[setting.site])
    streams = clean["resid_pre"]
    return clean, other, average_over_activations(setting, params, prompts, streams, ends, *curve)


def write_nothing(like: Float[Array, "L P T ..."], clean: Values, coder: Any) -> Float[Array, "L P T ..."]:
    """The values of a site where all nodes are 0: of a coder, what is left are its biases and its skip."""
    nothing = jnp.zeros_like(like)
    if coder is None:
        return nothing
    for index, layer in enumerate(coder.config.covered):
        read = clean[coder.config.reads][layer]
        silent = [jnp.zeros((*read.shape[:-1], coder.config.features), read.dtype)] * (index + 1)
        nothing = nothing.at[layer].set(coder.write(index, silent, read))
    return nothing


@partial(jax.jit, static_argnames=("plan",))
@jax.named_scope("score_nodes")
def score_part(plan: Plan, params: Params, prompts: Prompts, curve: Curve) -> Float[Array, "P L T U"]:
    clean, other, gradient = read_both_runs(plan, params, prompts, curve)
    site = plan.setting.site
    return score_units(Basis(site, site, plan.whole), change_values(clean, other)[site], gradient)


@partial(jax.jit, static_argnames=("plan",))
@jax.named_scope("score_features")
def score_part_of_coder(
    plan: Plan, params: Params, coder: Any, prompts: Prompts, curve: Curve
) -> Float[Array, "P L T U"]:
    clean, other, gradient = read_both_runs(plan, params, prompts, curve, coder)
    return score_features(coder, *change_features(coder, clean, other), gradient)


def change_features(
    coder: Any, clean: Values, other: Values | None
) -> tuple[Float[Array, "C P T F"], Float[Array, "C P T D"]]:
    """What the reference adds to the features and errors of the clean run."""
    changes: list[Array] = []
    for values in (clean, other):
        if values is None:
            continue
        reads, writes = values[coder.config.reads], values[coder.config.writes]
        activations = encode_reads(coder, reads)
        changes += [jnp.stack(activations), jnp.stack(find_errors(coder, activations, reads, writes))]
    if other is None:
        return -changes[0], -changes[1]
    return changes[2] - changes[0], changes[3] - changes[1]
