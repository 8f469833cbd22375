"""Rules and their scores on a model whose neurons' rules are known, and on windows made by hand."""

import numpy as np
import pytest
from features_of_random_coders import draw_rows, encode_rows, make_coder, make_model

from jclt.coders import neurons
from jclt.errors import UserError
from jclt.features import windows as of_windows
from jclt.features.labels import Label
from jclt.features.rows import find_rows
from jclt.features.rule_labels import label_by_rules, measure_random_directions, score_rules
from jclt.features.rules import Rule, apply_rule, find_classes, find_rule, parse_rule, write_rule
from jclt.features.scores import correlate, draw_highlights, score_prediction
from jclt.features.windows import Windows, collect_windows
from jclt.world.handmade import CITY_TOKENS, PROMPTS, STATE_OF_CITY, build_two_hop

VOCABULARY = [" a", " the", " Denver", "7", " 12", ",", "\n", "ing", "<bos>"]


def make_windows(tokens: np.ndarray, activations: np.ndarray) -> Windows:
    return Windows(
        np.pad(tokens, ((0, 0), (1, 1)), constant_values=-1), activations, tokens >= 0, np.zeros(len(tokens), int)
    )


@pytest.fixture(scope="module")
def known():
    """The neurons of the model set by hand: one fires after each city, one after the cities of each state."""
    model = build_two_hop()
    names = [str(token) for token in range(model.config.vocabulary)]
    places = [(0, city) for city in range(12)] + [(1, state) for state in range(4)]
    rows = np.asarray(PROMPTS * 20, np.int32)
    rows = rows[np.random.default_rng(0).permutation(len(rows))]
    return names, collect_windows(model, neurons(model), find_rows(model, rows, None, None), places, share=None)


def true_rule(layer: int, feature: int) -> Rule:
    cities = [feature] if layer == 0 else [city for city, state in enumerate(STATE_OF_CITY) if state == feature]
    return Rule("after", tuple(CITY_TOKENS[city] for city in cities))


def test_the_true_rule_is_found_and_scores_one(known):
    names, windows = known
    labels = label_by_rules(windows, names, {})
    assert set(labels) == set(windows)
    for (layer, feature), label in labels.items():
        found = parse_rule(label.text, names, {})
        assert found is not None and sorted(found.tokens) == sorted(true_rule(layer, feature).tokens)
        assert label.source == "rules"
        for score in ("detection", "fuzzing", "simulation"):
            assert label.scores[score] == pytest.approx(1, abs=1e-6), (layer, feature, score)
        # The label of another city or state never holds where this one fires, and else at 1 of 11 or of 3.
        others = 11 if layer == 0 else 3
        assert label.scores["shuffled"] == pytest.approx((1 - 1 / others) / 2, abs=0.05)


def test_wrong_rules_score_no_better_than_chance(known):
    names, windows = known
    wrong = {(0, 3): Label(write_rule(true_rule(0, 4), names), "yours"), (1, 0): Label("free text", "yours")}
    scored = score_rules(wrong, windows, names, {})
    assert scored[0, 3].scores["detection"] <= 0.5 and scored[0, 3].scores["simulation"] <= 0
    assert scored[1, 0].scores == {}


def test_a_label_by_weights_that_is_as_good_is_taken(known):
    names, windows = known
    others = {(0, 3): Label(write_rule(true_rule(0, 3), names), "weights")}
    others[0, 4] = Label("say '3'", "weights")
    labels = label_by_rules(windows, names, {}, others)
    assert labels[0, 3].source == "weights" and labels[0, 4].source == "rules"
    assert labels[0, 3].scores["detection"] == 1


def test_windows_are_what_the_model_does():
    model = make_model()
    coder, rows = make_coder(model), draw_rows()
    data = find_rows(model, rows, None, None)
    places = [(layer, feature) for layer in (0, 2) for feature in (0, 5, 11)]
    activations = encode_rows(model, coder, rows)
    for place, pair in collect_windows(model, coder, data, places, count=6).items():
        a = activations[place[0], :, :, place[1]]
        for half, windows in enumerate(pair):
            fires, silent = (a[half::2] > 0).any(1), ~(a[half::2] > 0).any(1)
            assert windows.fires.sum() == min(6, (a[half::2] > 0).sum()) and (~windows.fires).sum() <= silent.sum() * 12
            assert windows.fires.any() == fires.any()
            for tokens, values in zip(windows.tokens, windows.activations, strict=True):
                same = [n for n in range(half, len(rows), 2) if (rows[n] == tokens[1:-1]).all()]
                assert any(np.allclose(np.maximum(a[n], 0), values, atol=1e-5) for n in same)
            assert (windows.tokens[:, [0, -1]] == -1).all()
    with pytest.raises(UserError, match="feature 7/0: the coder has none"):
        collect_windows(model, coder, data, [(7, 0)])


def test_longer_rows_are_cut_around_the_firing(monkeypatch):
    monkeypatch.setattr(of_windows, "WINDOW_TOKENS", 4)
    model = make_model()
    coder, rows = make_coder(model), draw_rows()
    pair = collect_windows(model, coder, find_rows(model, rows, None, None), [(1, 3)], count=8)[1, 3]
    assert pair.explaining.activations.shape[1] == 4 and pair.explaining.tokens.shape[1] == 6
    for tokens, start in zip(pair.explaining.tokens, pair.explaining.start, strict=True):
        padded = np.pad(rows[::2], ((0, 0), (1, 1)), constant_values=-1)[:, start : start + 6]
        assert (padded == tokens).all(axis=1).any()


def test_random_directions_are_described_by_rules_too():
    model = make_model()
    names = [str(n) for n in range(model.config.vocabulary)]
    data = find_rows(model, draw_rows(), None, None)
    found = measure_random_directions(model, make_coder(model), data, {}, names, 0.1, [0, 1, 2], count=4)
    assert set(found) <= {0, 1, 2} and all(0.3 < score <= 1 for score in found.values())


@pytest.mark.parametrize(
    "text",
    ["on ' a', ' the'", "after digits", "before '\\n'", "at position 3", "at the last position", "say ' Denver'"],
)
def test_a_rule_is_the_same_after_its_text(text):
    classes = find_classes(VOCABULARY)
    rule = parse_rule(text, VOCABULARY, classes)
    assert rule is not None and write_rule(rule, VOCABULARY) == text


@pytest.mark.parametrize(
    "text", ["", "on", "on nothing", "on 'absent'", "at position x", "state = Ohio", "on __import__('os')", "on (" * 99]
)
def test_other_texts_are_no_rules(text):
    assert parse_rule(text, VOCABULARY, find_classes(VOCABULARY)) is None


def test_classes_are_what_their_names_say():
    found = {name: [VOCABULARY[i] for i in np.flatnonzero(mask)] for name, mask in find_classes(VOCABULARY).items()}
    assert found["digits"] == ["7", " 12"] and found["capitalised words"] == [" Denver"]
    assert found["lower-case words"] == [" a", " the", "ing"] and found["punctuation"] == [",", "<bos>"][:1]
    assert found["whitespace"] == ["\n"] and found["pieces of words"] == ["ing"]


def test_rules_hold_where_they_say():
    tokens = np.array([[8, 0, 3, 2], [4, 1, 5, -1]])
    windows, classes = make_windows(tokens, np.zeros((2, 4))), find_classes(VOCABULARY)
    want = {
        "on digits": [[0, 0, 1, 0], [1, 0, 0, 0]],
        "after digits": [[0, 0, 0, 1], [0, 1, 0, 0]],
        "before digits": [[0, 1, 0, 0], [0, 0, 0, 0]],
        "on ' a', ','": [[0, 1, 0, 0], [0, 0, 1, 0]],
        "at position 1": [[0, 1, 0, 0], [0, 1, 0, 0]],
        "at the last position": [[0, 0, 0, 1], [0, 0, 1, 0]],
    }
    for text, mask in want.items():
        rule = parse_rule(text, VOCABULARY, classes)
        assert rule is not None
        np.testing.assert_array_equal(apply_rule(rule, windows, classes), np.array(mask, bool), err_msg=text)


def test_scores_are_those_of_their_definitions():
    random = np.random.default_rng(0)
    tokens = random.integers(0, 8, (40, 10))
    activations = np.where(random.random((40, 10)) < 0.05, random.random((40, 10)).astype(np.float32) + 0.1, 0)
    windows, said = make_windows(tokens, activations), random.random((40, 10)) < 0.1
    scores, fires, predicted = score_prediction(said, windows), np.any(activations > 0, axis=1), np.any(said, axis=1)
    sensitivity, specificity = (predicted & fires).sum() / fires.sum(), (~predicted & ~fires).sum() / (~fires).sum()
    assert scores["detection"] == pytest.approx((sensitivity + specificity) / 2)
    assert scores["simulation"] == pytest.approx(np.corrcoef(said.ravel(), activations.ravel())[0, 1])
    assert score_prediction(activations > 0, windows)["fuzzing"] == 1
    assert score_prediction(activations <= 0, windows)["fuzzing"] == 0
    highlights = draw_highlights(windows)
    for window, marked, right in zip(*highlights, strict=True):
        values = activations[window]
        assert fires[window] and ((values[marked] >= 0.3 * values.max()) if right else (values[marked] == 0)).all()
    assert correlate(np.ones(3), np.arange(3.0)) == 0


def test_too_few_windows_make_no_label():
    windows = make_windows(np.ones((8, 4), int), np.zeros((8, 4)))
    assert find_rule(windows, VOCABULARY, {}) is None
    assert find_rule(replace_first(windows), VOCABULARY, {}) is None


def replace_first(windows: Windows) -> Windows:
    activations = windows.activations.copy()
    activations[0, 0] = 1
    return windows._replace(activations=activations)
