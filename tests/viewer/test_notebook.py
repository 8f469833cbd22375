"""What notebooks show of a graph, and the notebook that comes with jclt."""

import struct
from dataclasses import replace

import numpy as np
from graph_lists import hand_graph, random_graph

from jclt.graphs import label_nodes
from jclt.viewer import picture
from jclt.viewer.picture import _find_strongest_edges


def test_a_graph_by_itself_is_a_few_lines_of_text():
    text = replace(hand_graph(), token_texts=("<b>", "&"))._repr_html_()
    assert text.startswith("<pre>&lt;Graph of &#x27;&lt;b&gt;&amp;") and "<b>" not in text
    assert "Denver" in text and "completeness" in text and text.count("\n") < 8


def test_a_picture_is_shown_and_saved_without_a_browser(tmp_path):
    graph = label_nodes(hand_graph(), {(0, 17): "a label"})
    shown = graph.plot()
    assert {"a label", "2/40", "South Creek"} <= {text.get_text().strip() for text in shown.figure.axes[0].texts}
    data = shown._repr_png_()
    inches = shown.figure.get_size_inches()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", data[16:24]) == tuple((inches * 100).astype(int))
    shown.save(tmp_path / "graph.svg")
    assert "a title" not in (tmp_path / "graph.svg").read_text()
    assert "a title" in {text.get_text() for text in graph.plot(title="a title").figure.axes[0].texts}


def test_a_picture_has_the_edges_that_pruning_would_keep_longest(monkeypatch):
    """Those with most influence in the formula at the head of `influence.py`, here as dense float64 matrices."""
    graph = random_graph(3, rest=3.0)
    sizes, weights = np.abs(graph.adjacency), graph.output_weights

    def rank(rest_mass):
        shares = sizes / np.maximum(sizes.sum(axis=1) + rest_mass, 1e-10)[:, None]
        visits = np.linalg.solve(np.eye(len(graph)) - shares.T, weights)
        return np.argsort((visits[:, None] * shares).ravel(), kind="stable")[-30:]

    monkeypatch.setattr(picture, "MAX_EDGES", 30)
    targets, sources, _ = _find_strongest_edges(graph)
    np.testing.assert_array_equal(targets * len(graph) + sources, rank(graph.rest_mass))
    assert set(rank(graph.rest_mass)) != set(rank(0.0))
