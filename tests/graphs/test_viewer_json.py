"""Files for viewers keep all of a graph and are read without loss, and a graph can be drawn without a viewer."""

import gzip
import json
import struct
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graph_lists import build_graph, random_graph, replace_lists
from matplotlib.figure import Figure
from more_cases import mark_others

import jclt
from jclt.attribution import attribute
from jclt.coders import load_coder
from jclt.errors import UserError
from jclt.graphs import export_json, import_json, label_nodes, list_labels, load_graph, slug_of, write_index
from jclt.graphs.export_nodes import cantor
from jclt.graphs.graph import Graph
from jclt.graphs.influence import compute_cumulative_shares
from jclt.models import load_model
from jclt.viewer import draw_graph, picture_files, summarize_graph, write_graph, write_viewer_json
from jclt.viewer.label_places import do_overlap
from jclt.viewer.picture import _draw_labels, _draw_outputs
from jclt.viewer.picture_layout import lay_out
from jclt.world import TASKS

PUBLISHED = Path(__file__).parents[1] / "golden" / "published_graphs"
NAMES = ("dallas-austin-gemma-2-2b-clt", "dollar-gemma-2-2b-part", "meow-gemma-2-2b-clt")

NODE_FIELDS = {
    *("node_id", "feature", "layer", "ctx_idx", "feature_type", "token_prob", "is_target_logit"),
    *("run_idx", "reverse_ctx_idx", "jsNodeId", "clerp", "influence", "activation"),
}


def small_graph(**changes) -> Graph:
    """Two layers, three positions; feature 1 of layer 0 and the error of layer 1 at position 2 share the usual id."""
    adjacency = np.zeros((11, 11), np.float32)
    # Nodes: features 0-2, errors 3-4, tokens 5-7, position 8, outputs 9-10.
    adjacency[0, [5, 7]] = 0.1, 0.7
    adjacency[1, [0, 3, 8]] = 1.5, -0.25, 1e-7
    adjacency[2, [0, 6]] = -2.0, 1 / 3
    adjacency[9, [1, 4]] = 3.0, 1.0
    adjacency[10, [2, 1]] = -1.0, 16777216.0
    graph = build_graph(
        adjacency=adjacency,
        bias=np.zeros(11, np.float32),
        rest=np.zeros(11, np.float32),
        rest_mass=np.zeros(11, np.float32),
        values=adjacency.sum(axis=1),
        features=np.array([[0, 2, 1], [1, 2, 7], [1, 2, 90_000]]),
        activations=np.array([0.3, 2, 4.5], np.float32),
        errors=np.array([[0, 2], [1, 2]]),
        tokens=np.array([2, 50, 60]),
        token_texts=("<bos>", "The", " cat"),
        positions=np.array([2]),
        logit_tokens=np.array([77, -1]),
        logit_names=(' "mat"', "one - other"),
        logit_positions=np.array([2, 2]),
        logit_probabilities=np.array([0.1, 0.6], np.float32),
        layers=2,
        provenance={
            "model": "someone/tiny",
            "coder": "someone/coder",
            "settings": {"max_features": 3},
            "node_threshold": 0.8,
        },
        supernodes={"cats": (0, 2), "end": (4,)},
    )
    return replace_lists(graph, **changes)


def read_published(name: str) -> dict:
    return json.loads(gzip.decompress((PUBLISHED / f"{name}.json.gz").read_bytes()))


def write(path: Path, **changes) -> Path:
    """A correct file of two nodes and a link, with changes."""
    content = {
        "metadata": {"slug": "a", "scan": "m", "prompt_tokens": ["a", "b"], "prompt": "ab", "schema_version": 1},
        "qParams": {},
        "nodes": [
            {"node_id": "0_5_1", "feature": 20, "layer": "0", "ctx_idx": 1, "feature_type": "cross layer transcoder"},
            {"node_id": "E_9_0", "feature": 0, "layer": "E", "ctx_idx": 0, "feature_type": "embedding"},
            {"node_id": "2_4_1", "feature": 4, "layer": "2", "ctx_idx": 1, "feature_type": "logit"},
        ],
        "links": [{"source": "E_9_0", "target": "0_5_1", "weight": 0.5}],
    }
    path.write_text(json.dumps(content | changes))
    return path


# Written.


def test_every_node_is_written_as_viewers_expect_it():
    content = export_json(label_nodes(small_graph(), {(1, 7): "a label"}))
    nodes = content["nodes"]
    assert [node["node_id"] for node in nodes] == [
        *("0_1_2", "1_7_2", "1_90000_2", "0_0_2", "err_1_2", "E_2_0", "E_50_1", "E_60_2", "P_2", "3_77_2", "3_-2_2")
    ]
    # (0 + 1) * (0 + 1 + 1) / 2 + 1; (1 + 7) * 9 / 2 + 7; (1 + 90000) * 90002 / 2 + 90000
    assert [node["feature"] for node in nodes] == [2, 43, 4050225001, -1, -1, 0, 1, 2, 2, 77, -2]
    assert [node["layer"] for node in nodes] == ["0", "1", "1", "0", "1", "E", "E", "E", "E", "3", "3"]
    assert [node["ctx_idx"] for node in nodes] == [2, 2, 2, 2, 2, 0, 1, 2, 2, 2, 2]
    assert [node["feature_type"] for node in nodes] == (
        ["cross layer transcoder"] * 3 + ["mlp reconstruction error"] * 2 + ["embedding"] * 4 + ["logit"] * 2
    )
    assert [node["jsNodeId"] for node in nodes] == [
        *("0_1-0", "1_7-0", "1_90000-0", "0_2-0", "1_2-0", "E_2-0", "E_50-1", "E_60-2", "P_2-2", "L_77-2", "L_-2-2")
    ]
    assert [node["clerp"] for node in nodes] == [
        *("", "a label", "", "", "", "", "", "", "Position 2"),
        *('Output " "mat"" (p=0.100)', 'Output "one - other" (p=)'),
    ]
    assert [node["token_prob"] for node in nodes] == [0] * 9 + [0.1, 0.6]
    assert [node["is_target_logit"] for node in nodes] == [False] * 10 + [True]
    assert [node["activation"] for node in nodes] == [0.3, 2.0, 4.5] + [None] * 8
    assert all(set(node) == NODE_FIELDS and node["run_idx"] == node["reverse_ctx_idx"] == 0 for node in nodes)


def test_links_metadata_and_view_are_written():
    graph = small_graph()
    content = export_json(graph, slug="own", title="A title")
    assert list(content) == ["metadata", "qParams", "nodes", "links"]
    links = content["links"]
    assert {tuple(link) for link in links} == {("source", "target", "weight")}
    assert len(links) == np.count_nonzero(graph.adjacency)
    assert {"source": "err_1_2", "target": "3_77_2", "weight": 1.0} in links
    assert {"source": "P_2", "target": "1_7_2", "weight": 1e-7} in links
    assert {"source": "E_50_1", "target": "1_90000_2", "weight": 0.33333334} in links

    metadata = content["metadata"]
    expected = {"slug": "own", "scan": "tiny", "schema_version": 1, "title_prefix": "A title", "node_threshold": 0.8}
    assert expected.items() <= metadata.items()
    assert metadata["prompt_tokens"] == ["<bos>", "The", " cat"] and metadata["prompt"] == "<bos>The cat"
    assert metadata["info"]["generator"] == {"name": "jclt", "version": jclt.__version__}
    assert metadata["info"]["description"] == "someone/coder"
    assert metadata["generation_settings"] == {"max_features": 3}
    assert metadata["pruning_settings"] == {"node_threshold": 0.8}
    for score in ("replacement_score", "completeness_score"):
        assert type(metadata[score]) is float and 0 <= metadata[score] <= 1
    view = content["qParams"]
    assert view["linkType"] == "both"
    assert view["supernodes"] == [["cats", "0_1_2", "1_90000_2"], ["end", "err_1_2"]]
    assert view["pinnedIds"] == ["0_1_2", "1_90000_2", "err_1_2"]
    assert export_json(graph)["metadata"]["slug"] == "the-cat"


def test_influence_is_the_share_of_all_that_matters_at_least_as_much():
    np.testing.assert_allclose(compute_cumulative_shares(np.array([1.0, 4.0, 0.0, 5.0])), [1, 0.9, 1, 0.5])
    nodes = export_json(small_graph())["nodes"]
    assert [node["influence"] for node in nodes[-2:]] == [None, None]
    shares = {node["node_id"]: node["influence"] for node in nodes[:-2]}
    assert all(0 < share <= 1 for share in shares.values()) and max(shares.values()) == 1
    assert min(shares, key=shares.__getitem__) == "1_7_2"  # all but 1e-7 of the likelier output comes from it


def distinct_graph(seed: int, **options) -> Graph:
    """A random graph whose features all have different numbers."""
    graph = random_graph(seed, **options)
    numbers = 100 + np.arange(len(graph.features))  # larger than any layer, so that no error has a feature's id
    return replace_lists(graph, features=np.column_stack([graph.features[:, :2], numbers]))


def shown_ids(content: dict, threshold: float | None = None) -> set[str]:
    """The ids of the nodes that circuit-tracer's viewer shows. Errors follow the same rule as features. The slider
    begins at the graph's threshold."""
    threshold = content["metadata"]["node_threshold"] if threshold is None else threshold
    return {
        node["node_id"]
        for node in content["nodes"]
        if node["feature_type"] in ("embedding", "logit") or node["influence"] <= threshold
    }


@pytest.mark.parametrize("rule", ["paper", "circuit-tracer"])
@pytest.mark.parametrize("threshold", [0.5, 0.8123456789, 1.0])
def test_viewers_show_all_that_pruning_kept(rule, threshold):
    graph = distinct_graph(3, features=60, layers=4)
    full_influence = {node["node_id"]: node["influence"] for node in export_json(graph)["nodes"]}
    for small in (once := graph.prune(threshold, rule=rule), once.prune(0.9, rule=rule), once.prune(0.2, rule=rule)):
        content = export_json(small)
        assert len(content["nodes"]) == len(small) and len(shown_ids(content)) == len(small)
        limit = content["metadata"]["node_threshold"]
        influence = {node["node_id"]: node["influence"] for node in content["nodes"] if node["influence"] is not None}
        assert influence == {node_id: min(full_influence[node_id], limit) for node_id in influence}
    assert 0 < len(shown_ids(export_json(once), threshold / 2)) < len(once)  # and fewer where the user asks for fewer
    assert all(type(node["influence"]) in (float, type(None)) for node in export_json(once)["nodes"])


@pytest.mark.parametrize("name", mark_others(["random", "addition", "ioi"], ["random"]))
def test_viewers_show_all_of_a_written_graph(name, tmp_path):
    """A random one, or one of the demo's, all of which are looked at in tests/cli, too."""
    if name == "random":
        graph = distinct_graph(3, features=60, layers=4)
    else:
        model = load_model("demo")
        coder = load_coder("demo", model=model, check=False)
        graph = attribute(model, coder, TASKS[name].examples("report", 1, 0)[0].prompt)
    small = graph.prune()
    assert write_graph(graph, small, tmp_path, name) == name
    content = json.loads((tmp_path / f"{name}.json").read_text())
    assert len(shown_ids(content)) == len(small) and len(small.features) >= 9
    index = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert index == [content["metadata"]] and index[0]["slug"] == name
    assert index[0]["scan"] == graph.provenance["model"]
    metadata = content["metadata"]
    assert metadata["replacement_score"] == metadata["whole_graph_scores"]["replacement"] == graph.scores.replacement
    assert metadata["completeness_score"] == graph.scores.completeness > small.scores.completeness
    assert metadata["pruned_graph_scores"] == small.scores.both
    lines = summarize_graph(graph, small).splitlines()
    before, after = lines[1].split("; pruned to ")
    assert "active features" in before and f"completeness {graph.scores.completeness:.2f}" in before
    assert f"completeness {small.scores.completeness:.2f}, replacement {small.scores.replacement:.2f}" in after


def test_a_file_that_is_pruned_after_it_was_read_is_shown_whole(tmp_path):
    export_json(distinct_graph(3, features=60), tmp_path / "one.json")
    small = import_json(tmp_path / "one.json").prune(0.7)
    content = export_json(small)
    assert content["metadata"]["node_threshold"] == 0.7 and len(shown_ids(content)) == len(content["nodes"]) == len(
        small
    )


def test_only_tokens_are_shown_with_probabilities(tmp_path):
    graph = small_graph(
        logit_probabilities=np.array([0.1, 0], np.float32), logit_weights=np.array([0.25, 0.75], np.float32)
    )
    content = export_json(graph, slug="one")
    nodes = content["nodes"][-2:]
    assert [node["clerp"] for node in nodes] == ['Output " "mat"" (p=0.100)', 'Output "one - other" (p=)']
    assert [node["token_prob"] for node in nodes] == [0.1, 0]
    assert [node["is_target_logit"] for node in nodes] == [True, False]
    assert summarize_graph(graph, graph.prune()).splitlines()[0] == "explains ' \"mat\"' 0.100, 'one - other'"
    axes = Figure().add_axes((0, 0, 1, 1))
    _draw_outputs(axes, graph, lay_out(graph, np.ones(11)))
    assert [text.get_text() for text in axes.texts] == ['“ "mat"”\n10.0%', "one - other"]
    export_json(graph, tmp_path / "one.json")
    back = import_json(tmp_path / "one.json")  # by weights, what counts stays the same
    assert back.logit_weights.tolist() == [0.25, 0.75] and back.logit_names == graph.logit_names
    np.testing.assert_array_equal(back.influence, graph.influence)
    assert export_json(back) == content


def test_a_models_path_is_no_part_of_a_graph():
    for name in ("/home/someone/models/tiny", "/home/someone/models/tiny/", "someone/tiny", "models/tiny/."):
        assert export_json(small_graph(provenance={"model": name}))["metadata"]["scan"] == "tiny"


def test_numpys_numbers_are_written_as_plain_ones(tmp_path):
    provenance = {"model": "m", "settings": {"targets": [np.int64(5)], "tolerance": np.float32(0.5)}}
    content = export_json(small_graph(provenance=provenance))
    assert content["metadata"]["generation_settings"] == {"targets": [5], "tolerance": 0.5}
    export_json(small_graph(provenance=provenance), tmp_path / "one.json")


@pytest.mark.parametrize("value", [5, [], "text", None])
def test_provenance_of_any_kind_is_written(value):
    names = ("settings", "pruning_settings", "whole_graph_scores", "model", "coder", "prompt")
    graph = small_graph(
        provenance=dict.fromkeys(names, value), annotations={"qParams": {"pinnedIds": [[], "x"], "supernodes": [5]}}
    )
    ids = ["0_1_2", "1_90000_2", "err_1_2"]
    assert json.loads(json.dumps(export_json(graph)))["qParams"]["pinnedIds"] == ids
    graph = replace(graph, annotations={"qParams": {"pinnedIds": value, "supernodes": value}})
    assert export_json(graph)["qParams"]["pinnedIds"] == ids


HOSTILE = ("\x00\x1b[31m\x9b", "\u202e\u2066abc\n\r\t\u2028", "\ud800$x_{\\", "\U0001f600\u0644\u0627" * 400)


def test_texts_of_any_kind_are_written_and_drawn(tmp_path):
    for text in HOSTILE:
        graph = small_graph(token_texts=(text,) * 3, logit_names=(text,) * 2, supernodes={text: (0,)})
        graph = label_nodes(graph, {(0, 1): text, (1, 7): text})
        name = write_graph(graph, graph.prune(), tmp_path)
        assert import_json(tmp_path / f"{name}.json").token_texts == (text,) * 3
        assert load_graph(tmp_path / f"{name}.npz").logit_names == (text,) * 2
        assert summarize_graph(graph, graph.prune()).isprintable() is False  # its lines
        assert all(line.isprintable() for line in summarize_graph(graph, graph.prune()).split("\n"))
        draw_graph(graph, tmp_path / "one.svg", title=text)


def test_a_picture_of_very_many_rows_is_drawn_small(tmp_path, monkeypatch):
    """Up to a number of dots that matplotlib can draw, here for speed a smaller one."""
    assert picture_files.MAX_DOTS < 1 << 16
    graph, heights = small_graph(layers=100), []
    for most in (picture_files.MAX_DOTS, 1500):
        monkeypatch.setattr(picture_files, "MAX_DOTS", most)
        draw_graph(graph, tmp_path / "one.png")
        _, height = struct.unpack(">II", (tmp_path / "one.png").read_bytes()[16:24])
        heights.append(height)
    assert heights[0] > 2500 and heights[1] == 1500


# The files of one graph.


def test_graphs_are_named_by_their_prompts(tmp_path):
    graph, other = small_graph(), small_graph(token_texts=("<bos>", "A", " dog"))
    small = graph.prune()
    assert [write_graph(g, small, tmp_path) for g in (graph, other, graph)] == ["the-cat", "a-dog", "the-cat"]
    assert write_graph(graph, small, tmp_path, "graph") == "graph"
    slugs = ["a-dog", "graph", "the-cat"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "graph-metadata.json",
        *(f"{slug}{suffix}" for slug in slugs for suffix in (".npz", ".json", ".png")),
    }
    index = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert sorted(entry["slug"] for entry in index) == sorted(slugs)
    long = small_graph(token_texts=("<|endoftext|>", "word " * 50, "\u4e2d"))
    assert slug_of(long).endswith("word") and 35 < len(slug_of(long)) <= 45
    assert slug_of(small_graph(token_texts=("<s>", "\u4e2d", "!"))) == "graph"
    for name in ("", "a/b", "..", "/tmp/x"):
        with pytest.raises(UserError, match="expected the name of a file"):
            write_graph(graph, small, tmp_path, name)


def test_a_graph_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    twice = small_graph(logit_tokens=np.array([77, 77]))
    with pytest.raises(UserError, match="two nodes have the id '3_77_2'"):
        write_graph(twice, twice, tmp_path / "new", "one")
    assert not (tmp_path / "new").exists()
    write_graph(small_graph(), small_graph(), tmp_path, "one")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(UserError, match="cannot be written .No space left"):
        write_graph(small_graph(layers=5), small_graph(layers=5), tmp_path, "one")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_of_saved_graphs_becomes_a_viewers(tmp_path):
    for number in range(2):
        distinct_graph(number).save(tmp_path / f"00000{number}.npz")
    for path in sorted(tmp_path.glob("*.npz")):
        write_viewer_json(load_graph(path), tmp_path, path.stem)
    write_index(tmp_path)
    index = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert [entry["slug"] for entry in index] == ["000000", "000001"] and index[0]["node_threshold"] == 0.8
    content = json.loads((tmp_path / "000000.json").read_text())
    assert len(shown_ids(content)) == len(content["nodes"]) == len(distinct_graph(0).prune())


def test_cantor_numbers_tell_layers_and_features_apart():
    numbers = [cantor(layer, feature) for layer in range(30) for feature in range(40)]
    assert len(set(numbers)) == len(numbers) and cantor(0, 2334) == 2727279


def test_our_own_file_is_read_back(tmp_path):
    graph = small_graph()
    content = export_json(graph, slug="one")
    assert export_json(graph, tmp_path / "new" / "one.json") is None and not list(tmp_path.rglob("*.partial"))
    text = (tmp_path / "new" / "one.json").read_text()
    assert json.loads(text) == content and text.startswith('{"metadata":{"slug":"one",') and "\n" not in text
    back = import_json(tmp_path / "new" / "one.json")
    for name in ("adjacency", "features", "activations", "errors", "tokens", "positions", "logit_tokens"):
        np.testing.assert_array_equal(getattr(back, name), getattr(graph, name), strict=True)
    np.testing.assert_array_equal(back.logit_probabilities, graph.logit_probabilities)
    assert (back.token_texts, back.logit_names, back.layers) == (graph.token_texts, graph.logit_names, 2)
    assert back.supernodes == graph.supernodes
    np.testing.assert_allclose(back.residual, 0, atol=1e-6)
    assert export_json(back) == content


def test_gzip_where_the_name_asks_for_it(tmp_path):
    export_json(small_graph(), tmp_path / "one.json.gz")
    content = json.loads(gzip.decompress((tmp_path / "one.json.gz").read_bytes()))
    assert content == export_json(small_graph(), slug="one")
    assert len(import_json(tmp_path / "one.json.gz")) == 11


def test_double_precision_stays(tmp_path):
    adjacency = small_graph().adjacency.astype(np.float64)
    adjacency[0, 5] = 0.1 + 1e-12
    export_json(small_graph(adjacency=adjacency), tmp_path / "one.json")
    back = import_json(tmp_path / "one.json")
    np.testing.assert_array_equal(back.adjacency, adjacency, strict=True)


def test_annotations_and_labels_take_the_place_of_what_is_made():
    notes = [{"clerp": "from the file", "top_logit_effects": {"a": 1}}] + [{} for _ in range(10)]
    graph = small_graph(annotations={"nodes": notes, "qParams": {"linkType": "input", "sg_pos": "1 2"}, "more": [1]})
    content = export_json(graph)
    assert content["nodes"][0]["clerp"] == "from the file" and content["nodes"][0]["top_logit_effects"] == {"a": 1}
    assert content["nodes"][0]["activation"] == 0.3
    assert content["qParams"]["linkType"] == "input" and content["qParams"]["sg_pos"] == "1 2"
    assert content["more"] == [1]
    labelled = export_json(label_nodes(graph, {(0, 1): "mine"}), scan="./data/features")
    assert labelled["nodes"][0]["clerp"] == "mine"
    assert labelled["metadata"]["scan"] == "./data/features" and labelled["metadata"]["model"] == "tiny"


def test_labels_go_to_a_viewers_file_and_back(tmp_path):
    graph = label_nodes(small_graph(), {(1, 7): "a label", (1, 8): "of no node"})
    export_json(graph, tmp_path / "one.json", scan="./data/features")
    back = import_json(tmp_path / "one.json")
    assert back.labels == graph.labels == ("", "a label", *[""] * 9)
    assert back.provenance["model"] == "tiny" and list_labels(back) == {(1, 7): "a label"}
    export_json(small_graph(), tmp_path / "two.json")
    assert import_json(tmp_path / "two.json").labels == ()


def test_what_cannot_be_written_is_said():
    adjacency = small_graph().adjacency.copy()
    adjacency[0, 5] = np.nan
    with pytest.raises(UserError, match="not finite"):
        export_json(small_graph(adjacency=adjacency))
    with pytest.raises(UserError, match="two nodes have the id '1_7_2'"):
        export_json(small_graph(features=np.array([[0, 2, 1], [1, 2, 7], [1, 2, 7]])))


def time_call(function):
    start = time.process_time()
    return function(), time.process_time() - start


def test_a_large_graph_is_written_small_and_fast(tmp_path):
    rng = np.random.default_rng(0)
    n, outputs, tokens, links = 1500, 10, 20, 125_000
    count = n - outputs - tokens
    features = np.stack(
        [np.arange(count) * 26 // count, rng.integers(0, tokens, count), rng.integers(100, 98_304, count)], axis=1
    )
    features = features[np.lexsort(features.T[[2, 1, 0]])]
    adjacency = np.zeros((n, n), np.float32)
    below = features[:, 0][:, None] > features[:, 0]
    rows, columns = np.nonzero(below)
    chosen = rng.choice(len(rows), links, replace=False)
    adjacency[rows[chosen], columns[chosen]] = rng.standard_normal(links)
    nothing = np.zeros(n, np.float32)
    graph = build_graph(
        adjacency=adjacency,
        bias=nothing,
        rest=nothing,
        rest_mass=nothing,
        values=nothing,
        features=features,
        activations=np.ones(count, np.float32),
        errors=np.zeros((0, 2), np.int64),
        tokens=np.arange(tokens),
        token_texts=("a",) * tokens,
        positions=np.zeros(0, np.int64),
        logit_tokens=np.arange(outputs),
        logit_names=("b",) * outputs,
        logit_positions=np.full(outputs, tokens - 1),
        logit_probabilities=np.full(outputs, 0.1, np.float32),
        layers=26,
    )
    path = tmp_path / "large.json"
    _, writing = time_call(lambda: export_json(graph, path))
    content, parsing = time_call(lambda: json.loads(path.read_bytes()))
    _, dumping = time_call(lambda: json.dumps(content))
    assert writing < 10 * dumping  # twice, as measured
    assert path.stat().st_size - len(json.dumps(content["nodes"])) < 75 * links  # 117 B a link as published
    del content
    back, reading = time_call(lambda: import_json(path))
    assert reading < 30 * parsing  # 4 to 7 times, as measured
    assert np.array_equal(back.adjacency, adjacency) and back.adjacency.dtype == np.float32


# Published files.


@pytest.mark.parametrize("name", NAMES)
def test_published_files_survive_a_round_trip(name, tmp_path):
    before = read_published(name)
    graph = import_json(PUBLISHED / f"{name}.json.gz")
    export_json(graph, tmp_path / "one.json")
    after = json.loads((tmp_path / "one.json").read_text())
    assert graph.layers == 26 and graph.adjacency.dtype == np.float32
    assert set(after) == set(before)
    assert after["metadata"] == before["metadata"] and after["qParams"] == before["qParams"]
    ids = [node["node_id"] for node in after["nodes"]]
    assert len(set(ids)) == len(ids) == len(before["nodes"])
    changed = [(a, b) for a, b in zip(before["nodes"], after["nodes"], strict=True) if a != b]
    shared = [node_id for node_id, n in Counter(node["node_id"] for node in before["nodes"]).items() if n > 1]
    assert len(changed) == len(shared)
    for a, b in changed:
        assert a["node_id"] in shared and a["feature"] == -1 and b == a | {"node_id": "err_2_1"}
    for a, b in zip(before["links"], after["links"], strict=True):
        source = a["source"] if b["source"] != "err_2_1" else "0_2_1"
        assert (source, a["target"]) == (a["source"], b["target"])
        assert b["source"] == a["source"] or a["source"] in shared
        assert np.float32(a["weight"]) == np.float32(b["weight"])
    assert export_json(import_json(tmp_path / "one.json")) == after


def test_a_shared_id_is_told_apart():
    graph = import_json(PUBLISHED / "dollar-gemma-2-2b-part.json.gz")
    nodes = graph.annotations["nodes"]
    feature = next(i for i, node in enumerate(nodes) if node["node_id"] == "0_2_1")
    error = next(i for i, node in enumerate(nodes) if node["node_id"] == "err_2_1")
    assert graph.features[feature].tolist() == [0, 1, 2]
    assert graph.errors[error - len(graph.features)].tolist() == [2, 1]
    assert np.count_nonzero(graph.adjacency[error]) == 0 and np.count_nonzero(graph.adjacency[feature]) == 2
    assert np.count_nonzero(graph.adjacency[:, [feature, error]], axis=0).tolist() == [18, 61]
    # An error only reaches what reads the stream above its layer.
    assert graph.nodes.layer[np.flatnonzero(graph.adjacency[:, error])].min() > 2


def test_a_pruned_file_keeps_its_nodes_fields():
    graph = import_json(PUBLISHED / "meow-gemma-2-2b-clt.json.gz")
    is_kept = np.ones(len(graph), bool)
    is_kept[:10] = False
    before = export_json(graph)
    after = export_json(graph.keep(is_kept))
    assert after["nodes"] == before["nodes"][10:]
    remaining = {node["node_id"] for node in after["nodes"]}
    assert after["links"] == [link for link in before["links"] if {link["source"], link["target"]} <= remaining]


# Read.


def test_an_older_file_tells_features_by_their_ids(tmp_path):
    path = write(tmp_path / "old.json", metadata={"slug": "a", "prompt_tokens": ["a", "b"]}, extra={"x": 1})
    graph = import_json(path)
    assert graph.features.tolist() == [[0, 1, 5]] and graph.layers == 1
    assert graph.tokens.tolist() == [9, -1] and graph.adjacency[0, 1] == 0.5 and graph.values.tolist() == [0.5, 0, 0, 0]
    content = export_json(graph)
    assert "schema_version" not in content["metadata"]  # its features are not Cantor numbers
    assert [node["node_id"] for node in content["nodes"]] == ["0_5_1", "E_9_0", "2_4_1"]
    assert content["nodes"][0]["feature"] == 20 and content["extra"] == {"x": 1}


def test_groups_of_nodes_survive(tmp_path):
    groups = [["same", "0_5_1", "E_9_0"], ["same", "E_9_0"], ["alone"]]
    view = {"supernodes": groups, "pinnedIds": ["0_5_1", "E_9_0"], "linkType": "either", "clickedId": "0_5_1"}
    graph = import_json(write(tmp_path / "one.json", qParams=view))
    assert graph.supernodes == {"same": (0, 1), "same (2)": (1,), "alone": ()}
    assert view.items() <= export_json(graph)["qParams"].items()
    renamed = export_json(replace(graph, supernodes={"other": (3,)}))["qParams"]
    assert renamed["supernodes"] == [["other", "2_4_1"]] and renamed["pinnedIds"] == ["0_5_1", "E_9_0", "2_4_1"]
    without = export_json(graph.keep(np.zeros(4, bool)))["qParams"]
    assert without["supernodes"] == [["same", "E_9_0"], ["same", "E_9_0"], ["alone"]]
    assert without["pinnedIds"] == ["E_9_0"]


def test_nodes_of_a_file_in_any_order(tmp_path):
    path = write(tmp_path / "one.json")
    content = json.loads(path.read_text())
    first, *others = content["nodes"]
    content["nodes"] = [*others, first | {"node_id": "1_0_0", "ctx_idx": 0}, first]
    graph = import_json(write(tmp_path / "one.json", **content))
    assert graph.features.tolist() == [[0, 1, 5], [1, 0, 0]] and graph.adjacency[0, 2] == 0.5
    assert [node.get("node_id") for node in graph.annotations["nodes"]] == ["0_5_1", "1_0_0", "E_9_0", None, "2_4_1"]


LINK = {"source": "E_9_0", "target": "0_5_1", "weight": 0.5}
METADATA = {"slug": "a", "scan": "m", "prompt_tokens": ["a", "b"], "prompt": "ab", "schema_version": 1}
NODE = {"node_id": "0_5_1", "feature": 20, "layer": "0", "ctx_idx": 1, "feature_type": "cross layer transcoder"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": None}, "no list of nodes"),
        ({"links": {}}, "no list of links"),
        ({"metadata": {"slug": "a"}}, "metadata has no prompt_tokens"),
        ({"qParams": []}, "qParams is no object"),
        ({"qParams": {"supernodes": [[1]]}}, r"supernodes is \[\[1\]\]"),
        ({"links": [LINK | {"source": "7_7_7"}]}, "names the node '7_7_7'"),
        ({"links": [LINK | {"target": "7_7_7"}]}, "names the node '7_7_7'"),
        ({"links": [LINK | {"weight": float("nan")}]}, "E_9_0 -> 0_5_1 has weight nan"),
        ({"links": [LINK | {"weight": None}]}, "has weight None"),
        ({"links": [LINK, LINK]}, "is there twice"),
        ({"links": ["x"]}, "a link is x"),
        ({"links": [LINK | {"source": ["E_9_0"]}]}, "expected ids of nodes as source and target"),
        ({"links": [LINK | {"weight": 10**400}]}, "E_9_0 -> 0_5_1 has weight inf"),
        (
            {"links": [LINK | {"source": "0_5_1", "target": "E_9_0"}]},
            "0_5_1 -> E_9_0 leads from layer 0 to -1, expected",
        ),
        (
            {"links": [LINK | {"source": "0_5_1", "target": "0_5_1"}]},
            "0_5_1 -> 0_5_1 leads from layer 0 to 0, expected",
        ),
        ({"nodes": [NODE | {"feature_type": []}]}, r"is of feature_type \[\], expected one of"),
        ({"nodes": [NODE | {"node_id": f"0_{10**30}_1"}]}, "is a feature, expected an id like"),
        ({"nodes": [NODE | {"node_id": "123456_5_1"}], "links": []}, "123457 layers, expected 0 to 10000"),
        ({"nodes": [NODE | {"activation": 10**400}], "links": []}, "array 'activations' holds inf"),
        (
            {"nodes": [NODE | {"feature_type": "logit", "layer": "1", "token_prob": 7}], "links": []},
            "holds 7.0, expected 0",
        ),
        ({"nodes": [NODE | {"feature_type": "logit", "layer": "9" * 99}], "links": []}, "has layer '999"),
        (
            {"metadata": METADATA | {"output_weights": [1, 2]}},
            r"metadata.output_weights is \[1, 2\], expected 1 numbers",
        ),
        ({"metadata": METADATA | {"output_weights": [-1]}}, "array 'logit_weights' holds -1.0"),
        ({"nodes": [NODE | {"feature_type": "lorsa"}]}, "is of feature_type 'lorsa', expected one of 'cross layer"),
        ({"nodes": [NODE | {"node_id": "abc"}]}, "'abc' is a feature, expected an id like"),
        ({"nodes": [NODE | {"ctx_idx": 2}]}, "has ctx_idx 2, expected one of 2 positions"),
        ({"nodes": [NODE | {"activation": "x"}], "links": []}, "has activation 'x'"),
        ({"nodes": [NODE, NODE]}, "2 nodes are '0_5_1'"),
        ({"nodes": [{}]}, "no node_id"),
        ({"nodes": [NODE | {"feature_type": "logit", "layer": "E"}]}, "has layer 'E'"),
    ],
)
def test_bad_files_are_refused_in_a_line(tmp_path, changes, message):
    path = write(tmp_path / "bad.json", **changes)
    with pytest.raises(UserError, match=message) as caught:
        import_json(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_what_is_no_graph_is_refused(tmp_path):
    (tmp_path / "text.json").write_text("{not JSON")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(b"{}" * 100)[:-12])
    for name, message in (("text.json", "not valid JSON"), ("list.json", "JSON object"), ("cut.json.gz", "not valid")):
        with pytest.raises(UserError, match=message):
            import_json(tmp_path / name)
    with pytest.raises(UserError, match="not found"):
        import_json(tmp_path / "none.json")


def test_a_small_file_takes_little_memory(tmp_path):
    path = write(tmp_path / "many.json", nodes=[], links=[], metadata=METADATA | {"prompt_tokens": ["a"] * 20_000})
    bomb = tmp_path / "bomb.json.gz"
    bomb.write_bytes(gzip.compress(bytes(200_000_000), 1))
    tracemalloc.start()
    with pytest.raises(UserError, match="20000 of 20000 prompt_tokens have no node, expected one for each"):
        import_json(path)
    assert tracemalloc.get_traced_memory()[1] < 30_000_000
    with pytest.raises(UserError, match="unpacks to more than .* bytes, expected at most 100 times its size"):
        import_json(bomb)
    assert tracemalloc.get_traced_memory()[1] < 400 * bomb.stat().st_size < 1_000_000_000
    tracemalloc.stop()
    few = write(tmp_path / "few.json", metadata=METADATA | {"prompt_tokens": ["a"] * 3000})
    assert len(import_json(few)) == 3002


def test_files_nested_deeply_are_refused(tmp_path):
    (tmp_path / "deep.json").write_text('{"a":' + "[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        import_json(tmp_path / "deep.json")
    within: list = []
    for _ in range(600):
        within = [within]
    try:
        graph = import_json(write(tmp_path / "less.json", more=within))
        export_json(graph, tmp_path / "again.json")
    except UserError as error:
        assert "nested too deeply" in str(error)


def test_the_index_passes_over_what_is_no_graph(tmp_path, caplog):
    write(tmp_path / "a.json")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "cut.json").write_text('{"metadata": ')
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "other.json").write_text('{"metadata": 5, "nodes": [], "links": []}')
    write_index(tmp_path)
    graphs = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert [graph["slug"] for graph in graphs] == ["a"]
    for name in ("list", "cut", "latin", "folder"):
        assert sum(f"{name}.json" in message for message in caplog.messages) == 1
    assert len(caplog.messages) == 4


def test_the_index_lists_the_graphs_of_a_folder(tmp_path):
    write(tmp_path / "b.json")
    export_json(small_graph(), tmp_path / "a.json")
    (tmp_path / "other.json").write_text('{"index": 1}')
    for _ in range(2):  # the index itself is none of them
        write_index(tmp_path)
    graphs = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert [graph["slug"] for graph in graphs] == ["a", "b"]
    assert graphs[0] == import_json(tmp_path / "a.json").annotations["metadata"]


# Drawn.


def test_a_graph_is_drawn(tmp_path):
    texts = ("<bos>", "$x_1$", "\n\u4e2d")
    graph = label_nodes(small_graph(token_texts=texts), {(1, 7): "l$abel"})
    draw_graph(graph, tmp_path / "one.png", title="a $ title")
    data = (tmp_path / "one.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 20_000
    width, height = struct.unpack(">II", data[16:24])
    assert 1600 <= width <= 2000 and 500 <= height <= 900
    draw_graph(small_graph(token_texts=texts), tmp_path / "other.png")
    assert (tmp_path / "other.png").read_bytes() != data
    with pytest.raises(UserError, match="cannot draw 'doc'"):
        draw_graph(small_graph(), tmp_path / "one.doc")


def test_neither_features_nor_labels_cover_features():
    crowd = np.array([[layer, 1, feature] for layer in (0, 1) for feature in range(30)])
    n = len(crowd) + 4
    adjacency = np.zeros((n, n), np.float32)
    adjacency[-1, 0] = 1
    graph = small_graph(
        adjacency=adjacency,
        **{name: np.zeros(n, np.float32) for name in ("bias", "rest", "rest_mass", "values")},
        features=crowd,
        activations=np.ones(len(crowd), np.float32),
        errors=np.zeros((0, 2), np.int64),
        positions=np.zeros(0, np.int64),
        logit_tokens=np.array([1]),
        logit_names=("end",),
        logit_positions=np.array([2]),
        logit_probabilities=np.ones(1, np.float32),
        supernodes={},
    )
    plan = lay_out(graph, np.ones(n))
    half = min(plan.slot * 0.95, 0.17 * 0.85) / 2
    places = zip(plan.x.tolist(), plan.y.tolist(), strict=True)
    boxes = [(x - half, y - half, x + half, y + half) for x, y in places]
    assert not any(do_overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    for node, (layer, position, _) in enumerate(graph.features.tolist()):
        assert plan.layers[layer] < plan.y[node] < plan.layers[layer + 1]
        assert plan.columns[position] < plan.x[node] < plan.columns[position + 1]

    axes = Figure().add_axes((0, 0, 1, 1))
    names = ["the first", *(f"feature {i}" for i in range(1, len(crowd)))]
    _draw_labels(axes, names, np.arange(n, 0, -1.0), plan, boxes[: len(crowd)])
    labels = [text.get_text() for text in axes.texts]
    assert labels[0] == "the first" and 4 <= len(set(labels)) == len(labels) < len(crowd)  # others find no room
    for text in axes.texts:
        assert not any(
            left < text.get_position()[0] < right and low < text.get_position()[1] < high
            for left, low, right, high in boxes
        )


def test_a_label_that_is_removed_stays_away(tmp_path):
    graph = small_graph()
    layer, _, feature = graph.features[0].tolist()
    export_json(label_nodes(graph, {(layer, feature): "a label"}), tmp_path / "a.json")
    again = import_json(tmp_path / "a.json")
    assert again.labels[0] == "a label"
    assert export_json(again)["nodes"][0]["clerp"] == "a label"
    assert export_json(label_nodes(again, {}))["nodes"][0]["clerp"] == ""
