"""Features as the JSON that published viewers read: a file for each feature, or a bundle of all.

A file is `NUMBER.json`, with the number that a graph's JSON gives the feature in its field `feature` (Cantor's pairing
of layer and feature). A bundle is `index.json.gz`, which gives for each layer a file and where each feature begins in
it; there stand four bytes, the length, and the feature's JSON compressed by gzip. What viewers have no field for is in
the object `jclt`, so that a file can be read back.
"""

import gzip
import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jclt.errors import UserError, first_line
from jclt.features.columns import BIN_EDGES
from jclt.features.records import Example, FeatureRecord, Features
from jclt.files import check_file, create_file, parse_object, read_bytes, write_bytes
from jclt.graphs.export_nodes import cantor
from jclt.graphs.names import LabelTexts
from jclt.graphs.viewer_json import encode_json, to_shortest_decimals, unpack_gzip
from jclt.shapes import Float

Json = dict[str, Any]
LINEAR_BINS = 40
"""Viewers show a histogram whose bins have one width, from 0 to the maximum."""
TOP, GROUPS = "Top activations", ("highest", "second", "third", "lowest")
INDEX_FILE = "index.json.gz"
OWN_FIELDS = ("layer", "feature", "tokens", "count", "threshold", "mean", "fires_on", "fires_on_missed")
OWN_FIELDS += ("followed_by", "followed_by_missed", "fires_with", "raises", "lowers", "reads_like", "writes_like")


def make_viewer_feature(record: FeatureRecord, label: str | None = None) -> Json:
    """The content of a feature's file."""
    groups = [(TOP, record.top)]
    for name, examples in zip(GROUPS, record.group_sample(len(GROUPS)), strict=True):
        groups.append((f"Random examples, {name} quarter", examples))
    own = {name: getattr(record, name) for name in OWN_FIELDS}
    own |= {"histogram": record.histogram.tolist(), "decoder_norms": _shorten(record.decoder_norms)}
    return {
        "index": record.feature,
        **({} if label is None else {"label": label}),
        "examples_quantiles": [
            {"quantile_name": name, "examples": [_make_example(example) for example in examples]}
            for name, examples in groups
        ],
        "top_logits": [text for text, _ in record.raises],
        "bottom_logits": [text for text, _ in record.lowers],
        "act_min": 0.0,
        "act_max": record.maximum,
        "quantile_values": [record.quantile(percent / 100) for percent in range(1, 101)],
        "histogram": spread_histogram(record.histogram, record.maximum).tolist(),
        "activation_frequency": record.density,
        "jclt": own,
    }


def _make_example(example: Example) -> Json:
    return {
        "tokens": list(example.tokens),
        "tokens_acts_list": _shorten(np.array(example.activations, np.float32)),
        "train_token_ind": example.position - example.start,
        "is_repeated_datapoint": False,
        "row": example.row,
        "position": example.position,
        "ids": list(example.ids),
    }


def _shorten(values: Float[np.ndarray, "_"]) -> list[float]:
    return to_shortest_decimals(np.asarray(values, np.float32))


def spread_histogram(histogram: np.ndarray, maximum: float) -> Float[np.ndarray, "_"]:
    """Counts in bins of one width up to the maximum, as if the activations of each of our bins lay evenly in it."""
    if maximum <= 0:
        return np.zeros(LINEAR_BINS)
    edges = np.minimum(BIN_EDGES, maximum)
    edges[0], edges[-1] = 0.0, maximum
    borders = np.linspace(0.0, maximum, LINEAR_BINS + 1)
    below = np.concatenate([[0.0], np.cumsum(histogram)])
    return np.diff(np.interp(borders, edges, below)).round(3)


def export_features(
    features: Features, places: Iterable[tuple[int, int]], folder: str | Path, labels: LabelTexts | None = None
) -> None:
    """Writes `NUMBER.json` for each of these (layer, feature), and what there was stays."""
    folder, labels = Path(folder), labels or {}
    for layer, feature in places:
        path = folder / f"{cantor(layer, feature)}.json"
        content = make_viewer_feature(features[layer, feature], labels.get((layer, feature)))
        write_bytes(path, encode_json(content, path))


def read_feature_file(path: str | Path) -> FeatureRecord:
    """The feature in a viewer's file. A file of other software has only its examples, tokens and maximum."""
    return _read_feature(parse_object(read_bytes(Path(path), "a feature's JSON file"), path), path)


def _read_feature(content: Json, where: object) -> FeatureRecord:
    own, groups = content.get("jclt", {}), content.get("examples_quantiles")
    try:
        assert isinstance(groups, list)
        examples = [tuple(map(_read_example, group["examples"])) for group in groups]
        highest = max((example.value for group in examples for example in group), default=0.0)
        named = {
            name: tuple((str(text), math.nan) for text in content.get(field, ())) for name, field in LOGITS.items()
        }
        filled = DEFAULTS | {"feature": int(content["index"])} | named | own
        values: Json = {name: filled[name] for name in OWN_FIELDS}
        values |= {name: tuple((a, b) for a, b in filled[name]) for name in PAIRS}
        return FeatureRecord(
            **values,
            maximum=float(content.get("act_max", highest)),
            histogram=np.array(own.get("histogram", ()), np.int64),
            decoder_norms=np.array(own.get("decoder_norms", ()), np.float32),
            top=examples[0] if examples else (),
            sample=tuple(example for group in examples[1:] for example in group),
        )
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        what = f"'examples_quantiles' or another field is damaged ({type(error).__name__})"
        raise UserError(f"{where}: {what}, expected a feature as viewers read it") from None


LOGITS = {"raises": "top_logits", "lowers": "bottom_logits"}
PAIRS = ("fires_on", "followed_by", "fires_with", "raises", "lowers", "reads_like", "writes_like")
DEFAULTS: Json = {"layer": -1, "tokens": 0, "count": 0, "threshold": 0.0, "mean": math.nan}
DEFAULTS |= {name: () for name in PAIRS} | {"fires_on_missed": 0, "followed_by_missed": 0}


def _read_example(example: Mapping[str, Any]) -> Example:
    tokens, activations = tuple(map(str, example["tokens"])), tuple(map(float, example["tokens_acts_list"]))
    if len(tokens) != len(activations) or not tokens:
        raise ValueError
    best = int(example.get("train_token_ind", np.argmax(activations)))
    position = int(example.get("position", best))
    ids = tuple(map(int, example.get("ids", ())))
    return Example(int(example.get("row", -1)), position, activations[best], position - best, tokens, activations, ids)


def export_bundle(features: Features, folder: str | Path, labels: LabelTexts | None = None) -> None:
    """Writes all features of all layers."""
    folder, labels, index = Path(folder), labels or {}, {}
    for layer in features.layers:
        name, offsets = f"layer_{layer}.bin", [0]
        with create_file(folder / name) as partial, partial.open("wb") as file:
            for feature in range(features.settings["features"]):
                content = make_viewer_feature(features[layer, feature], labels.get((layer, feature)))
                packed = gzip.compress(encode_json(content, folder / name), 6, mtime=0)
                offsets.append(offsets[-1] + file.write(struct.pack("<I", len(packed)) + packed))
        index[str(layer)] = {"filename": name, "offsets": offsets}
    write_bytes(folder / INDEX_FILE, gzip.compress(json.dumps(index).encode(), 6, mtime=0))


def read_bundle(folder: str | Path, layer: int, feature: int) -> FeatureRecord:
    """One feature of a bundle; of the layer's file only its bytes are read."""
    folder = Path(folder)
    path = folder / INDEX_FILE
    try:
        index = json.loads(unpack_gzip(path, read_bytes(path, "the index of a bundle of features")))
        entry = index[layer] if isinstance(index, list) else index[str(layer)]
        name, start, stop = str(entry["filename"]), int(entry["offsets"][feature]), int(entry["offsets"][feature + 1])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({first_line(error)}), expected the index of a bundle of features") from None
    except (KeyError, IndexError, TypeError, OverflowError):
        raise UserError(f"{path}: has no feature {layer}/{feature}, expected one that is in it") from None
    if Path(name).name != name:
        raise UserError(f"{path}: names the file '{name}', expected one in its own folder")
    binary = folder / name
    size = check_file(binary, "a layer of a bundle of features")
    with binary.open("rb") as file:
        file.seek(start)
        data = file.read(min(max(stop - start, 0), size))
    try:
        length = struct.unpack("<I", data[:4])[0]
    except struct.error as error:
        raise UserError(f"{binary}: feature {layer}/{feature} is damaged ({first_line(error)})") from None
    text = unpack_gzip(f"{binary}: feature {layer}/{feature}", data[4 : 4 + length])
    return _read_feature(parse_object(text, binary), binary)
