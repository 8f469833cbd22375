"""Bounds of the counts in a fixed number of places, against exact counts."""

from collections import Counter

import numpy as np

from jclt.features.frequent_tokens import add_counts, make_counts, sort_counts

FEATURES, PLACES, VOCABULARY = 5, 8, 1000


def test_counts_lack_at_most_what_is_said_and_frequent_tokens_are_kept():
    random, counts = np.random.default_rng(0), make_counts(FEATURES, PLACES)
    exact = [Counter() for _ in range(FEATURES)]
    for _ in range(30):
        feature = random.integers(0, FEATURES - 1, 400)  # the last one never fires
        token = np.minimum(random.zipf(1.5, 400), VOCABULARY - 1)
        token = np.where(feature == 0, token % PLACES, token)  # the first one never runs out of places
        add_counts(counts, feature, token, VOCABULARY)
        for f, t in zip(feature.tolist(), token.tolist(), strict=True):
            exact[f][t] += 1
    ids, kept, missed = sort_counts(counts).values()
    for f in range(FEATURES):
        found = dict(zip(ids[f][ids[f] >= 0].tolist(), kept[f][ids[f] >= 0].tolist(), strict=True))
        assert all(n <= exact[f][t] <= n + missed[f] for t, n in found.items())
        assert max((exact[f][t] for t in set(exact[f]) - set(found)), default=0) <= missed[f]
        assert missed[f] * (PLACES + 1) <= sum(exact[f].values())
        assert f not in (0, FEATURES - 1) or (found == exact[f] and missed[f] == 0)
    assert missed[1:-1].all()
