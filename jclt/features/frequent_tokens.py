"""The tokens that each feature fires on most often, in a fixed number of places for each feature.

Misra and Gries' summary, merged as by Agarwal et al. (2012): where there are more tokens than places, the count that
comes first after the last place is taken off all counts, and added to `missed`. So with the true count n of a token

    count <= n <= count + missed        (count 0 for a token without a place)

and while a feature has fired on no more tokens than it has places, missed is 0 and all counts are exact.
"""

import numpy as np

from jclt.shapes import Int

Counts = dict[str, np.ndarray]


def make_counts(features: int, places: int) -> Counts:
    """Nothing counted yet. Ids ascend; -1 stands in empty places after them."""
    return {
        "ids": np.full((features, places), -1, np.int32),
        "counts": np.zeros((features, places), np.int64),
        "missed": np.zeros(features, np.int64),
    }


def add_counts(counts: Counts, feature: Int[np.ndarray, "E"], token: Int[np.ndarray, "E"], vocabulary: int) -> None:
    """Counts the events, in place."""
    places = counts["ids"].shape[1]
    new = np.sort(feature.astype(np.int64) * vocabulary + token)
    starts = find_starts(new)
    new, often = new[starts], np.diff(starts, append=len(new))
    changed = new // vocabulary
    changed = changed[find_starts(changed)]
    ids = counts["ids"][changed]
    old = (changed[:, None] * vocabulary + ids)[ids >= 0]
    keys, numbers = np.concatenate([old, new]), np.concatenate([counts["counts"][changed][ids >= 0], often])
    order = np.argsort(keys, kind="stable")  # which is fast, as both parts are sorted
    keys = keys[order]
    starts = find_starts(keys)
    key, total = keys[starts], np.add.reduceat(numbers[order], starts) if len(keys) else numbers
    number = np.zeros(len(counts["ids"]), np.int64)
    number[changed] = np.arange(len(changed))
    owner = number[key // vocabulary]
    total -= _find_excess(owner, total, len(changed), places, counts["missed"], changed)[owner]
    key, owner, total = key[total > 0], owner[total > 0], total[total > 0]
    starts = np.searchsorted(owner, np.arange(len(changed)))
    rank = np.arange(len(owner)) - starts[owner]
    for name, values, empty in (("ids", key % vocabulary, -1), ("counts", total, 0)):
        column = np.full((len(changed), places), empty, counts[name].dtype)
        column[owner, rank] = values
        counts[name][changed] = column


def find_starts(items: Int[np.ndarray, "n"]) -> Int[np.ndarray, "_"]:
    """Where in a sorted list each run of equal items begins."""
    changes = np.flatnonzero(items[1:] != items[:-1]) + 1
    return np.concatenate([np.zeros(min(1, len(items)), changes.dtype), changes])


def _find_excess(
    owner: Int[np.ndarray, "n"],
    total: Int[np.ndarray, "n"],
    owners: int,
    places: int,
    missed: Int[np.ndarray, "F"],
    changed: Int[np.ndarray, "c"],
) -> Int[np.ndarray, "c"]:
    """What is taken off the counts of each feature that has more tokens than places; added to `missed`."""
    excess = np.zeros(owners, np.int64)
    number = np.bincount(owner, minlength=owners)
    starts = np.cumsum(number) - number
    order = np.lexsort((-total, owner))
    full = np.flatnonzero(number > places)
    excess[full] = total[order[starts[full] + places]]
    missed[changed] += excess
    return excess


def sort_counts(counts: Counts) -> Counts:
    """The same with the most frequent tokens first."""
    order = np.argsort(-counts["counts"], axis=1, kind="stable")
    ids, ordered = (np.take_along_axis(counts[name], order, axis=1) for name in ("ids", "counts"))
    return {"ids": ids, "counts": ordered, "missed": counts["missed"]}
