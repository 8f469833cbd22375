"""Whether supernodes do what they claim: each is set to zero, beside random groups of as many features."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jclt.attribution.attribute import check_coder
from jclt.coders import Coder
from jclt.errors import UserError, escape_unprintable
from jclt.graphs import Graph, Supernode
from jclt.graphs.prediction import predict_changes
from jclt.graphs.supernodes import find_members
from jclt.interventions.intervene import Pass, check_graph, run_changed, run_original, use_one_device
from jclt.interventions.settings import Reference, Setting, Treatment, sort_edits
from jclt.mesh import fetch_to_host
from jclt.models import Model, Scale
from jclt.models.model import Prompt, token_row
from jclt.shapes import Float

ROWS = 16
"""Groups that are set to zero at once."""

CHOICES = 5
"""From how many features of about the same influence each member of a control is drawn."""

Group = tuple[int, ...]
"""Numbers of features of a graph."""


@dataclass(frozen=True, eq=False)
class SupernodeEffect:
    """What setting a group to zero does. An effect is how much the logits of the graph's outputs change, minus the mean
    logit and averaged by the outputs' weights."""

    name: str
    features: int
    share: float  # of all influence
    effect: float
    predicted: float  # the effect, by the graph
    agreement: float  # cosine of the predicted and the measured changes of the graph's other features; NaN without any
    random: Float[np.ndarray, "r"]  # the effect of each random group
    comparable: Float[np.ndarray, "r"]  # the same of groups with about as much influence

    @property
    def beaten(self) -> int:
        """How many random groups move the outputs less."""
        return self.count_beaten(self.random)

    def count_beaten(self, effects: Float[np.ndarray, "r"]) -> int:
        return int(np.count_nonzero(np.abs(effects) < abs(self.effect)))

    def __str__(self) -> str:
        beside = ""
        if count := len(self.random):
            beside = f", more than {self.beaten} of {count} random groups"
            beside += f" and {self.count_beaten(self.comparable)} of {count} with about as much influence"
        head = f"{escape_unprintable(self.name)}: {self.features} features, {self.share:.1%} of the influence"
        moves = f"set to zero, it moves the outputs' logits by {self.effect:+.2f}{beside}"
        return f"{head}; {moves} (predicted {self.predicted:+.2f})"


def measure_supernodes(
    model: Model,
    coder: Coder,
    prompt: Prompt,
    graph: Graph,
    supernodes: Sequence[Supernode],
    *,
    random: int = 20,
    seed: int = 0,
    reference: Reference = "current",
    attention: Treatment = "frozen",
    norms: Treatment = "frozen",
) -> list[SupernodeEffect]:
    """Sets each supernode to zero, and `random` groups for each, drawn from the graph's other features: as many of each
    layer, if it has as many; and then as many whose influence is about that of the members. `graph` is the prompt's,
    before pruning. `intervene` says how the model may react."""
    outputs = np.flatnonzero((graph.logit_tokens >= 0) & (graph.logit_positions == len(graph.tokens) - 1))
    if not len(outputs):
        raise UserError("supernodes: the graph explains no tokens at the last position, expected at least one")
    if random < 0:
        raise UserError(f"random={random}: expected 0 groups or more")
    groups = find_members(graph, supernodes)
    if not groups:
        return []
    generator = np.random.default_rng(seed)
    draws = (draw_alike, draw_comparable)
    others = [draw(graph, group, generator) for group in groups for draw in draws for _ in range(random)]
    setting = Setting(None, attention, norms, reference, "kept")
    logits, changes = set_to_zero(model, coder, prompt, graph, [*groups, *others], setting)
    weights = graph.output_weights[graph.nodes.find("output")[outputs]].astype(np.float64)
    effects = logits[:, graph.logit_tokens[outputs]] @ weights / weights.sum()
    results = []
    for row, (supernode, group) in enumerate(zip(supernodes, groups, strict=True)):
        predicted = predict_changes(graph, dict.fromkeys(group, -1.0), total=True)
        downstream = [node for node in range(len(graph.features)) if predicted[node] and node not in group]
        results.append(
            SupernodeEffect(
                name=supernode.name,
                features=len(group),
                share=supernode.share,
                effect=float(effects[row]),
                predicted=float(predicted[graph.nodes.find("output")[outputs]] @ weights / weights.sum()),
                agreement=compute_cosine(predicted[downstream], changes[row, downstream]),
                random=effects[len(groups) + 2 * row * random :][:random],
                comparable=effects[len(groups) + (2 * row + 1) * random :][:random],
            )
        )
    return results


def draw_alike(graph: Graph, group: Group, generator: np.random.Generator) -> Group:
    """Other features, as many of each layer as the group has."""
    layers, drawn = graph.features[:, 0], list[int]()
    for layer, count in zip(*np.unique(layers[list(group)], return_counts=True), strict=True):
        others = np.setdiff1d(np.flatnonzero(layers == layer), group)
        drawn += generator.permutation(others)[:count].tolist()
    return tuple(drawn)


def draw_comparable(graph: Graph, group: Group, generator: np.random.Generator) -> Group:
    """Other features, for each member one of the `CHOICES` that are nearest to it in influence."""
    influence, drawn = graph.influence.astype(np.float64), list[int]()
    others = np.setdiff1d(np.arange(len(graph.features)), group)
    for node in sorted(group, key=lambda node: -influence[node])[: len(others)]:
        distance = np.abs(influence[others] - influence[node])
        chosen = generator.permutation(np.argsort(distance, kind="stable")[:CHOICES])[0]
        drawn.append(int(others[chosen]))
        others = np.delete(others, chosen)
    return tuple(drawn)


def set_to_zero(
    model: Model, coder: Coder, prompt: Prompt, graph: Graph, groups: Sequence[Group], setting: Setting
) -> tuple[Float[np.ndarray, "g V"], Float[np.ndarray, "g n"]]:
    """How each group changes the centred logits at the end, and the pre-activations of the graph's features."""
    check_coder(model, coder)
    model, coder = use_one_device(model, coder)
    tokens = token_row(model, prompt)
    check_graph(model, coder, tokens, graph)
    original, frozen, before = run_original(model, coder, tokens, setting)
    before = jax.tree.map(fetch_to_host, before)
    places = graph.features
    factors = np.ones((-(-len(groups) // ROWS) * ROWS, len(places)), np.float32)  # whole batches: one program
    for row, group in enumerate(groups):
        factors[row, list(group)] = 0
    changed = np.flatnonzero((factors == 0).any(axis=0))
    layers, position, feature = places.T
    index = np.array([coder.config.index(int(layer)) for layer in layers], int)
    logits, changes = [], []
    for start in range(0, len(factors), ROWS):
        edits = [
            Scale(factors[start : start + ROWS, node], layer=layer, position=position, feature=feature)
            for node, (layer, position, feature) in zip(changed.tolist(), places[changed].tolist(), strict=True)
        ]
        parts = sort_edits(model, coder, edits, setting, len(tokens))
        after: Pass = jax.tree.map(fetch_to_host, run_changed(model, coder, tokens, parts, setting, original, frozen))
        logits.append(after.centred - before.centred)
        moved = after.preactivations[index, :, position, feature] - before.preactivations[index, :, position, feature]
        changes.append(moved.T)
    return np.concatenate(logits)[: len(groups)], np.concatenate(changes)[: len(groups)]


def compute_cosine(a: Float[np.ndarray, "m"], b: Float[np.ndarray, "m"]) -> float:
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / lengths if lengths else float("nan")
