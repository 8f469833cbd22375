"""All that is counted of one layer's features, block by block, as arrays that can be saved and read again."""

from collections.abc import Mapping

import numpy as np

from jclt.data.batches import hash_bits
from jclt.features.best_examples import add_examples, make_examples, sort_examples
from jclt.features.columns import BINS, EXAMPLES, Sizes, find_bins, find_token_type
from jclt.features.events import Events
from jclt.features.frequent_tokens import add_counts, make_counts, sort_counts
from jclt.features.rows import Block
from jclt.shapes import Float, Int

Tally = dict[str, np.ndarray]
FEATURES_AT_ONCE = 512


def make_tally(threshold: Float[np.ndarray, "F"], sizes: Sizes, vocabulary: int) -> Tally:
    """Nothing counted yet."""
    features, token_type = len(threshold), find_token_type(vocabulary)
    tally = {
        "threshold": threshold,
        "count": np.zeros(features, np.int64),
        "sum": np.zeros(features),
        "maximum": np.zeros(features, np.float32),
        "histogram": np.zeros((features, BINS), np.uint32),
        "fired_feature": np.zeros(0, np.int32),
        "fired_place": np.zeros(0, np.int64),
    }
    for kind, count in (("top", sizes.top), ("sample", sizes.sample)):
        tally |= _add_prefix(kind, make_examples(features, count, 2 * sizes.context + 1, token_type))
    for kind in ("token", "next"):
        tally |= _add_prefix(kind, make_counts(features, sizes.tokens))
    return tally


def add_events(tally: Tally, events: Events, block: Block, vocabulary: int) -> None:
    """Counts what one block's events say, in place."""
    feature, place, value = events
    length, features = block.tokens.shape[1], len(tally["count"])
    tokens, row = block.tokens.reshape(-1), place // length
    position = place - row * length
    tally["count"] += np.bincount(feature, minlength=features)
    tally["sum"] += np.bincount(feature, value, minlength=features)
    np.maximum.at(tally["maximum"], feature, value)
    bins = np.bincount(feature.astype(np.int64) * BINS + find_bins(value), minlength=features * BINS)
    tally["histogram"] += bins.reshape(features, BINS).astype(np.uint32)

    add_examples(_take_prefix(tally, "top"), events, value.astype(np.float64), block)
    random = draw_numbers(block.rows[row] * length + position)
    add_examples(_take_prefix(tally, "sample"), events, random, block)

    add_counts(_take_prefix(tally, "token"), feature, tokens[place], vocabulary)
    has_next = position + 1 < length
    add_counts(_take_prefix(tally, "next"), feature[has_next], tokens[place[has_next] + 1], vocabulary)

    if (block.cofiring >= 0).any():
        looked_at = block.cofiring[row] >= 0
        fired = block.cofiring[row[looked_at]].astype(np.int64) * length + position[looked_at]
        tally["fired_feature"] = np.concatenate([tally["fired_feature"], feature[looked_at].astype(np.int32)])
        tally["fired_place"] = np.concatenate([tally["fired_place"], fired])


def draw_numbers(place: Int[np.ndarray, "E"]) -> Float[np.ndarray, "E"]:
    """A number from 0 to 1 for each token of the data: random, and the same in every pass."""
    return (hash_bits(place.astype(np.uint64) + np.uint64(1)) >> np.uint64(11)) * 2.0**-53


def finish_tally(tally: Mapping[str, np.ndarray], neighbours: int, length: int) -> dict[str, np.ndarray]:
    """The columns that follow from what was counted."""
    plain = ("threshold", "count", "sum", "maximum", "histogram")
    columns = {name: tally[name] for name in plain}
    for kind in ("top", "sample"):
        examples = sort_examples(_take_prefix(tally, kind), length)
        columns |= _add_prefix(kind, {name: examples[name] for name in EXAMPLES})
    for kind in ("token", "next"):
        columns |= _add_prefix(kind, sort_counts(_take_prefix(tally, kind)))
    features = len(tally["count"])
    cofiring = find_cofiring(tally["fired_feature"], tally["fired_place"], features, neighbours)
    return columns | _add_prefix("cofiring", cofiring)


def find_cofiring(
    feature: Int[np.ndarray, "E"], place: Int[np.ndarray, "E"], features: int, neighbours: int
) -> dict[str, np.ndarray]:
    """For each feature the others that fire most often at the same places, how often, and how often it fires itself.
    Of equal counts the lower number comes first."""
    from scipy.sparse import csr_array

    neighbours = min(neighbours, features - 1)
    _, token = np.unique(place, return_inverse=True)
    ones = np.ones(len(feature), np.int32)
    fired = csr_array((ones, (token, feature)), shape=(int(token.max(initial=-1)) + 1, features))
    ids = np.full((features, neighbours), -1, np.int32)
    counts = np.zeros((features, neighbours), np.int64)
    by_feature = fired.T.tocsr()
    for start in range(0, features, FEATURES_AT_ONCE):
        together = (by_feature[start : start + FEATURES_AT_ONCE] @ fired).toarray().astype(np.int64)
        here = np.arange(len(together))
        together[here, start + here] = 0
        order = together * features + np.arange(features)[::-1]  # the count, then the lower number
        best = (
            np.argpartition(-order, neighbours - 1, axis=1)[:, :neighbours]
            if neighbours
            else np.zeros((len(here), 0), int)
        )
        best = np.take_along_axis(best, np.argsort(-np.take_along_axis(order, best, axis=1), axis=1), axis=1)
        often = np.take_along_axis(together, best, axis=1)
        counts[start + here], ids[start + here] = often, np.where(often > 0, best, -1)
    return {"ids": ids, "counts": counts, "own": np.bincount(feature, minlength=features)}


def _add_prefix(kind: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{kind}_{name}": array for name, array in arrays.items()}


def _take_prefix(arrays: Mapping[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """The arrays whose names begin so, themselves and no copies."""
    return {name.removeprefix(f"{kind}_"): array for name, array in arrays.items() if name.startswith(f"{kind}_")}
