"""What is known of features beside their numbers: labels and descriptions. The page takes all of it from here.

A features folder is what `jclt features` wrote, with labels.json if `jclt label` wrote labels there; or it holds a file
`NUMBER.json` for each described feature as published viewers read it, with the number by which they know the feature.
"""

from functools import cache
from pathlib import Path

from jclt.features import Features, load_features
from jclt.features.columns import SETTINGS
from jclt.features.labels import LABELS_FILE, load_label_texts
from jclt.features.viewer_files import make_viewer_feature
from jclt.files import read_json
from jclt.graphs.export_nodes import cantor
from jclt.graphs.names import LabelTexts
from jclt.graphs.viewer_json import Json


def read_labels(folder: Path | None) -> LabelTexts:
    """The labels in a features folder; none without a folder."""
    if folder is None or not (folder / LABELS_FILE).exists():
        return {}
    return load_label_texts(folder)


@cache
def _open_features(folder: Path) -> Features:
    return load_features(folder)


def read_description(folder: Path | None, layer: int, feature: int) -> Json | None:
    """Examples, logit effects and histogram of a feature, if the folder has them."""
    if folder is None:
        return None
    if (folder / SETTINGS).exists():
        return make_viewer_feature(_open_features(folder)[layer, feature])
    path = folder / f"{cantor(layer, feature)}.json"
    return read_json(path) if path.exists() else None
