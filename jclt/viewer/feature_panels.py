"""What is known of features beside their numbers: labels and descriptions. The page takes all of it from here.

A features folder holds `labels.json`, an object of labels by `layer/number`, and for each described feature a file
`NUMBER.json` as published viewers read it, with the number by which they know the feature.
"""

from pathlib import Path

from jclt.errors import UserError
from jclt.files import read_json
from jclt.graphs.export_nodes import cantor
from jclt.graphs.viewer_json import Json, Labels

LABELS = "labels.json"


def read_labels(folder: Path | None) -> Labels:
    """The labels in a features folder; none without a folder."""
    if folder is None or not (folder / LABELS).exists():
        return {}
    labels = {}
    for key, text in read_json(folder / LABELS).items():
        labels[parse_feature(key, folder / LABELS)] = str(text)
    return labels


def read_description(folder: Path | None, layer: int, feature: int) -> Json | None:
    """Examples, logit effects and histogram of a feature, if the folder has them."""
    if folder is None:
        return None
    path = folder / f"{cantor(layer, feature)}.json"
    return read_json(path) if path.exists() else None


def parse_feature(text: str, where: object) -> tuple[int, int]:
    """Layer and number of a feature, written as `3/17`."""
    layer, slash, feature = text.partition("/")
    if not (slash and layer.isdecimal() and feature.isdecimal() and len(text) < 30):
        raise UserError(f"{where}: feature '{text}', expected layer/number")
    return int(layer), int(feature)
