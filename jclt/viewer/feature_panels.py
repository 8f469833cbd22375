"""What is known of features beside their numbers: labels and descriptions. The page takes all of it from here.

A features folder is what `jclt features` wrote, with labels.json if `jclt label` wrote labels there; or it holds a file
`NUMBER.json` for each described feature as published viewers read it, with the number by which they know the feature.
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jclt.errors import UserError
from jclt.features import Features, load_features
from jclt.features.columns import SETTINGS
from jclt.features.labels import LABELS_FILE, load_label_texts
from jclt.features.viewer_files import make_viewer_feature
from jclt.files import read_json
from jclt.graphs import Graph
from jclt.graphs.export_nodes import cantor
from jclt.graphs.names import LabelTexts
from jclt.graphs.viewer_json import Json
from jclt.shapes import Float

if TYPE_CHECKING:
    from jclt.coders import Coder
    from jclt.models import Model

EFFECTS, EFFECT_IDS = 10, ("raised_ids", "lowered_ids")
"""How many tokens the page shows, and their columns."""


def read_labels(folder: Path | None, coder: str | None = None) -> LabelTexts:
    """The labels in a features folder; none without a folder, or if they are of another coder than the one with this
    fingerprint."""
    if folder is None or not (folder / LABELS_FILE).exists():
        return {}
    written_for = read_json(folder / LABELS_FILE).get("coder")
    return {} if are_others(written_for, coder) else load_label_texts(folder)


@cache
def _open_features(folder: Path) -> Features:
    return load_features(folder)


def has_columns(folder: Path | None) -> bool:
    """Whether `jclt features` wrote the folder, and not other software."""
    return folder is not None and (folder / SETTINGS).exists()


def read_description(folder: Path | None, layer: int, feature: int, coder: str | None = None) -> Json | None:
    """Examples, logit effects and histogram of a feature, if the folder has them; an error if they are of another coder
    than the one with this fingerprint. `checked` says whether both coders are known."""
    if folder is None:
        return None
    if has_columns(folder):
        features = _open_features(folder)
        described = features.settings["coder"].get("fingerprint")
        if are_others(described, coder):
            raise UserError(f"The examples in {folder} are of another coder ({described}) than this graph ({coder}).")
        if layer not in features.layers or feature >= features.settings["features"]:
            return None
        return make_viewer_feature(features[layer, feature]) | {"checked": coder is not None}
    path = folder / f"{cantor(layer, feature)}.json"
    return read_json(path) | {"checked": False} if path.exists() else None


def describe_by_weights(model: "Model", coder: "Coder", layer: int, feature: int) -> Json | None:
    """What the weights alone say of a feature; None if the coder does not have it."""
    from jclt.attribution.targets import decode_token
    from jclt.features.weights import describe_effects

    index = coder.config.index(layer)  # of the covered layers
    if index is None or not 0 <= feature < coder.config.features:
        return None
    columns, _ = describe_effects(model, coder, index, np.array([feature], np.int32), EFFECTS)
    tokens = {name: [decode_token(model, token) for token in columns[name][0].tolist()] for name in EFFECT_IDS}
    norms = {"layer": layer, "decoder_norms": columns["decoder_norms"][0].tolist()}
    return {"top_logits": tokens["raised_ids"], "bottom_logits": tokens["lowered_ids"], "jclt": norms}


def read_densities(folder: Path | None, graph: Graph) -> Float[np.ndarray, "N"] | None:
    """The share of tokens on which each feature of the graph is active; NaN where it is unknown, and for other nodes.
    None if the folder is of another coder, or has examples alone."""
    if folder is None or not has_columns(folder):
        return None
    features, found = _open_features(folder), np.full(len(graph), np.nan)
    if are_others(features.settings["coder"].get("fingerprint"), coder_of(graph)):
        return None
    layers, _, numbers = graph.features.T
    for layer in set(features.layers) & set(layers.tolist()):
        counts, nodes = features.column(layer, "count"), np.flatnonzero(layers == layer)
        nodes = nodes[numbers[nodes] < len(counts)]
        found[nodes] = counts[numbers[nodes]] / features.settings["tokens"]
    return found


def coder_of(graph: Graph) -> str | None:
    """The fingerprint of the graph's coder, if its file says it."""
    known = graph.provenance.get("coder_fingerprint")
    return known if isinstance(known, str) else None


def are_others(one: object, other: object) -> bool:
    """Whether these are known to be fingerprints of two coders."""
    return one is not None and other is not None and one != other
