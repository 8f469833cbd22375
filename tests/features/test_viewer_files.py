"""The JSON of published viewers, there and back; damaged files are errors of one line."""

import gzip
import json
from dataclasses import fields, replace

import numpy as np
import pytest
from features_of_random_coders import SIZES, draw_rows, make_coder, make_model
from graph_lists import hand_graph, replace_lists

from jclt.errors import UserError
from jclt.features import FeatureRecord, describe_features, export_bundle, export_features, load_features, read_bundle
from jclt.features.columns import SETTINGS
from jclt.features.viewer_files import read_feature_file, spread_histogram
from jclt.files import read_json
from jclt.graphs import Graph, import_json, label_nodes
from jclt.graphs.export_nodes import cantor
from jclt.viewer import write_graph, write_viewer_json
from jclt.viewer.feature_files import write_feature_files


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    model = make_model()
    return describe_features(
        model, make_coder(model), draw_rows(), out=tmp_path_factory.mktemp("features") / "out", sizes=SIZES
    )


def check_same(record: FeatureRecord, other: FeatureRecord) -> None:
    """Numbers of examples are written as decimals that read back as the same float32."""
    for field in fields(record):
        a, b = getattr(record, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b)
        elif field.name in ("top", "sample"):
            for x, y in zip(a, b, strict=True):
                assert x[:2] == y[:2] and x[3:5] == y[3:5] and x.ids == y.ids
                np.testing.assert_array_equal(np.float32(x.activations), np.float32(y.activations))
                assert np.float32(x.value) == np.float32(y.value)
        else:
            assert a == b, field.name


def test_a_feature_is_the_same_after_its_file(features, tmp_path):
    places = [(0, 3), (2, 23)]
    export_features(features, places, tmp_path, labels={(0, 3): "a label"})
    assert {path.name for path in tmp_path.iterdir()} == {f"{cantor(*place)}.json" for place in places}
    content = json.loads((tmp_path / f"{cantor(0, 3)}.json").read_text())
    assert content["index"] == 3 and content["label"] == "a label" and len(content["quantile_values"]) == 100
    assert content["act_max"] == features[0, 3].maximum and sum(content["histogram"]) == pytest.approx(
        features[0, 3].count
    )
    for group in content["examples_quantiles"]:
        for example in group["examples"]:
            assert len(example["tokens"]) == len(example["tokens_acts_list"])
            assert example["tokens_acts_list"][example["train_token_ind"]] > 0
    for place in places:
        check_same(features[place], read_feature_file(tmp_path / f"{cantor(*place)}.json"))


def test_a_feature_is_the_same_after_a_bundle(features, tmp_path):
    export_bundle(features, tmp_path)
    for place in ((0, 0), (1, 7), (2, 23)):
        check_same(features[place], read_bundle(tmp_path, *place))
    with pytest.raises(UserError, match="has no feature 1/24"):
        read_bundle(tmp_path, 1, 24)
    (tmp_path / "layer_1.bin").write_bytes(b"\4\0\0\0no")
    with pytest.raises(UserError, match=r"layer_1\.bin: feature 1/0: not valid gzip"):
        read_bundle(tmp_path, 1, 0)
    (tmp_path / "index.json.gz").write_bytes(gzip.compress(bytes(30_000_000)))
    with pytest.raises(UserError, match="unpacks to more than"):
        read_bundle(tmp_path, 0, 0)
    (tmp_path / "index.json.gz").write_bytes(gzip.compress(b'{"0": {"filename": "../x", "offsets": [0, 9]}}'))
    with pytest.raises(UserError, match="expected one in its own folder"):
        read_bundle(tmp_path, 0, 0)


def test_files_of_other_software_have_their_examples(tmp_path):
    path = tmp_path / "7.json"
    example = {"tokens": ["a", " b"], "tokens_acts_list": [0, 2.5]}
    path.write_text(json.dumps({"index": 7, "examples_quantiles": [{"quantile_name": "Top", "examples": [example]}]}))
    record = read_feature_file(path)
    assert record.feature == 7 and record.top[0].token == " b" and record.maximum == 2.5
    assert record.top[0].mark() == "a[ b]"
    for content in ("[]", "{}", '{"index": 7, "examples_quantiles": [3]}', '{"index": 1, "examples_quantiles": 0}'):
        path.write_text(content)
        with pytest.raises(UserError, match=r"7\.json: "):
            read_feature_file(path)


def test_the_linear_histogram_keeps_the_number(features):
    record = features[1, 2]
    linear = spread_histogram(record.histogram, record.maximum)
    assert len(linear) == 40 and linear.sum() == pytest.approx(record.count, abs=0.1)
    assert not spread_histogram(record.histogram * 0, 0.0).any()


def test_a_record_describes_itself_and_wrong_places_are_named(features, tmp_path):
    record = features[0, 3]
    text = record.describe()
    assert text.startswith(f"layer 0 feature 3: fires at {record.count} of {record.tokens} tokens")
    assert record.quantile(1.0) == record.maximum and record.quantile(0.1) <= record.quantile(0.9)
    assert len(list(features)) == len(features) == 72
    for place, message in (((5, 0), "layer 5: expected one of 0, 1, 2"), ((0, 24), "expected a number from 0 to 23")):
        with pytest.raises(UserError, match=message):
            features[place]
    with pytest.raises(UserError, match="not found, expected a folder made by `jclt features`"):
        load_features(tmp_path)
    (tmp_path / SETTINGS).write_text('{"format": "x"}')
    with pytest.raises(UserError, match="expected a folder made by `jclt features`"):
        load_features(tmp_path)


def traced_graph(features) -> Graph:
    """Two features of the coder that `features` describes."""
    provenance = {"model": "someone/random", "coder_fingerprint": features.settings["coder"]["fingerprint"]}
    return replace_lists(hand_graph(), features=np.array([[0, 0, 17], [2, 1, 20]]), provenance=provenance)


def test_viewers_find_each_feature_of_a_graph(features, tmp_path):
    """At the path that the node's number and the graph's `scan` make, where /data is the folder of graphs."""
    graph, layer, feature = traced_graph(features), 0, 17
    graph = label_nodes(graph, {(layer, feature): "the first"})
    name = write_graph(graph, graph.prune(), tmp_path, features=features)
    write_viewer_json(graph, tmp_path, "again", features)
    for file in (f"{name}.json", "again.json"):
        content = read_json(tmp_path / file)
        scan = content["metadata"]["scan"]
        assert scan.startswith("./data/") and content["metadata"]["model"] == "random"
        nodes = [node for node in content["nodes"] if node["feature_type"] == "cross layer transcoder"]
        assert len(nodes) == len(graph.prune().features)
        for node in nodes:
            path = tmp_path / scan.removeprefix("./data/") / f"{node['feature']}.json"
            record = read_feature_file(path)
            assert node["node_id"].startswith(f"{record.layer}_{record.feature}_")
            assert read_json(path).get("label") == (node["clerp"] or None)
        assert {node["clerp"] for node in nodes} == {"the first", ""}
    listed = [entry["scan"] for entry in read_json(tmp_path / "graph-metadata.json")["graphs"]]
    assert listed == [scan] and import_json(tmp_path / "again.json").provenance["model"] == "random"


def test_features_of_another_coder_are_refused(features, tmp_path):
    other = replace(traced_graph(features), provenance={"coder_fingerprint": "other"})
    with pytest.raises(UserError, match=r"features of another coder \(\w+\), expected those of other"):
        write_feature_files(other, features, tmp_path)
    assert not np.any(list(tmp_path.iterdir()))
