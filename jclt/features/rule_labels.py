"""Labels by rules: found on some windows, scored on others, beside shuffled labels and random directions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jclt.coders import Coder, CoderLayer, SparseCoder
from jclt.features.labels import Label, Labels, Place
from jclt.features.rows import DataRows
from jclt.features.rules import Classes, apply_rule, detect, find_rule, parse_rule, write_rule
from jclt.features.scores import score_prediction
from jclt.features.windows import WindowPair, collect_windows
from jclt.models import Model

SHUFFLES = 5
RANDOM_DIRECTIONS = 32


def label_by_rules(
    windows: Mapping[Place, WindowPair], vocabulary: Sequence[str], classes: Classes, others: Labels | None = None
) -> Labels:
    """For each feature with enough windows the best rule, or the label of `others` (such as those by weights) where it
    is a rule that does at least as well on the explaining windows."""
    labels: Labels = {}
    for place, pair in windows.items():
        rule = find_rule(pair.explaining, vocabulary, classes)
        if rule is None:
            continue
        label = Label(write_rule(rule, vocabulary), "rules")
        other = (others or {}).get(place)
        stated = other and parse_rule(other.text, vocabulary, classes)
        if other and stated and detect(stated, pair.explaining, classes) >= detect(rule, pair.explaining, classes):
            label = other
        labels[place] = label
    return score_rules(labels, windows, vocabulary, classes)


def score_rules(
    labels: Mapping[Place, Label], windows: Mapping[Place, WindowPair], vocabulary: Sequence[str], classes: Classes
) -> Labels:
    """The labels that are rules with their scores on the held-out windows, and as `shuffled` the mean detection by the
    labels of other features of the layer; the other labels as they are."""
    rules = {place: parse_rule(label.text, vocabulary, classes) for place, label in labels.items()}
    random, scored = np.random.default_rng(0), dict(labels)
    for place, label in labels.items():
        rule, pair = rules[place], windows.get(place)
        if rule is None or pair is None or not pair.held_out.enough:
            continue
        scores = score_prediction(apply_rule(rule, pair.held_out, classes), pair.held_out)
        rivals = [r for other, r in rules.items() if r and r != rule and other[0] == place[0] and other != place]
        drawn = [rivals[i] for i in random.permutation(len(rivals))[:SHUFFLES]]
        if drawn:
            scores["shuffled"] = float(np.mean([detect(rival, pair.held_out, classes) for rival in drawn]))
        scored[place] = label._replace(scores={**label.scores, **scores})
    return scored


def make_random_directions(coder: Coder, count: int) -> SparseCoder:
    """A coder that reads what this one reads, by random directions."""
    width = coder.config.width
    assert width is not None
    config = replace(coder.config, kind="transcoder", features=count, activation="relu", k=None, skip=False, tied=False)
    layers = []
    for key in jax.random.split(jax.random.key(0), len(config.covered)):
        rows = jax.random.normal(key, (count, width), jnp.float32)
        nothing = jnp.zeros((count, 1, width), jnp.float32)
        layers.append(CoderLayer(rows, jnp.zeros(count), None, nothing, jnp.zeros(width), None))
    return SparseCoder(tuple(layers), config)


def measure_random_directions(
    model: Model,
    coder: Coder,
    data: DataRows,
    classes: Classes,
    vocabulary: Sequence[str],
    share: float,
    layers: Sequence[int],
    count: int = RANDOM_DIRECTIONS,
) -> dict[int, float]:
    """For each of these layers the mean detection that the rules found for random directions reach, which count as
    firing at this share of the tokens."""
    directions = make_random_directions(coder, count)
    places = [(layer, feature) for layer in layers for feature in range(count)]
    windows = collect_windows(model, directions, data, places, share=share)
    labels = label_by_rules(windows, vocabulary, classes)
    found = {
        layer: [x.scores["detection"] for (n, _), x in labels.items() if n == layer and x.scores] for layer, _ in places
    }
    return {layer: float(np.mean(scores)) for layer, scores in found.items() if scores}
