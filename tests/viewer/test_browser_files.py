"""Files in a real browser: published graphs dropped on the page, pictures and pages saved, two graphs compared."""

import base64
import gzip
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from graph_lists import hand_graph, random_graph, replace_lists
from page_browser import NAME, PUBLISHED, open_graph, read, wait_for
from page_server import running

from jclt.graphs import Graph, import_json
from jclt.viewer.library import Library
from jclt.viewer.page_service import Page

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::ResourceWarning")]

DROP = """([name, content]) => {
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0)), data = new DataTransfer();
  data.items.add(new File([bytes], name));
  const drop = new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true });
  document.querySelector('.graph').dispatchEvent(drop);
}"""


@pytest.mark.parametrize("path", sorted(PUBLISHED.glob("*.json.gz")), ids=lambda path: path.name[:6])
def test_a_published_graph_is_dropped_and_opens(tab, tmp_path, path):
    hand_graph().save(tmp_path / "hand.npz")
    with running(Page(Library([tmp_path]))) as port:
        open_graph(tab, port, "hand")
        content, name = gzip.decompress(path.read_bytes()), path.name.removesuffix(".gz")
        tab.evaluate(DROP, [name, base64.b64encode(content).decode()])
        wait_for(tab, "jcltPage.graph.name !== 'hand' && jcltPage.view.places")
        graph = import_json(path)
        assert read(tab, "[app.graph.size, app.graph.edges]") == [len(graph), np.count_nonzero(graph.adjacency)]
        assert tab.locator(".notice").is_hidden()


def test_a_dropped_file_that_is_no_graph_is_refused_in_one_line(tab, port):
    open_graph(tab, port)
    tab.evaluate(DROP, ["cat.json", base64.b64encode(b"{}").decode()])
    tab.get_by_text("file 'cat.json'").wait_for()
    assert read(tab, "app.graph.name") == NAME
    tab.wrong.clear()  # the browser's own note of the answer 400


def save(tab: Any, button: str) -> bytes:
    with tab.expect_download() as got:
        tab.get_by_text("Files", exact=True).click()
        tab.get_by_role("button", name=button).click()
    return Path(got.value.path()).read_bytes()


def list_marks(svg: ElementTree.Element) -> list[str]:
    """The outlines that are filled."""
    paths = svg.iter("{http://www.w3.org/2000/svg}path")
    return [path.get("d", "") for path in paths if path.get("fill") != "none"]


def test_pictures_and_pages_are_saved(tab, port, tmp_path):
    open_graph(tab, port)
    png = save(tab, "Picture as PNG")
    size = [int.from_bytes(png[16:20]), int.from_bytes(png[20:24])]
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and size == read(tab, "[app.view.base.width, app.view.base.height]")
    svg = ElementTree.fromstring(save(tab, "Picture as SVG"))
    texts = {text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")}
    arcs = [d for d in list_marks(svg) if "a" in d]
    features = "[...app.graph.kind.keys()].filter((n) => app.shown.nodes[n] && app.graph.kind[n] === 'feature').length"
    assert len(arcs) == read(tab, features) and "output" in texts
    shown = read(tab, "[app.graph.size, app.graph.edges, app.kept.nodes.reduce((a, b) => a + b, 0)]")
    (tmp_path / "saved.html").write_bytes(save(tab, "This page as one file"))
    tab.goto(f"file://{tmp_path}/saved.html")
    wait_for(tab, "globalThis.jcltPage?.graph && jcltPage.view.places")
    assert read(tab, "[app.graph.size, app.graph.edges, app.kept.nodes.reduce((a, b) => a + b, 0)]") == shown
    tab.get_by_role("button", name="Suggest supernodes").click()
    tab.get_by_text("supernodes suggested, with").wait_for()


def list_keys(graph: Graph) -> set[tuple]:
    """Nodes that are no errors, as two graphs have them in common, after the usual pruning."""
    kept, nodes = graph.masks(0.8, 0.98).nodes, graph.nodes
    rows = zip(*(column.tolist() for column in (nodes.kind, nodes.layer, nodes.position, nodes.index)), strict=True)
    return {row for row, on in zip(rows, kept.tolist(), strict=True) if on and row[0] != "error"}


def test_two_graphs_are_compared_and_their_difference_is_drawn(tab, tmp_path):
    one = random_graph(4, features=60, layers=6, tokens=9, outputs=3)
    places = one.features.copy()
    places[::3, 2] += 1000  # other features
    other = replace_lists(one, features=places)
    one.save(tmp_path / "one.npz")
    other.save(tmp_path / "other.npz")
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url) if request.url.endswith("/api/graphs/other") else None)
    with running(Page(Library([tmp_path]))) as port:
        open_graph(tab, port, "one")
        tab.get_by_role("tab", name="Compare").click()
        tab.get_by_label("The other graph").select_option("other")
        tab.get_by_text("in both").wait_for()
        here, there = list_keys(one), list_keys(other)
        counts = [len(here & there), len(here - there), len(there - here)]
        both, only_here, only_there = counts
        assert min(counts) > 0
        said = f"{both} nodes in both, {only_here} only here, {only_there} only there"
        assert said in tab.locator("#part-2 .facts").inner_text() and len(asked) == 1
        tab.get_by_role("button", name="Picture", exact=True).click()
        canvas = tab.get_by_role("dialog").get_by_role("img")
        assert canvas.get_attribute("aria-label") == (
            f"{both} nodes in both graphs, {only_here} only in one, {only_there} only in other"
        )
        with tab.expect_download() as got:
            tab.get_by_role("button", name="SVG").click()
        svg = ElementTree.fromstring(Path(got.value.path()).read_bytes())
        marks = list_marks(svg)
        assert sum("a" in mark for mark in marks) == both + 1  # and one in the legend
        assert sum(mark.endswith("Z") and "a" not in mark for mark in marks) == only_here + only_there + 2
        tab.keyboard.press("Escape")
        assert tab.get_by_role("dialog").count() == 0
        tab.reload()  # the address has the open tab
        tab.get_by_text(said).wait_for()
