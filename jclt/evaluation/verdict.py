"""A verdict on a coder: does its replacement model react to a change between the layers as the model does?

Reconstruction cannot tell. A cross-layer transcoder may write the answer from a feature of the first layer, over the
later layers at once; on the data it makes no error, with fewer active features than the model has steps. But what the
later layers compute from is then not in it. So the residual stream of the true model is changed between two layers:

    concepts   to that of a prompt that shares all but one concept, at all positions
    features   by taking away what one active feature of the layer before writes there
    random     in a random direction, as far at each position as `concepts`

With the passes of `perturbations.py`, nothing frozen, and logits at the end of the prompt:

    followed   = 1 - sum |true - replaced|^2 / sum |true - fixed|^2        over the pairs of prompts
    reaction   = sum |true - fixed|^2 / sum |true - original|^2

`followed` is 1 for an exact replacement model, and 0 for one whose features do not react. The rule, stated before any
coder was measured: a coder is accepted if it follows at least half (`ACCEPTED`) of the reaction to `concepts` between
any two layers where the reaction is at least 5% (`REACTING`) of the change.

Why does a cross-layer transcoder not follow the rest? Its earlier features may have written it. The pass is run again
with what these write to later layers in the other prompt (`push_with_writes`):

    one hop    = (sum |true - replaced|^2 - sum |true - that pass|^2) / sum |true - fixed|^2

The features of a per-layer transcoder write to their own layer, so it is 0. The coder does in one hop what the model
does in two after the layers where it is at least 10% (`ONE_HOP`; set before any coder was measured). The rest, 1 -
followed - one hop, is in no feature.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jclt.coders import Coder
from jclt.errors import UserError
from jclt.evaluation.intervals import Figure, divide_sums, summarize_figures
from jclt.evaluation.perturbations import (
    Prepared,
    Reactions,
    Streams,
    compare_writes,
    draw_like,
    list_writes,
    prepare_prompt,
    push_prompt,
    push_with_writes,
)
from jclt.interventions import PromptPairs, load_pairs, make_world_pairs
from jclt.models import Model
from jclt.shapes import Float, Int
from jclt.world import TASKS

ACCEPTED, REACTING, ONE_HOP = 0.5, 0.05, 0.1
KINDS = ("concepts", "features", "random")
FEATURES = 4
"""Of each layer, taken away one at a time."""


@dataclass(frozen=True)
class Verdict:
    """Figures by the layer after which the stream was changed and the kind of change."""

    followed: dict[tuple[int, str], Figure]
    reaction: dict[tuple[int, str], Figure]
    answers: dict[tuple[int, str], Figure]  # of the changed answers of the model, the share that is the replacement's
    one_hop: dict[tuple[int, str], Figure]  # of `concepts` alone

    @property
    def failed(self) -> list[int]:
        """The layers after which the replacement model does not follow."""
        reacting = [key for key, figure in self.reaction.items() if key[1] == "concepts" and figure.value >= REACTING]
        return [key[0] for key in reacting if not self.followed[key].value >= ACCEPTED]

    @property
    def accepted(self) -> bool:
        return not self.failed

    @property
    def hopped(self) -> list[int]:
        """The layers after which earlier features have written what the model computes there."""
        return [layer for (layer, _), figure in self.one_hop.items() if figure.value >= ONE_HOP]

    def table(self) -> str:
        lines = [f"{'after layer':12}{'change':10}{'reaction':>10}{'followed [95% interval]':>27}{'permuted':>10}"]
        lines[0] += f"{'answers':>10}{'fixed':>8}{'one hop':>10}"
        for (layer, kind), figure in self.followed.items():
            reaction, answers = self.reaction[layer, kind], self.answers[layer, kind]
            line = f"{layer:<12}{kind:10}{reaction.value:10.1%}{figure!s:>27}{_show(figure.control):>10}"
            hop = self.one_hop.get((layer, kind))
            line += f"{_show(answers.value):>10}{_show(answers.control):>8}{_show(hop and hop.value):>10}"
            lines.append(line)
        return "\n".join(lines)

    def summary(self) -> dict[str, Any]:
        tables = {name: getattr(self, name) for name in ("followed", "reaction", "answers", "one_hop")}
        named = {n: {f"{layer} {kind}": f for (layer, kind), f in table.items()} for n, table in tables.items()}
        figures = {name: summarize_figures(table) for name, table in named.items()}
        return {"accepted": self.accepted, "failed": self.failed, "hopped": self.hopped, **figures}

    def __str__(self) -> str:
        if self.accepted:
            words = f"accepted: after every layer the replacement model follows at least {ACCEPTED:.0%} of the reaction"
        else:
            layers = ", ".join(map(str, self.failed))
            reason = f"its features follow less than {ACCEPTED:.0%} of what the model's MLPs do"
            words = f"rejected: after layer {layers} {reason}"
        hops = [f"{self.one_hop[layer, 'concepts'].value:.0%} after layer {layer}" for layer in self.hopped]
        return words + (f"\nin one hop: earlier features have written {', '.join(hops)}" if hops else "")


def _show(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.3f}"


def verify(model: Model, coder: Coder, pairs: PromptPairs, seed: int = 0) -> Verdict:
    """Measures on pairs whose prompts have as many tokens, of which the corrupted one has another concept."""
    if model.config.layers < 2:
        raise UserError(f"model {model.name}: has one layer, expected at least two, to change what is between them")
    sums: dict[tuple[int, str], list[np.ndarray]] = defaultdict(list)
    previous: dict[tuple[int, str], Any] = {}
    generator = np.random.default_rng(seed)
    usable = [(c, other) for c, other in zip(pairs.clean, pairs.corrupted, strict=True) if other is not None]
    if not usable:
        raise UserError("pairs: none has a corrupted prompt, expected at least one")
    for clean, corrupted in usable:
        prepared = prepare_prompt(model, coder, clean)
        other = prepare_prompt(model, coder, corrupted)
        keys, layers, values = list_pushes(prepared, other.streams.layers, generator)
        reactions = push_prompt(prepared, layers, values)
        informed = push_earlier(prepared, other, keys, layers, values) if coder.config.kind == "clt" else None
        for row, key in enumerate(keys):
            said = reactions.replaced.logits[row] - reactions.fixed.logits[row]
            sums[key].append(compare(prepared, reactions, informed, row, previous.get(key, said)))
            previous[key] = said
    return Verdict(*(collect(sums, name, seed) for name in ("followed", "reaction", "answers", "one hop")))


def list_pushes(
    prepared: Prepared, other: Float[np.ndarray, "L 1 T D"], generator: np.random.Generator
) -> tuple[list[tuple[int, str]], Int[np.ndarray, "B"], Float[np.ndarray, "B T D"]]:
    """The kind of each push, its layer, and what is added at each position."""
    keys, values = [], []
    for layer in range(prepared.model.config.layers - 1):
        concept = (other - prepared.streams.layers)[layer]
        concept[:, prepared.length :] = 0
        pushes = [("concepts", concept[0]), ("random", draw_like(concept, generator)[0])]
        for position, write, _ in list_writes(prepared, layer, FEATURES):
            pushes.append(("features", np.zeros_like(concept[0])))
            pushes[-1][1][position] = -write
        keys += [(layer, kind) for kind, _ in pushes]
        values += [value for _, value in pushes]
    rows = (prepared.model.config.layers - 1) * (2 + FEATURES)  # one program, whatever is active
    padded = values + [np.zeros_like(values[0])] * (rows - len(values))
    layers = np.array([key[0] for key in keys] + [0] * (rows - len(keys)), np.int32)
    return keys, layers, np.stack(padded).astype(np.float32)


def push_earlier(
    prepared: Prepared,
    other: Prepared,
    keys: list[tuple[int, str]],
    layers: Int[np.ndarray, "B"],
    values: Float[np.ndarray, "B T D"],
) -> Streams:
    """The replacement model where the features before each push of `concepts` write what they write in the other
    prompt."""
    found = compare_writes(prepared, other)
    writes = np.zeros((len(found), *values.shape), np.float32)
    for row, (layer, kind) in enumerate(keys):
        if kind == "concepts":
            writes[:, row] = found[layer]
    return push_with_writes(prepared, layers, values, writes)


def compare(
    prepared: Prepared, reactions: Reactions, informed: Streams | None, row: int, permuted: Float[np.ndarray, "V"]
) -> Float[np.ndarray, "_"]:
    """Sums of squares: the error, that of another prompt's prediction, the reaction, the change; whether the model's
    answer changes, the replacement's is the same, and that with fixed MLPs is; and the error of the pass in which
    earlier features write as in the other prompt, which of a coder whose features write to one layer is the error."""
    original = prepared.streams.logits[0].astype(np.float64)
    true, replaced, fixed = (streams.logits[row].astype(np.float64) for streams in reactions)
    differences = (true - replaced, true - fixed - permuted, true - fixed, true - original)
    squares = [float(x @ x) for x in differences]
    answer = true.argmax()
    moved = answer != original.argmax()
    answers = moved, moved and replaced.argmax() == answer, moved and fixed.argmax() == answer
    if informed is None:
        return np.array([*squares, *answers, squares[0]])
    left = true - informed.logits[row].astype(np.float64)
    return np.array([*squares, *answers, float(left @ left)])


def collect(sums: dict[tuple[int, str], list[np.ndarray]], name: str, seed: int) -> dict[tuple[int, str], Figure]:
    figures = {}
    for key in sorted(sums, key=lambda key: (key[0], KINDS.index(key[1]))):
        error, permuted, reaction, change, moved, replaced, fixed, informed = np.stack(sums[key], axis=1)
        if name == "one hop":
            if key[1] == "concepts":
                figures[key] = divide_sums(error - informed, reaction, seed=seed)
        elif name == "followed":
            control = 1 - permuted.sum() / reaction.sum() if reaction.sum() else None
            figures[key] = divide_sums(reaction - error, reaction, control=control, seed=seed)
        elif name == "reaction":
            figures[key] = divide_sums(reaction, change, seed=seed)
        else:
            control = fixed.sum() / moved.sum() if moved.sum() else None
            figures[key] = divide_sums(replaced, moved, control=control, seed=seed)
    return figures


def tabulate_verdicts(verdicts: Mapping[str, Verdict]) -> str:
    """Several coders on the same pairs: what of the reaction to changes of concepts each follows, has written by
    earlier features, and has in no feature."""
    width = max(len(name) for name in ("coder", *verdicts))
    lines = [f"{'after layer':12}{'coder':{width}}{'followed':>27}{'one hop':>27}{'in no feature':>15}"]
    for key in next(iter(verdicts.values())).one_hop:
        for name, verdict in verdicts.items():
            followed, hop = verdict.followed[key], verdict.one_hop[key]
            rest = 1 - followed.value - hop.value
            lines.append(f"{key[0]:<12}{name:{width}}{followed!s:>27}{hop!s:>27}{_show(rest):>15}")
    return "\n".join(lines)


def find_pairs(model: Model, name: str, count: int, seed: int = 0) -> PromptPairs:
    """`world`: `count` pairs of each task of the small world; else the first `count` of a file of pairs."""
    if name != "world":
        pairs = load_pairs(model, Path(name))
        return pairs.take(range(min(count, len(pairs))))
    if model.tokenizer is None:
        raise UserError(f"model {model.name}: has no tokenizer, expected a file of pairs with token ids")
    tasks = [make_world_pairs(model, task, count, seed=seed) for task in TASKS]
    columns = {name: sum((getattr(pairs, name) for pairs in tasks), ()) for name in PromptPairs.__dataclass_fields__}
    return PromptPairs(**columns)
