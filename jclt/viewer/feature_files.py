"""The files of a graph's features, where published viewers look for them when they open the graph."""

from pathlib import Path

from jclt.errors import UserError
from jclt.features import Features, export_features
from jclt.graphs import Graph, list_labels

SERVED_AS = "./data"
"""The path at which the viewers' server has the folder of graphs. Viewers take the files of features from the path in a
graph's field `scan`, if that begins with a point."""


def check_described(features: Features, coder: str | None) -> None:
    """An error unless the features are those of the coder with this fingerprint."""
    described = features.settings["coder"].get("fingerprint")
    if described != coder:
        raise UserError(f"{features.folder}: features of another coder ({described}), expected those of {coder}")


def write_feature_files(graph: Graph, features: Features, folder: Path) -> str:
    """Writes `features/CODER/NUMBER.json` for each feature of the graph, and returns the graph's `scan`. The coder is
    named by its fingerprint, so that graphs of several coders can share the folder."""
    check_described(features, graph.provenance.get("coder_fingerprint"))
    place = f"features/{features.settings['coder']['fingerprint']}"
    described = set(features.layers)
    places = {(layer, feature) for layer, _, feature in graph.features.tolist() if layer in described}
    export_features(features, sorted(places), folder / place, list_labels(graph))
    return f"{SERVED_AS}/{place}"
