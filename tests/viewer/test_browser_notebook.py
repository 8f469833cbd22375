"""The page in a notebook's cell, in a real browser: a page stands in for the notebook, this process for its kernel."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from graph_lists import hand_graph
from notebook_cells import Cell, recording
from page_browser import HOSTILE, check_harmless, list_nodes, make_hostile_graph, wait_for

import jclt
from jclt.cli.demo import find_demo_labels, load_demo
from jclt.graphs import label_nodes

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::ResourceWarning")]
PROMPT = "Question: in the state of South Creek, what is the capital? Answer:"

NOTEBOOK = """async ([source, values, cells]) => {
  const listeners = new Map(), changed = {};
  const fire = (name, ...content) => (listeners.get(name) ?? []).forEach((listener) => listener(...content));
  const assign = (name, value) => {
    if (JSON.stringify(values[name]) === JSON.stringify(value)) return false;
    values[name] = value;
    return true;
  };
  globalThis.fromPython = (messages) => messages.forEach(({ method, state, content }) => {
    if (method === 'custom') fire('msg:custom', content, []);
    if (method !== 'update') return;
    const names = Object.keys(state).filter((name) => assign(name, state[name]));
    names.forEach((name) => fire(`change:${name}`));
  });
  const send = async (message) => fromPython(await toPython(message));
  globalThis.notebookModel = {
    get: (name) => values[name],
    set: (name, value) => { if (assign(name, value)) { changed[name] = value; fire(`change:${name}`); } },
    save_changes: () => {
      const state = { ...changed };
      Object.keys(changed).forEach((name) => delete changed[name]);
      if (Object.keys(state).length) send({ method: 'update', state });
    },
    send: (content) => send({ method: 'custom', content }),
    on: (name, listener) => listeners.set(name, [...(listeners.get(name) ?? []), listener]),
    off: (name, listener) => listeners.set(name, (listeners.get(name) ?? []).filter((other) => other !== listener)),
  };
  const { default: widget } = await import(URL.createObjectURL(new Blob([source], { type: 'text/javascript' })));
  globalThis.keys = [];
  addEventListener('keydown', (event) => keys.push(event.key));
  for (let cell = 0; cell < cells; cell++) {
    const el = document.createElement('div');
    document.body.append(el);
    globalThis.endCell = widget.render({ model: notebookModel, el });
  }
}"""

REFUSED = """async () => {
  const refused = new Promise((done) => {
    document.addEventListener('securitypolicyviolation', (event) => done(event.violatedDirective));
  });
  fetch('https://example.org').catch(() => {});
  try { return [await refused, parent.document.title]; } catch (error) { return [await refused, error.name]; }
}"""


@contextmanager
def show_in_notebook(tab: Any, tmp_path: Any, graph: Any, cells: int = 1, **options: Any) -> Iterator[tuple[Cell, Any]]:
    """The widget's cell, and the frame in which the page is."""
    with recording() as sent:
        cell = Cell(graph.show(**options), sent)
        (tmp_path / "notebook.html").write_text("<!doctype html><title>notebook</title><body></body>")
        tab.goto(f"file://{tmp_path}/notebook.html")
        tab.expose_function("toPython", cell.receive)
        tab.evaluate(NOTEBOOK, [cell.first["_esm"], cell.first, cells])
        for frame in tab.frames[1:]:
            wait_for(frame, "globalThis.jcltPage?.graph && jcltPage.view.places && jcltPage.server.app")
        yield cell, tab.frames[1]


def bring(tab: Any, cell: Cell) -> None:
    """Brings the page what Python has sent since."""
    tab.evaluate("messages => fromPython(messages)", cell.take())


def click_node(frame: Any, node_id: str, key: str | None = None) -> None:
    x, y = frame.evaluate(
        "id => [...'xy'].map((c) => jcltPage.view.places[c][jcltPage.graph.numbers.get(id)])", node_id
    )
    canvas = frame.locator(".graph canvas").last
    canvas.click(position={"x": x, "y": y}, modifiers=[key] if key else [])


def wait_until(check: Any, tab: Any) -> None:
    for _ in range(300):
        if check():
            return
        tab.wait_for_timeout(20)  # messages of the page are answered meanwhile
    assert check()


def test_what_is_pinned_grouped_named_labelled_and_intervened_on_is_in_python(tab, tmp_path):
    model, coder = load_demo()
    graph = label_nodes(jclt.attribute(model, coder, PROMPT), find_demo_labels(coder))
    with show_in_notebook(tab, tmp_path, graph, model=model, coder=coder) as (cell, frame):
        view = cell.widget
        one, two, three = list_nodes(frame, 3)
        numbers = frame.evaluate("ids => ids.map((id) => jcltPage.graph.numbers.get(id))", [one, two, three])
        click_node(frame, three, "Control")
        wait_until(lambda: view.pinned == [numbers[2]], tab)
        frame.get_by_role("button", name="Make supernode", exact=True).click()
        for node in (one, two):
            click_node(frame, node)
        frame.get_by_role("button", name="Make supernode of 2").click()
        frame.locator("g.item.group").press("F2")
        frame.get_by_label("Name of the supernode").fill("a <i>name</i>")
        frame.get_by_label("Name of the supernode").press("Enter")
        wait_until(lambda: view.supernodes == {"a <i>name</i>": numbers[:2]}, tab)
        assert sorted(view.pinned) == sorted(numbers) and view.selected == numbers[:2]
        frame.get_by_role("slider", name="Node threshold").fill("0.9")
        click_node(frame, one)
        frame.get_by_label("Label of the feature").fill("mine")
        frame.get_by_label("Label of the feature").press("Enter")
        layer, _, feature = graph.features[numbers[0]].tolist()
        wait_until(lambda: view.labels == {f"{layer}/{feature}": "mine"}, tab)
        assert view.selected == numbers[:1] and view.thresholds == [0.9, 0.98]
        frame.get_by_role("button", name="Scale").click()
        frame.get_by_text("The answer").wait_for(timeout=120_000)
        direct = jclt.intervene(
            *(model, coder, PROMPT, jclt.scale_nodes(graph, numbers[:1], 0.0)),
            **{"graph": graph, "reference": "current", "attention": "free", "norms": "free"},
        )
        assert view.result is not None and view.result.kl == pytest.approx(direct.kl, rel=1e-4)
        edited = view.graph
        assert edited.supernodes == {"a <i>name</i>": tuple(numbers[:2])} and edited.labels[numbers[0]] == "mine"
        frame.get_by_label("Prompt of a new graph").fill("calc: 36+59=")
        frame.get_by_label("Prompt of a new graph").press("Enter")
        wait_until(lambda: view.graph_name == "calc-36-59", tab)
        assert view.graph.logit_names[0] == "95" and view.supernodes == {} and view.pinned == []


def test_what_is_set_in_python_is_shown_in_all_cells(tab, tmp_path):
    with show_in_notebook(tab, tmp_path, hand_graph(), cells=2) as (cell, _):
        view = cell.widget
        view.supernodes, view.labels = {"the <b>two</b>": [0, 1]}, {"0/17": "mine"}
        view.selected, view.thresholds = [0, 1], [0.75, 1]
        bring(tab, cell)
        for frame in tab.frames[1:]:
            frame.get_by_role("heading", name="Supernode the <b>two</b>").wait_for()
            frame.get_by_role("button", name="mine, feature 0/17").wait_for()
            assert frame.get_by_role("slider", name="Node threshold").input_value() == "0.75"
        frame = tab.frames[2]
        frame.get_by_role("button", name="Unpin all").click()
        wait_until(lambda: view.pinned == [] and view.supernodes == {}, tab)
        wait_for(tab.frames[1], "jcltPage.pinned.size === 0")
        view.selected = [5]
        bring(tab, cell)
        tab.frames[1].get_by_role("heading", name="output ‘ Denver’").wait_for()
        frame.locator(".graph canvas").last.press("g")
        frame.locator(".graph canvas").last.press("ArrowUp")
        assert tab.evaluate("keys") == []  # the notebook's own keys are not touched
        tab.evaluate("document.body.append(document.querySelector('div'))")  # the notebook moves the first cell
        for number in (0, 1):  # its page is loaded again
            tab.frame_locator("iframe").nth(number).get_by_role("heading", name="output ‘ Denver’").wait_for()
        view.selected = [0]
        bring(tab, cell)
        for frame in tab.frames[1:]:
            frame.get_by_role("heading", name="mine, feature 0/17").wait_for()
        tab.evaluate("endCell()")


def test_hostile_texts_stay_texts_in_a_cell(tab, tmp_path):
    tab.on("dialog", lambda dialog: pytest.fail(dialog.message))
    with show_in_notebook(tab, tmp_path, make_hostile_graph()) as (cell, frame):
        view = cell.widget
        view.supernodes, view.labels, view.selected = {HOSTILE[1]: [0, 1]}, {"0/17": HOSTILE[0]}, [0]
        bring(tab, cell)
        frame.get_by_role("tab", name="About").click()
        frame.get_by_role("heading", name="<img src=x onerror=alert(1)>, feature 0/17").wait_for()
        check_harmless(frame)
        assert frame.evaluate(REFUSED) == ["connect-src", "SecurityError"]
        tab.wrong.clear()  # the browser's own note of what the policy refused
