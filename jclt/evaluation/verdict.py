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
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jclt.coders import Coder
from jclt.errors import UserError
from jclt.evaluation.intervals import Figure, divide_sums, summarize_figures
from jclt.evaluation.perturbations import Prepared, Reactions, draw_like, list_writes, prepare_prompt, push_prompt
from jclt.interventions import PromptPairs, load_pairs, make_world_pairs
from jclt.models import Model
from jclt.shapes import Float, Int
from jclt.world import TASKS

ACCEPTED, REACTING = 0.5, 0.05
KINDS = ("concepts", "features", "random")
FEATURES = 4
"""Of each layer, taken away one at a time."""


@dataclass(frozen=True)
class Verdict:
    """Figures by the layer after which the stream was changed and the kind of change."""

    followed: dict[tuple[int, str], Figure]
    reaction: dict[tuple[int, str], Figure]
    answers: dict[tuple[int, str], Figure]  # of the changed answers of the model, the share that is the replacement's

    @property
    def failed(self) -> list[int]:
        """The layers after which the replacement model does not follow."""
        reacting = [key for key, figure in self.reaction.items() if key[1] == "concepts" and figure.value >= REACTING]
        return [key[0] for key in reacting if not self.followed[key].value >= ACCEPTED]

    @property
    def accepted(self) -> bool:
        return not self.failed

    def table(self) -> str:
        lines = [f"{'after layer':12}{'change':10}{'reaction':>10}{'followed [95% interval]':>27}{'permuted':>10}"]
        lines[0] += f"{'answers':>10}{'fixed':>8}"
        for (layer, kind), figure in self.followed.items():
            reaction, answers = self.reaction[layer, kind], self.answers[layer, kind]
            line = f"{layer:<12}{kind:10}{reaction.value:10.1%}{figure!s:>27}{_show(figure.control):>10}"
            lines.append(line + f"{_show(answers.value):>10}{_show(answers.control):>8}")
        return "\n".join(lines)

    def summary(self) -> dict[str, Any]:
        tables = {name: getattr(self, name) for name in ("followed", "reaction", "answers")}
        named = {n: {f"{layer} {kind}": f for (layer, kind), f in table.items()} for n, table in tables.items()}
        figures = {name: summarize_figures(table) for name, table in named.items()}
        return {"accepted": self.accepted, "failed": self.failed, **figures}

    def __str__(self) -> str:
        if self.accepted:
            return f"accepted: after every layer the replacement model follows at least {ACCEPTED:.0%} of the reaction"
        layers = ", ".join(map(str, self.failed))
        reason = f"after layer {layers} its features follow less than {ACCEPTED:.0%} of what the model's MLPs do"
        return f"rejected: {reason}: earlier features have written the rest, or the coder's errors hold it"


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
        other = prepare_prompt(model, coder, corrupted).streams.layers
        keys, layers, values = list_pushes(prepared, other, generator)
        reactions = push_prompt(prepared, layers, values)
        for row, key in enumerate(keys):
            said = reactions.replaced.logits[row] - reactions.fixed.logits[row]
            sums[key].append(compare(prepared, reactions, row, previous.get(key, said)))
            previous[key] = said
    return Verdict(*(collect(sums, name, seed) for name in ("followed", "reaction", "answers")))


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


def compare(
    prepared: Prepared, reactions: Reactions, row: int, permuted: Float[np.ndarray, "V"]
) -> Float[np.ndarray, "_"]:
    """Sums of squares: the error, that of another prompt's prediction, the reaction, the change; and whether the
    model's answer changes, the replacement's is the same, and that with fixed MLPs is."""
    original = prepared.streams.logits[0].astype(np.float64)
    true, replaced, fixed = (streams.logits[row].astype(np.float64) for streams in reactions)
    differences = (true - replaced, true - fixed - permuted, true - fixed, true - original)
    squares = [float(x @ x) for x in differences]
    answer = true.argmax()
    moved = answer != original.argmax()
    return np.array([*squares, moved, moved and replaced.argmax() == answer, moved and fixed.argmax() == answer])


def collect(sums: dict[tuple[int, str], list[np.ndarray]], name: str, seed: int) -> dict[tuple[int, str], Figure]:
    figures = {}
    for key in sorted(sums, key=lambda key: (key[0], KINDS.index(key[1]))):
        error, permuted, reaction, change, moved, replaced, fixed = np.stack(sums[key], axis=1)
        if name == "followed":
            control = 1 - permuted.sum() / reaction.sum() if reaction.sum() else None
            figures[key] = divide_sums(reaction - error, reaction, control=control, seed=seed)
        elif name == "reaction":
            figures[key] = divide_sums(reaction, change, seed=seed)
        else:
            control = fixed.sum() / moved.sum() if moved.sum() else None
            figures[key] = divide_sums(replaced, moved, control=control, seed=seed)
    return figures


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
