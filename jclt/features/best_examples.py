"""The examples with the highest scores, at most one of each row, with the tokens around them: exact, block by block."""

import numpy as np

from jclt.features.events import Events, sort_stably
from jclt.features.frequent_tokens import find_starts
from jclt.features.rows import Block
from jclt.shapes import Float, Int

Arrays = dict[str, np.ndarray]


def make_examples(features: int, count: int, window: int, token_type: str) -> Arrays:
    """No examples yet."""
    shape = (features, count)
    return {
        "score": np.full(shape, -np.inf),
        "value": np.zeros(shape, np.float32),
        "row": np.full(shape, -1, np.int32),
        "position": np.full(shape, -1, np.int32),
        "tokens": np.zeros((*shape, window), token_type),
        "activations": np.zeros((*shape, window), np.float32),
    }


def add_examples(examples: Arrays, events: Events, score: Float[np.ndarray, "E"], block: Block) -> None:
    """Keeps the best of the examples and of the block's events, in place, in no order. Of equal scores the earlier
    place in the data is better. Blocks come in the order of the data."""
    length, count = block.tokens.shape[1], examples["score"].shape[1]
    better = np.flatnonzero(score > examples["score"].min(axis=1)[events.feature])
    chosen = better[_choose_of_each_row(events.feature[better], events.place[better] // length, score[better])]
    if not len(chosen):
        return
    changed = np.unique(events.feature[chosen])
    by_place = np.argsort(find_places(examples, length)[changed], axis=1)
    slots, old = (changed[:, None] * count + by_place).ravel(), len(changed) * count
    owner = np.concatenate([np.repeat(changed, count), events.feature[chosen]])
    scores = np.concatenate([examples["score"].reshape(-1)[slots], score[chosen]])
    order = _sort_in_groups(owner, scores)
    is_kept = np.zeros(len(order), bool)
    is_kept[order] = _rank_in_group(owner[order]) < count
    # Both lists are sorted by feature, and each feature gains as many as it loses.
    free, new = slots[~is_kept[:old]], chosen[is_kept[old:]]
    for name, values in _cut_examples(events, new, block, examples["tokens"].shape[2] // 2).items():
        examples[name].reshape(-1, *examples[name].shape[2:])[free] = values
    examples["score"].reshape(-1)[free] = score[new]


def sort_examples(examples: Arrays, length: int) -> Arrays:
    """The same with the best first."""
    order = np.lexsort((find_places(examples, length), -examples["score"]), axis=1)
    return {name: x[np.arange(len(order))[:, None], order] for name, x in examples.items()}


def find_places(examples: Arrays, length: int) -> Int[np.ndarray, "F K"]:
    """A number for each example that grows with its place in the data."""
    return examples["row"].astype(np.int64) * length + examples["position"]


def _choose_of_each_row(
    feature: Int[np.ndarray, "E"], row: Int[np.ndarray, "E"], score: Float[np.ndarray, "E"]
) -> Int[np.ndarray, "_"]:
    """The event of each feature and row with the highest score, the first one of equals."""
    if not len(row):
        return np.zeros(0, np.int64)
    starts = find_starts(feature.astype(np.int64) * (row.max() + 1) + row)
    group = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(row)))
    best = np.flatnonzero(score == np.maximum.reduceat(score, starts)[group])
    return best[find_starts(group[best])]


def _sort_in_groups(group: Int[np.ndarray, "n"], scores: Float[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """Group by group, the highest score first, of equal ones the one that comes first in the list. Faster than
    `np.lexsort`."""
    order = np.argsort(-scores, kind="stable")
    return order[sort_stably(group[order])]


def _rank_in_group(group: Int[np.ndarray, "_"]) -> Int[np.ndarray, "_"]:
    """For a sorted list, the place of each item among those that are equal to it."""
    starts = find_starts(group)
    return np.arange(len(group)) - np.repeat(starts, np.diff(starts, append=len(group)))


def _cut_examples(events: Events, chosen: Int[np.ndarray, "n"], block: Block, context: int) -> Arrays:
    """The columns of these events, with the tokens around them and the feature's activations there."""
    length = block.tokens.shape[1]
    place = events.place[chosen]
    row, position = np.divmod(place, length)
    around = position[:, None] + np.arange(-context, context + 1)
    tokens = block.tokens[row[:, None], np.clip(around, 0, length - 1)]
    # The other events of the feature lie beside it in the list.
    key = events.feature.astype(np.int64) * block.tokens.size + events.place
    first, last = np.searchsorted(key, key[chosen] - context), np.searchsorted(key, key[chosen] + context, "right")
    example = np.repeat(np.arange(len(chosen)), last - first)
    near = np.arange(len(example)) - np.repeat(np.cumsum(last - first) - last, last - first)
    same = (events.place[near] // length == row[example]) & (events.feature[near] == events.feature[chosen][example])
    example, near = example[same], near[same]
    activations = np.zeros(around.shape, np.float32)
    activations[example, events.place[near] - place[example] + context] = events.value[near]
    return {
        "value": events.value[chosen],
        "row": block.rows[row],
        "position": position,
        "tokens": np.where((around >= 0) & (around < length), tokens, 0),
        "activations": activations,
    }
