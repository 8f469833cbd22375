"""What tests in a real browser share."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graph_lists import hand_graph, replace_lists
from page_server import TOKEN

from jclt.graphs import Graph

PUBLISHED = Path(__file__).parent / "golden" / "published_graphs"
NAME = "dallas-austin-gemma-2-2b-clt"


def open_graph(tab: Any, port: int, name: str = NAME, fields: str = "") -> None:
    tab.goto(f"http://127.0.0.1:{port}/{TOKEN}/#graph={name}{fields}")
    wait_for(tab, "globalThis.jcltPage?.graph && jcltPage.view.places")


def wait_for(tab: Any, expression: str) -> None:
    """Waits until this is true in the page. Playwright's own function needs eval, which the page's policy forbids."""
    end = time.monotonic() + 60
    while not tab.evaluate(f"Boolean({expression})"):
        assert time.monotonic() < end, expression
        time.sleep(0.02)


def find_node(tab: Any, node_id: str) -> tuple[float, float]:
    """Where a node is drawn in the window."""
    x, y = tab.evaluate(
        """id => { const { view, graph } = jcltPage, node = graph.numbers.get(id);
        const box = view.top.getBoundingClientRect();
        return [view.places.x[node] + box.x, view.places.y[node] + box.y]; }""",
        node_id,
    )
    return x, y


def list_nodes(tab: Any, count: int) -> list[str]:
    """Ids of shown features that lie far from all others."""
    return tab.evaluate(
        """count => { const { view, graph, shown } = jcltPage, { x, y } = view.places;
        const all = [...graph.kind.keys()].filter((n) => shown.nodes[n]);
        const gap = (n) => Math.min(...all.filter((m) => m !== n).map((m) => Math.hypot(x[n] - x[m], y[n] - y[m])));
        const features = all.filter((n) => graph.kind[n] === 'feature').sort((a, b) => gap(b) - gap(a));
        return features.slice(0, count).map((n) => graph.ids[n]); }""",
        count,
    )


def list_serious_faults(tab: Any) -> list[tuple[str, list[str]]]:
    """What axe finds; the tab's context must bypass the page's policy."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    return [
        (fault["id"], [node["html"][:120] for node in fault["nodes"]])
        for fault in axe.run(tab).response["violations"]
        if fault["impact"] in ("serious", "critical")
    ]


def read(tab: Any, expression: str) -> Any:
    return tab.evaluate(f"(() => {{ const app = jcltPage; return {expression}; }})()")


HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "\"'><script>document.title='got'</script>",
    "\u202etxet\u202c\u2066",
    "a" * 10_000,
    "${alert(1)}\n\r\t\0",
    "&lt;b&gt;",
)


def make_hostile_graph() -> Graph:
    length = len(HOSTILE)
    size = 2 + length + 1
    adjacency, zeros = np.zeros((size, size), np.float32), np.zeros(size, np.float32)
    adjacency[0, 2:-1], adjacency[1, 0], adjacency[-1, :2] = 1, 2, 3
    return replace_lists(
        hand_graph(),
        adjacency=adjacency,
        bias=zeros,
        rest=zeros,
        rest_mass=zeros,
        values=adjacency.sum(axis=1),
        features=np.array([[0, 0, 17], [1, 1, 40]]),
        errors=np.zeros((0, 2), int),
        tokens=np.arange(length),
        token_texts=HOSTILE,
        logit_names=(HOSTILE[1],),
        supernodes={HOSTILE[0]: (0, 1)},
        provenance={"model": HOSTILE[0], "settings": {HOSTILE[1]: HOSTILE[2]}},
    )


def check_harmless(tab: Any) -> None:
    assert tab.locator("img, i, script:not([src]):not([type='application/json']):not([type='module'])").count() == 0
    assert tab.title() != "got" and "\u202e" not in tab.locator("body").inner_text()
    assert tab.evaluate("document.documentElement.scrollWidth") <= 1280
