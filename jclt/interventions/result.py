"""The result of an intervention: outputs and features before and after it, beside what a graph predicts."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jclt.attribution.targets import decode_token
from jclt.coders import Coder
from jclt.errors import escape_unprintable
from jclt.graphs import Graph, list_labels
from jclt.graphs.names import name_feature
from jclt.graphs.prediction import predict_changes
from jclt.interventions.changes import Changes
from jclt.models import Model, Scale, Set, SiteEdit
from jclt.models.ranges import Ranges
from jclt.shapes import Bool, Float, Int

SHOWN = 10
"""Rows of the text tables."""


class ErrorShares(NamedTuple):
    """Changes of a graph's errors, as shares of them, by node: -1 takes an error away."""

    shares: dict[int, float]
    left_out: int  # edits of errors that the graph does not have or that are no multiples, and of other sites


@dataclass(frozen=True, eq=False)
class FeatureChanges:
    """Features that are active before or after, or edited; one entry each."""

    layer: Int[np.ndarray, "n"]
    position: Int[np.ndarray, "n"]
    feature: Int[np.ndarray, "n"]
    edited: Bool[np.ndarray, "n"]
    before: Float[np.ndarray, "n"]  # activation
    after: Float[np.ndarray, "n"]  # of an edited feature, what it was changed to
    preactivation_before: Float[np.ndarray, "n"]
    preactivation_after: Float[np.ndarray, "n"]
    preactivation_predicted: Float[np.ndarray, "n"]  # after, by the graph; NaN for features that it does not have

    def __len__(self) -> int:
        return len(self.layer)


@dataclass(frozen=True, eq=False)
class OutputChanges:
    """Tokens at the last position: first the graph's outputs, then the likeliest before and after. Their logits are
    minus the mean logit, before any soft cap."""

    tokens: Int[np.ndarray, "k"]
    names: tuple[str, ...]
    before: Float[np.ndarray, "k"]
    after: Float[np.ndarray, "k"]
    probability_before: Float[np.ndarray, "k"]
    probability_after: Float[np.ndarray, "k"]
    predicted: Float[np.ndarray, "k"]  # after, by the graph; NaN for tokens that are no outputs of it


@dataclass(frozen=True, eq=False, repr=False)
class Intervention:
    """What `intervene` measured, on one prompt."""

    tokens: Int[np.ndarray, "T"]
    token_texts: tuple[str, ...]
    setting: str  # how the model reacts, in words
    original_logits: Float[np.ndarray, "T V"]
    logits: Float[np.ndarray, "T V"]
    features: FeatureChanges
    outputs: OutputChanges
    unpredicted: int  # edited places that a prediction leaves out: not in the graph, or of other sites
    kl: float  # of the next token: sum over tokens of p log(p / q), p before and q after, in nats
    labels: Mapping[tuple[int, int], str] = field(default_factory=dict)  # by layer and feature

    def __repr__(self) -> str:
        return f"<Intervention on '{escape_unprintable(''.join(self.token_texts))[:60]}': KL {self.kl:.3g}>"

    def summarize(self, shown: int = SHOWN) -> str:
        """Tables of the outputs and of the features that changed most."""
        o, f = self.outputs, self.features
        lines = [self.setting, f"next token: KL {self.kl:.3g} nats"]
        lines += ["  probability before, after; logit minus mean before -> after (predicted)"]
        order = np.argsort(-np.maximum(o.probability_before, o.probability_after), kind="stable")[:shown]
        for i in order:
            predicted = "" if np.isnan(o.predicted[i]) else f" ({o.predicted[i]:.2f})"
            lines.append(
                f"  {o.probability_before[i]:.4f}  {o.probability_after[i]:.4f}  {o.before[i]:.2f} -> "
                f"{o.after[i]:.2f}{predicted} {o.names[i]!r}"
            )
        change = np.abs(f.after - f.before)
        changed = [i for i in np.argsort(-change, kind="stable")[:shown] if change[i] > 0]
        lines.append(f"features: {len(f)} active before or after, {int(np.count_nonzero(change > 0))} changed")
        for i in changed:
            text = self.token_texts[f.position[i]]
            layer, feature = int(f.layer[i]), int(f.feature[i])
            name = name_feature(layer, feature, self.labels.get((layer, feature)))
            line = f"  {name} at {text!r} ({f.position[i]}): "
            line += f"{f.before[i]:.3g} -> {f.after[i]:.3g}{' edited' if f.edited[i] else ''}"
            if not np.isnan(f.preactivation_predicted[i]):
                predicted, measured = f.preactivation_predicted[i], f.preactivation_after[i]
                line += f" (pre-activation predicted {predicted:.3g}, measured {measured:.3g})"
            lines.append(line)
        if self.unpredicted:
            what = "features and errors that the graph does not have, or other sites"
            lines.append(f"the prediction leaves out {self.unpredicted} edited places: {what}")
        return "\n".join(lines)


def make_result(
    model: Model,
    coder: Coder,
    tokens: np.ndarray,
    setting: str,
    clamped: bool,
    changes: Changes,
    before: dict[str, np.ndarray],
    after: dict[str, np.ndarray],
    graph: Graph | None,
    of_errors: ErrorShares,
) -> Intervention:
    """The result of one row. `before` and `after` hold logits [T, V], centred logits of the last position [V], and
    activations and pre-activations [C, T, F]."""
    covered = np.asarray(coder.config.covered)
    edited = find_edited(changes, before["activations"].shape)
    index, position, feature = np.nonzero((before["activations"] != 0) | (after["activations"] != 0) | edited)
    cells = (index, position, feature)
    outputs = choose_outputs(before["logits"][-1], after["logits"][-1], graph)
    features = {
        "layer": covered[index],
        "position": position,
        "feature": feature,
        "edited": edited[cells],
        "before": before["activations"][cells],
        "after": after["activations"][cells],
        "preactivation_before": before["preactivations"][cells],
        "preactivation_after": after["preactivations"][cells],
    }
    predicted, of_outputs, unpredicted = predict(
        graph, features, of_errors, before["centred"], outputs, total=not clamped
    )
    log_before, log_after = (log_softmax(x["logits"][-1]) for x in (before, after))
    return Intervention(
        tokens=tokens,
        token_texts=tuple(decode_token(model, int(token)) for token in tokens),
        setting=setting,
        original_logits=before["logits"],
        logits=after["logits"],
        features=FeatureChanges(**features, preactivation_predicted=predicted),
        outputs=OutputChanges(
            tokens=outputs,
            names=tuple(decode_token(model, int(token)) for token in outputs),
            before=before["centred"][outputs],
            after=after["centred"][outputs],
            probability_before=np.exp(log_before[outputs]),
            probability_after=np.exp(log_after[outputs]),
            predicted=of_outputs,
        ),
        unpredicted=unpredicted,
        kl=float(np.sum(np.exp(log_before) * (log_before - log_after))),
        labels={} if graph is None else list_labels(graph),
    )


def find_edited(changes: Changes, shape: tuple[int, ...]) -> Bool[np.ndarray, "C T F"]:
    """A mask of the edited features."""
    edited = np.zeros(shape, bool)
    features, start, stop = (np.asarray(x) for x in (changes.features, changes.start, changes.stop))
    for index, slot in np.argwhere(stop > start):
        edited[index, start[index, slot] : stop[index, slot], features[index, slot]] = True
    return edited


def choose_outputs(before: Float[np.ndarray, "V"], after: Float[np.ndarray, "V"], graph: Graph | None) -> np.ndarray:
    """The tokens to report: those that the graph explains, and the likeliest before and after."""
    of_graph = [] if graph is None else [int(token) for token in graph.logit_tokens if token >= 0]
    likeliest = [*np.argsort(-before, kind="stable")[:SHOWN], *np.argsort(-after, kind="stable")[:SHOWN]]
    return np.array(list(dict.fromkeys([*of_graph, *map(int, likeliest)])))


def predict(
    graph: Graph | None,
    features: dict[str, np.ndarray],
    of_errors: ErrorShares,
    centred: np.ndarray,
    outputs: np.ndarray,
    *,
    total: bool,
) -> tuple[np.ndarray, np.ndarray, int]:
    """The pre-activation of each feature and the centred logit of each output, as the graph predicts them."""
    of_features, of_outputs = np.full(len(features["layer"]), np.nan), np.full(len(outputs), np.nan)
    if graph is None:
        return of_features, of_outputs, 0
    nodes, numbers = graph.nodes, graph.nodes.find("feature")
    keys = zip(*(getattr(nodes, name)[numbers].tolist() for name in ("layer", "position", "index")), strict=True)
    node_of = dict(zip(keys, numbers.tolist(), strict=True))
    cells = list(zip(*(features[name].tolist() for name in ("layer", "position", "feature")), strict=True))
    found = np.array([node_of.get(cell, -1) for cell in cells], int)
    edited = np.flatnonzero(features["edited"])
    known = [i for i in edited if found[i] >= 0 and features["before"][i] != 0]
    shares = {int(found[i]): float(features["after"][i] / features["before"][i] - 1) for i in known}
    change = predict_changes(graph, shares | of_errors.shares, total=total)
    inside = found >= 0
    of_features[inside] = features["preactivation_before"][inside] + change[found[inside]]
    at_end = graph.nodes.position[graph.nodes.find("output")] == len(graph.tokens) - 1
    for node, token, end in zip(graph.nodes.find("output"), graph.logit_tokens, at_end, strict=True):
        if end:
            of_outputs[outputs == token] = centred[token] + change[node]
    return of_features, of_outputs, len(edited) - len(known) + of_errors.left_out


def measure_error_shares(
    graph: Graph, edits: Sequence[SiteEdit], dropped: Collection[int], other_edits: int
) -> ErrorShares:
    """The shares of the graph's errors that edits of errors, in the order given, and the layers of dropped errors
    change."""
    numbers = graph.nodes.find("error")
    cells = list(zip(graph.nodes.layer[numbers].tolist(), graph.nodes.position[numbers].tolist(), strict=True))
    shares, left_out, known = {}, other_edits, set(cells)
    for node, (layer, position) in zip(numbers.tolist(), cells, strict=True):
        factor = 0.0 if layer in dropped else 1.0
        for edit in edits:
            if is_at(edit.ranges, layer, position):
                factor = compose_factor(edit, factor)
        if np.isnan(factor):
            left_out += 1
        elif factor != 1:
            shares[node] = factor - 1
    for layer, position in np.ndindex(graph.layers, len(graph.tokens)):
        left_out += any(is_at(e.ranges, layer, position) for e in edits) and (layer, position) not in known
    return ErrorShares(shares, left_out)


def is_at(ranges: Ranges, layer: int, position: int) -> bool:
    """Whether a place is within the ranges of layers and positions."""
    return layer in ranges.read("layer", layer + 1) and position in ranges.read("position", position + 1)


def compose_factor(edit: SiteEdit, factor: float) -> float:
    """By what an edit after the factor multiplies the original error in all; NaN: the result is no multiple of it."""
    is_whole = np.ndim(edit.value) == 0 and edit.directions is None and edit.ranges.index is None
    if is_whole and isinstance(edit, Scale):
        return float(np.asarray(edit.value)) * factor
    if is_whole and isinstance(edit, Set) and edit.value == 0:
        return 0.0
    return np.nan


def log_softmax(logits: Float[np.ndarray, "V"]) -> Float[np.ndarray, "V"]:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
