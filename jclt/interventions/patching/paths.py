"""`patch_paths`: path patching. What reaches a receiver directly from a sender, through no other part of the model?

1. Run the clean and the corrupted prompt.
2. Run the clean prompt with the senders' outputs of the corrupted one, and every other attention and MLP output held at
   its clean value; norms are computed anew. The receivers' inputs of this pass differ by the direct paths alone.
3. Run the clean prompt with these inputs of the receivers; all else reacts.

Where the logits are the receiver, step 2 gives them already.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jclt.errors import UserError
from jclt.interventions.batches import split_rows
from jclt.interventions.patching.metrics import AnswerSets, Measures, Metric, check_metric, measure_rows
from jclt.interventions.patching.pairs import PromptPairs
from jclt.interventions.patching.places import Position, locate_position, name_position, read_layers
from jclt.interventions.patching.result import PatchingResult
from jclt.interventions.patching.rows import Rule, Rules, find_boxes, make_rows_edit, take_rows
from jclt.interventions.patching.runs import (
    Found,
    Part,
    check_corrupted,
    keep_passes,
    prepare_job,
    run_pairs,
    take_tokens,
)
from jclt.models import Model, ModelConfig, Place, forward
from jclt.models.sites import SITE_AXES
from jclt.shapes import Array, Float, Int, Params, Tokens

SENDERS = ("resid_pre", "head_out", "attn_out", "mlp_out")
RECEIVERS = ("queries", "keys", "values", "mlp_in", "logits")


class Component(NamedTuple):
    """A part of the model that sends or receives.

    Senders: `head_out` with or without a head, `attn_out` (all heads), `mlp_out`, and `resid_pre` of layer 0: the
    embeddings. Receivers: `queries`, `keys` and `values` with or without a head (of keys and values, a key-value head),
    `mlp_in`, and `logits`, which has no layer and position.
    """

    site: str
    layer: int = 0
    head: int | None = None
    position: Position = "all"


def patch_paths(
    model: Model,
    pairs: PromptPairs,
    senders: Sequence[Component | Sequence[Component]] | None = None,
    receivers: Sequence[Component] = (Component("logits"),),
    *,
    metric: Metric = "normalised",
    progress: bool = True,
) -> PatchingResult:
    """Sends the corrupted outputs of each sender, or set of senders, to the set of receivers along direct paths alone.

    senders     by default each head and each MLP, one at a time
    receivers   change together
    """
    check_metric(metric, pairs)
    check_corrupted(pairs)
    sets = [[one] if isinstance(one, Component) else list(one) for one in senders or list_senders(model.config)]
    for sender in (sender for one in sets for sender in one):
        check_component(model.config, sender, SENDERS)
    for receiver in receivers:
        check_component(model.config, receiver, RECEIVERS)
    if not receivers or not all(sets):
        raise UserError("senders or receivers: an empty set, expected at least one component")
    to_logits = any(receiver.site == "logits" for receiver in receivers)
    if to_logits and len(receivers) > 1:
        raise UserError("receivers: logits and others, expected the logits alone, as nothing comes after them")
    job = prepare_job(model, pairs)
    sites = ("resid_pre", "head_out", "mlp_out")

    def run_part(part: Part, answers: AnswerSets) -> Found:
        numbers = part.padded
        clean, base = keep_passes(job, "clean", numbers, sites)
        corrupted, other = keep_passes(job, "corrupted", numbers, sites)
        rules = make_sender_rules(pairs, numbers, sets, base, other)
        inputs = {} if to_logits else make_boxes(pairs, numbers, [list(receivers)])
        most = part.batches.limit_rows(model.config, len(pairs.clean[numbers[0]]))
        found: list[Measures] = []
        no_order = np.zeros(len(sets), int)
        for _, rows in split_rows(no_order, no_order, (0,), lambda _, most=most: most, part.batches.devices):
            arguments = (take_tokens(job, "clean", numbers), take_rows(rules, rows, job.mesh), inputs)
            found.append(run_paths(model.config, job.params, *arguments, clean.logits, answers))
        columns = (np.concatenate([np.asarray(x) for x in column], axis=1) for column in zip(*found, strict=True))
        return Measures(*(column[:, : len(sets)] for column in columns)), clean.logits, corrupted.logits

    found = run_pairs(job, (len(sets),), run_part, progress)
    axes: dict[str, tuple[str | int, ...]] = {
        "sender": tuple(" + ".join(name_component(pairs, sender) for sender in one) for one in sets)
    }
    method = "path patching to " + " + ".join(name_component(pairs, receiver) for receiver in receivers)
    return PatchingResult(axes, metric, method, "clean", pairs, *found)


def list_senders(config: ModelConfig) -> list[Component]:
    """Each head and each MLP."""
    layers, heads = range(config.layers), range(config.heads)
    return [Component("head_out", layer, head) for layer in layers for head in heads] + [
        Component("mlp_out", layer) for layer in layers
    ]


def check_component(config: ModelConfig, component: Component, sites: Sequence[str]) -> None:
    site, layer, head, _ = component
    if site not in sites:
        raise UserError(f"component '{site}': expected one of: {', '.join(sites)}")
    read_layers(config, layer)
    if site == "resid_pre" and layer != 0:
        raise UserError(f"sender 'resid_pre' of layer {layer}: expected layer 0, the embeddings")
    axes = SITE_AXES[site]
    count = config.heads if "H" in axes else config.key_heads if "G" in axes else 0
    if head is not None and not 0 <= head < count:
        raise UserError(f"component '{site}': head {head}, expected {f'0 to {count - 1}' if count else 'none'}")


def name_component(pairs: PromptPairs, component: Component) -> str:
    site, layer, head, position = component
    if site == "logits":
        return site
    where = "" if position == "all" else f" at {name_position(pairs, position)}"
    return f"{site} {layer}{'' if head is None else f'.{head}'}{where}"


def make_boxes(
    pairs: PromptPairs, numbers: Int[np.ndarray, "P"], sets: Sequence[Sequence[Component]]
) -> dict[str, Rule]:
    """The ranges `[P, R, m, 2]` of each site's components in every set, padded with empty ones; no values yet."""
    most = max(map(len, sets))
    names = sorted({component.site for one in sets for component in one})
    shape = (len(numbers), len(sets), most, 2)
    ranges = {name: [np.zeros(shape, np.int32) for _ in range(3)] for name in names}
    for row, one in enumerate(sets):
        for slot, (site, layer, head, position) in enumerate(one):
            layers, positions, heads = ranges[site]
            layers[:, row, slot] = layer, layer + 1
            heads[:, row, slot] = (0, 2**30) if head is None else (head, head + 1)
            positions[:, row, slot] = [locate_position(pairs, int(number), position) for number in numbers]
    return {name: Rule(np.zeros(len(numbers), np.float32), *ranges[name]) for name in names}


def make_sender_rules(
    pairs: PromptPairs,
    numbers: Int[np.ndarray, "P"],
    sets: Sequence[Sequence[Component]],
    base: Mapping[str, Array],
    other: Mapping[str, Array],
) -> Rules:
    """Every attention and MLP output at its value of `base`, then the senders' of `other`."""
    as_heads = [
        [sender._replace(site="head_out") if sender.site == "attn_out" else sender for sender in one] for one in sets
    ]
    boxes = make_boxes(pairs, numbers, as_heads)
    everywhere = np.broadcast_to(np.array([0, 2**30], np.int32), (len(numbers), len(sets), 1, 2))
    rules: dict[str, tuple[Rule, ...]] = {
        site: (Rule(base[site], everywhere, everywhere, everywhere),) for site in ("head_out", "mlp_out")
    }
    for site, rule in boxes.items():
        rules[site] = (*rules.get(site, ()), rule._replace(values=other[site]))
    return rules


@partial(jax.jit, static_argnames=("config",))
@jax.named_scope("patch_paths")
def run_paths(
    config: ModelConfig,
    params: Params,
    tokens: Tokens,
    rules: Rules,
    receivers: Mapping[str, Rule],
    clean: Float[Array, "P V"],
    answers: AnswerSets,
) -> Measures:
    """The measures `[P, R]`. Without receivers, of the pass with the senders' outputs itself."""

    def run_pair(
        tokens: Int[Array, "T"], rules: Rules, receivers: Mapping[str, Rule], clean: Array, answers: AnswerSets
    ) -> Measures:
        rows = next(rule.layers.shape[0] for group in rules.values() for rule in group)
        batch = jnp.broadcast_to(tokens, (rows, len(tokens)))
        positions = jnp.broadcast_to(jnp.arange(len(tokens), dtype=jnp.int32), batch.shape)
        logits, seen, _ = forward(
            config, params, batch, capture=tuple(receivers), edit=make_rows_edit(rules, 0), positions=positions
        )
        if receivers:

            def put_inputs(place: Place, value: Array) -> Array:
                if place.site not in receivers:
                    return value
                return jnp.where(find_boxes(receivers[place.site], place, value), seen[place.site][place.layer], value)

            logits, _, _ = forward(config, params, batch, edit=put_inputs, positions=positions)
        return measure_rows(logits[:, -1], clean, answers)

    return jax.vmap(run_pair)(tokens, rules, receivers, clean, answers)
