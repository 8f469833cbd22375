"""Labels that are rules, and their search: no language model is needed to find or to judge them.

    on ' Denver', ' Boise'      it fires at one of these tokens
    after digits                 at the token after one of a class of tokens
    before ' to'                at the token before
    at position 1, at the last position

Two kinds of labels from weights are rules too: `say ' Denver'` is judged like `before`, `reads ' Denver'` like `on`.
"""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jclt.features.labels import LONGEST_LABEL
from jclt.features.windows import Windows
from jclt.shapes import Bool, Int

MOST_TOKENS = 8
PLACES = {"on": 1, "reads": 1, "after": 0, "before": 2, "say": 2}
"""Where the token of a rule stands: 0 before the token at which the feature fires, 1 there, 2 after it."""
LEAST_SHARES = (0.2, 0.5, 0.8)
"""A token can be in a rule if the feature fires at so large a share of its places."""

Classes = Mapping[str, Bool[np.ndarray, "V"]]
"""Classes of tokens, by name."""


class Rule(NamedTuple):
    where: str  # of PLACES, or "at"
    tokens: tuple[int, ...] = ()
    of_class: str = ""  # instead of tokens
    position: int = 0  # for "at"; -1: the last


def find_classes(vocabulary: Sequence[str]) -> dict[str, Bool[np.ndarray, "V"]]:
    """Which tokens are digits, words that begin with a capital, and so on."""
    patterns = {
        "digits": r"\s*\d+",
        "capitalised words": r"\s*[^\W\d_a-z].*",
        "lower-case words": r"\s*[a-zß-öø-ÿ].*",
        "punctuation": r"\s*[^\w\s]+",
        "whitespace": r"\s+",
        "pieces of words": r"[^\W\d_].*",
    }
    found = {name: np.array([bool(re.fullmatch(p, t, re.DOTALL)) for t in vocabulary]) for name, p in patterns.items()}
    return {name: mask for name, mask in found.items() if mask.any()}


def apply_rule(rule: Rule, windows: Windows, classes: Classes) -> Bool[np.ndarray, "N W"]:
    """Where the feature fires by the rule."""
    size = windows.valid.shape[1]
    if rule.where == "at":
        positions = windows.start[:, None] + np.arange(size)
        at = positions == rule.position if rule.position >= 0 else windows.tokens[:, 2:] < 0
        return at & windows.valid
    place = PLACES[rule.where]
    tokens = windows.tokens[:, place : place + size]
    holds = classes[rule.of_class][tokens] if rule.of_class else np.isin(tokens, rule.tokens)
    return holds & (tokens >= 0) & windows.valid


def write_rule(rule: Rule, vocabulary: Sequence[str]) -> str:
    if rule.where == "at":
        return "at the last position" if rule.position < 0 else f"at position {rule.position}"
    named = rule.of_class or ", ".join(dict.fromkeys(repr(vocabulary[token]) for token in rule.tokens))
    return f"{rule.where} {named}"


def parse_rule(text: str, vocabulary: Sequence[str], classes: Classes) -> Rule | None:
    """The rule that a label's text states; None if it is none."""
    where, _, rest = text.partition(" ")
    if text == "at the last position":
        return Rule("at", position=-1)
    if where == "at":
        number = re.fullmatch(r"position (\d{1,9})", rest)
        return Rule("at", position=int(number[1])) if number else None
    if where not in PLACES:
        return None
    if rest in classes:
        return Rule(where, of_class=rest)
    try:
        texts = ast.literal_eval(f"({rest},)")
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    tokens = tuple(number for number, token in enumerate(vocabulary) if token in texts)
    return Rule(where, tokens) if tokens else None


def balance_accuracy(said: Bool[np.ndarray, "N"], true: Bool[np.ndarray, "N"]) -> float:
    """The mean of the shares that are right of what is true and of what is not."""
    return float(said[true].mean() + (~said[~true]).mean()) / 2


def detect(rule: Rule, windows: Windows, classes: Classes) -> float:
    """The balanced accuracy of "the feature fires in this window"."""
    return balance_accuracy(np.any(apply_rule(rule, windows, classes), axis=1), windows.fires)


def find_rule(windows: Windows, vocabulary: Sequence[str], classes: Classes) -> Rule | None:
    """The rule with the highest balanced accuracy of "the feature fires in this window"; of equal ones that which finds
    the tokens best, then the shortest."""
    if not windows.enough:
        return None
    fires, active = windows.fires, windows.activations > 0
    best: tuple[float, float, int] | None = None
    chosen = None
    for rule in list_rules(windows, classes):
        text = write_rule(rule, vocabulary)
        said = apply_rule(rule, windows, classes)
        overlap = 2 * (said & active).sum() / max(1, said.sum() + active.sum())
        rank = balance_accuracy(np.any(said, axis=1), fires), float(overlap), -len(text)
        if len(text) <= LONGEST_LABEL and (best is None or rank > best):
            best, chosen = rank, rule
    return chosen


def list_rules(windows: Windows, classes: Classes) -> Iterator[Rule]:
    """The rules worth trying: of tokens, those beside which the feature fires."""
    active, size = windows.activations > 0, windows.valid.shape[1]
    for where in ("on", "after", "before"):
        for name in classes:
            yield Rule(where, of_class=name)
        tokens = windows.tokens[:, PLACES[where] : PLACES[where] + size]
        yield from _list_token_rules(where, tokens[active], tokens[windows.valid])
    positions = (windows.start[:, None] + np.arange(size))[active]
    known, often = np.unique(positions, return_counts=True)
    for position in known[np.argsort(-often, kind="stable")][:3]:
        yield Rule("at", position=int(position))
    yield Rule("at", position=-1)


def _list_token_rules(where: str, firing: Int[np.ndarray, "E"], present: Int[np.ndarray, "M"]) -> Iterator[Rule]:
    ids, counts = np.unique(firing[firing >= 0], return_counts=True)
    known, often = np.unique(present, return_counts=True)
    shares = counts / often[np.searchsorted(known, ids)] if len(ids) else counts
    order = np.argsort(-counts, kind="stable")
    seen = set()
    for least in LEAST_SHARES:
        tokens = [int(ids[i]) for i in order if shares[i] >= least][:MOST_TOKENS]
        for number in range(1, len(tokens) + 1):
            if tuple(tokens[:number]) not in seen:
                seen.add(tuple(tokens[:number]))
                yield Rule(where, tuple(tokens[:number]))
