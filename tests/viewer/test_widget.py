"""The page in a notebook's cell, from Python's side: values set on the page and here, questions and answers."""

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from graph_lists import hand_graph
from notebook_cells import Cell, recording

import jclt
from jclt.errors import UserError
from jclt.graphs import export_json, label_nodes
from jclt.viewer import notebook
from jclt.viewer.notebook import NotebookPage
from jclt.viewer.page_data import build_page_data

GROUPED = replace(label_nodes(hand_graph(), {(0, 17): "old", (2, 40): "kept"}), supernodes={"both": (0, 1)})


@pytest.fixture
def cell() -> Iterator[Cell]:
    with recording() as sent:
        yield Cell(GROUPED.show(), sent)


def test_what_is_done_on_the_page_is_in_python_and_in_the_graph(cell, tmp_path):
    first = cell.first
    assert first["supernodes"] == {"both": [0, 1]} and first["pinned"] == [0, 1] and first["thresholds"] == [0.8, 0.98]
    assert "data-kernel" in first["_page"] and "default-src &#x27;none&#x27;" in first["_page"]
    cell.change(pinned=[4, 0, 1, 2], supernodes={"<b>": [1], "two": [0, 2]}, labels={"0/17": "new"}, selected=[0, 2])
    cell.change(thresholds=[0.5, 1], places={"group two": [0.25, 1]})
    view = cell.widget
    assert (view.pinned, view.selected, view.thresholds) == ([4, 0, 1, 2], [0, 2], [0.5, 1])
    view.graph.save(tmp_path / "graph.npz")
    graph = jclt.load_graph(tmp_path / "graph.npz")
    assert graph.supernodes == {"<b>": (1,), "two": (0, 2)} and graph.labels[:2] == ("new", "kept")
    np.testing.assert_array_equal(graph.adjacency, GROUPED.adjacency)
    first_view = build_page_data(graph, "again")["view"]
    assert set(first_view["pinnedIds"]) == {export_json(graph)["nodes"][node]["node_id"] for node in view.pinned}
    page = cell.ask("graph", view.graph_name)["answer"]
    assert page["view"]["places"] == {"group two": [0.25, 1]} and page["view"]["labels"] == {"0/17": "new"}
    assert GROUPED.supernodes == {"both": (0, 1)}  # the graph itself is as it was


def test_what_is_set_in_python_is_sent_to_the_page(cell):
    view = cell.widget
    view.supernodes = {"one": (np.int64(1), 2)}
    view.labels, view.selected, view.thresholds = {"2/40": "mine"}, [np.int64(1), 2], (1, 0.5)
    states = [message["state"] for message in cell.take()]
    sent = {name: value for state in states for name, value in state.items()}
    assert sent == {
        "supernodes": {"one": [1, 2]},
        "pinned": [0, 1, 2],  # members of supernodes are pinned, too
        "labels": {"2/40": "mine"},
        "selected": [1, 2],
        "thresholds": [1, 0.5],
    }
    assert view.graph.labels[:2] == ("old", "mine") and view.graph.supernodes == {"one": (1, 2)}
    view.labels = {}
    cell.take()
    assert view.graph.labels[:2] == ("old", "kept")
    assert cell.ask("graph", view.graph_name)["answer"]["view"]["labels"] == {}


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("pinned", [6], "pinned: node 6: expected a number from 0 to 5"),
        ("selected", [-1], "selected: node -1"),
        ("supernodes", {"a": [0], "b": [0]}, "supernode 'b': node 0 is in 'a' already"),
        ("supernodes", {"a": [9]}, "supernode 'a': node 9"),
        ("labels", {"0-17": "x"}, "0-17"),
        ("thresholds", [1], r"thresholds: \[1.0\], expected two numbers"),
        ("thresholds", [1, 2], "thresholds"),
    ],
)
def test_what_the_graph_does_not_have_is_refused_in_one_line(cell, name, value, error):
    before = getattr(cell.widget, name)
    with pytest.raises(UserError, match=error):
        setattr(cell.widget, name, value)
    assert getattr(cell.widget, name) == before


def test_questions_of_the_page_are_answered_as_the_server_answers_them(cell):
    view, service = cell.widget, cell.widget.service
    name = view.graph_name
    assert cell.ask("list")["answer"] == service.list_graphs() and not service.list_graphs()["model"]
    assert cell.ask("feature", name, 0, 17) == {"answer": service.describe(name, 0, 17)}
    assert "both" in cell.ask("json", name, 1, 1)["answer"] and cell.ask("page", name)["answer"].startswith("<!doctype")
    assert "there is no model here" in cell.ask("intervene", name, {"nodes": ["0_17_0"], "factor": 0})["error"]
    assert cell.ask("intervene", name, {"nodes": ["none"], "factor": 0})["error"].startswith("intervention: nodes")
    assert cell.ask("graph", "other")["error"] == "graph 'other': there is none of this name"
    assert cell.ask("erase")["error"].startswith("failed:")


def test_another_graph_keeps_what_was_done_on_the_first(cell):
    view = cell.widget
    first, second = view.graph_name, view.service.library.add("second", hand_graph())
    cell.change(_graph_name=second, pinned=[1], supernodes={}, labels={}, places={}, selected=[])
    assert view.graph.supernodes == {} and view.graph.labels == ()
    assert cell.ask("graph", first)["answer"]["view"]["supernodes"] == [["both", "0_17_0", "2_40_1"]]
    cell.change(_graph_name=first, pinned=[0, 1], supernodes={"both": [0, 1]})
    assert view.graph.supernodes == GROUPED.supernodes


def test_without_anywidget_the_page_is_a_frame_that_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(notebook, "find_spec", lambda name: None)
    shown = GROUPED.show(height=300)
    assert isinstance(shown, NotebookPage) and "pip install 'jclt[notebook]'" in shown._repr_html_()
    assert "data-kernel" not in re.sub(r"\s+", " ", shown.page).split("<script")[1]
    with pytest.raises(UserError, match="anywidget"):
        GROUPED.show(features="described")
    with pytest.raises(UserError, match="expected both or neither"):
        GROUPED.show(model=object())
