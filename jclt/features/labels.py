"""Labels of features: short texts that say what a feature means, where they come from, and how well they hold."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jclt.coders import find_coder
from jclt.errors import UserError
from jclt.files import read_json, write_json

LABELS_FILE, LABELS_FORMAT, LABELS_VERSION = "labels.json", "jclt-labels", 1
SOURCES = ("yours", "concepts", "rules", "weights", "endpoint")
LONGEST_LABEL = 200
"""The most characters of a label's text."""
BETWEEN = " | "
"""Stands between two texts of one feature that were both kept."""


class Label(NamedTuple):
    text: str
    source: str  # one of `SOURCES`
    scores: Mapping[str, float] = MappingProxyType({})  # such as {"detection": 0.93, "shuffled": 0.51}


Place = tuple[int, int]
"""The layer and number of a feature."""
Labels = dict[Place, Label]


def load_labels(source: str | Path, coder: str | None = None) -> Labels:
    """The labels in a file, in a folder that holds `labels.json`, or of the shipped coder ("demo"). With the
    fingerprint of a coder, labels of another coder are an error."""
    path = find_labels(source)
    content = read_json(path, "labels of features")
    if content.get("format") != LABELS_FORMAT or content.get("version") != LABELS_VERSION:
        raise UserError(f"{path}: not labels of version {LABELS_VERSION}, expected a file written by save_labels")
    if coder is not None and content.get("coder") != coder:
        raise UserError(f"{path}: labels of another coder ({content.get('coder')}), expected those of {coder}")
    labels = content.get("labels")
    if not isinstance(labels, dict):
        raise UserError(f"{path}: 'labels' is damaged, expected an object such as {{\"0/191\": ...}}")
    return {parse_place(place, path): _parse_label(label, f"{path}: {place}") for place, label in labels.items()}


def load_label_texts(source: str | Path, coder: str | None = None) -> dict[tuple[int, int], str]:
    """The texts of these labels."""
    return {place: label.text for place, label in load_labels(source, coder).items()}


def find_labels(source: str | Path) -> Path:
    """The file that `load_labels` reads; it need not exist."""
    path = find_coder("demo") if source == "demo" else Path(source)
    return path / LABELS_FILE if path.is_dir() else path


def save_labels(path: str | Path, labels: Mapping[tuple[int, int], Label], coder: str) -> None:
    """Writes all labels to a file, whole, with the fingerprint of the coder that they are of."""
    for (layer, feature), label in labels.items():
        check_label(label, f"label of {layer}/{feature}")
    content = {
        f"{layer}/{feature}": {
            "text": label.text,
            "source": label.source,
            "scores": {n: round(x, 4) for n, x in label.scores.items()},
        }
        for (layer, feature), label in sorted(labels.items())
    }
    write_json(Path(path), {"format": LABELS_FORMAT, "version": LABELS_VERSION, "coder": coder, "labels": content})


def check_label(label: Label, where: str) -> None:
    """An error unless the text is one line that can be shown, of limited length."""
    if not (label.text.strip() and label.text.isprintable() and len(label.text) <= LONGEST_LABEL):
        raise UserError(f"{where}: {label.text[:40]!r}, expected one line of 1 to {LONGEST_LABEL} characters")
    if label.source not in SOURCES:
        raise UserError(f"{where}: source {label.source[:40]!r}, expected one of {', '.join(SOURCES)}")


def merge_labels(
    base: Mapping[tuple[int, int], Label],
    mine: Mapping[tuple[int, int], Label],
    theirs: Mapping[tuple[int, int], Label],
) -> Labels:
    """The labels after two editors who both began with `base`.

    For each feature, what only one of them changed or removed is taken. Where both changed it, and not alike, both
    texts are kept, mine first, with ` | ` between them and no scores. Where one changed and one removed it, it stays.
    """
    merged: Labels = {}
    for place in sorted({*base, *mine, *theirs}):
        before, a, b = base.get(place), mine.get(place), theirs.get(place)
        kept = b if a == before else a if b == before or b is None or a == b else _keep_both(a, b)
        if kept is not None:
            merged[place] = kept
    return merged


def _keep_both(mine: Label | None, theirs: Label) -> Label:
    if mine is None:
        return theirs
    texts = dict.fromkeys([*mine.text.split(BETWEEN), *theirs.text.split(BETWEEN)])
    if len(texts) == 1:  # they differ in their scores alone
        return mine
    text = BETWEEN.join(texts)
    return Label(text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 3]}...", mine.source)


def parse_place(place: str, where: object) -> tuple[int, int]:
    """Layer and number of a feature, written as `0/191`."""
    layer, slash, feature = place.partition("/")
    if not (slash and layer.isdecimal() and feature.isdecimal() and len(place) < 24):
        raise UserError(f"{where}: {place[:40]!r}, expected LAYER/FEATURE such as 0/191")
    return int(layer), int(feature)


def _parse_label(content: Any, where: str) -> Label:
    if not isinstance(content, dict):
        raise UserError(f'{where}: expected an object such as {{"text": "say Denver", "source": "yours"}}')
    text, source, scores = content.get("text"), content.get("source"), content.get("scores", {})
    if not (isinstance(text, str) and isinstance(source, str) and isinstance(scores, dict)):
        raise UserError(f"{where}: expected a text, a source and an object of scores")
    if not all(isinstance(score, int | float) and not isinstance(score, bool) for score in scores.values()):
        raise UserError(f"{where}: expected scores that are numbers")
    label = Label(text, source, {str(name): float(score) for name, score in scores.items()})
    check_label(label, where)
    return label
