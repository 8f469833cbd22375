"""What `jclt demo --open` shows, in a real browser: the state in the two-hop graph, the features' examples, the first
look."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_browser import find_node, list_serious_faults, open_graph, read, wait_for
from page_server import running

import jclt
from jclt.cli.demo import find_demo_labels, load_demo
from jclt.features import Features, describe_features
from jclt.graphs import add_supernodes, label_nodes, suggest_supernodes
from jclt.viewer.library import Library
from jclt.viewer.page_service import Page

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::ResourceWarning")]
PROMPT = "Question: in the state of South Creek, what is the capital? Answer:"
STATE = {(1, 16, 376), (2, 16, 496)}
"""The features of the shipped coder that stand for the state, at the prompt's last token."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Iterator[tuple[int, Path, Features]]:
    """The port of a page like the demo's, its folder, and the described features."""
    model, coder = load_demo()
    folder = tmp_path_factory.mktemp("demo")
    graph = label_nodes(jclt.attribute(model, coder, PROMPT), find_demo_labels(coder))
    groups = suggest_supernodes(graph.prune())
    state = next(group for group in groups if set(group.features) == STATE)
    named = [group._replace(name="state = Colorado") if group is state else group for group in groups]
    add_supernodes(graph, named).save(folder / "two_hop.npz")
    other = replace(graph, provenance=graph.provenance | {"coder_fingerprint": "another"})
    other.save(folder / "other_coder.npz")
    features = describe_features(model, coder, rows=32, length=64, out=folder / "described")
    page = Page(
        Library([folder]),
        load_model=lambda: (model, coder),
        features=folder / "described",
        find_labels=find_demo_labels,
        has_tour=True,
    )
    with running(page) as port:
        yield port, folder, features


@pytest.fixture(autouse=True)
def forget_views(demo):
    """Each test begins with the groups of the graph."""
    for view in demo[1].glob("*.view.json"):
        view.unlink()


def find_group_name(tab: Any, name: str) -> tuple[float, float]:
    """Where the name of a group stands in the graph."""
    x, y = tab.evaluate(
        """name => { const { view } = jcltPage, box = view.top.getBoundingClientRect();
        const [node] = [...view.nameGroups()].find(([, other]) => other === name);
        const [left, top, right, bottom] = view.labels.get(node);
        return [(left + right) / 2 + box.x, (top + bottom) / 2 + box.y]; }""",
        name,
    )
    return x, y


def test_the_state_is_pointed_at_clicked_and_set_to_another_and_the_capital_changes(tab, demo):
    open_graph(tab, demo[0], "two_hop")
    tab.get_by_role("button", name="Close").click()  # the first look
    tab.mouse.move(*find_node(tab, "1_376_16"))
    assert "in the supernode state = Colorado" in tab.locator(".tip").inner_text()
    tab.mouse.click(*find_group_name(tab, "state = Colorado"))
    assert "Supernode state = Colorado" in tab.locator(".node").inner_text()
    assert set(read(tab, "app.chosen.map((n) => app.graph.ids[n])")) == {"1_376_16", "2_496_16"}
    tab.reload()
    tab.get_by_text("Supernode state = Colorado").wait_for()
    tab.get_by_label("Another prompt").fill(PROMPT.replace("South Creek", "Mount Haven"))
    tab.get_by_role("button", name="Set to what this prompt has").click()
    tab.get_by_text("The answer changes from ‘ Denver’ to ‘ Atlanta’.").wait_for(timeout=120_000)
    tab.get_by_label("Prompt of a new graph").fill("calc: 36+59=")
    tab.keyboard.press("Enter")
    wait_for(tab, "jcltPage.graph.name === 'calc-36-59'")
    assert read(tab, "app.graph.outputs[0].text") == "95"
    labels = find_demo_labels(load_demo()[1])
    shown = read(tab, "app.graph.labels.map((text, n) => [app.graph.layer[n], app.graph.index[n], text])")
    features = read(tab, "app.graph.kind.filter((kind) => kind === 'feature').length")
    assert [text for *_, text in shown[:features]] == [labels.get((a, b), "") for a, b, _ in shown[:features]]
    assert any(text for *_, text in shown)


def test_the_panel_shows_what_is_known_of_a_feature(tab, demo):
    port, _, features = demo
    open_graph(tab, port, "two_hop", "&clicked=1_376_16")
    tab.get_by_role("tab", name="Feature").click()
    panel, record = tab.locator("#part-0"), features[1, 376]
    panel.get_by_text("Top activations").wait_for()
    text = panel.inner_text()
    assert "is not known" not in text and f"{100 * record.density:.2f}%" in text
    assert panel.locator("code").all_inner_texts() == [
        f"‘{token}’" for token, _ in [*record.raises[:10], *record.lowers[:10]]
    ]
    assert panel.locator(".histogram span").count() == 40
    norms = panel.locator(".norms tr").all_inner_texts()
    assert [line.split("\t")[0] for line in norms] == ["layer 1", "layer 2", "layer 3"]
    np.testing.assert_allclose([float(line.split("\t")[-1]) for line in norms], record.decoder_norms, atol=6e-4)
    best, first = record.top[0], panel.locator(".example").nth(1)  # after the prompt
    assert first.locator("span").count() == len(best.tokens)
    bright = first.locator("span").evaluate_all("list => list.map((word) => word.style.backgroundColor !== '')")
    assert bright == [value > 0 for value in best.activations]
    tab.get_by_label("Label of the feature").fill("the state is Colorado")
    tab.keyboard.press("Enter")
    assert read(tab, "app.graph.labels[app.clicked]") == "the state is Colorado"


def test_examples_of_another_coder_are_not_shown(tab, demo):
    open_graph(tab, demo[0], "other_coder", "&clicked=1_376_16")
    tab.get_by_role("tab", name="Feature").click(no_wait_after=True)
    tab.get_by_text("are of another coder").wait_for()
    assert tab.locator(".example").count() == 1  # the prompt
    assert read(tab, "app.graph.density") is None
    tab.wrong.clear()  # the browser's own note of the answer 400


def test_features_are_filtered_by_density(tab, demo):
    port, folder, features = demo
    counts = {layer: features.column(layer, "count") for layer in features.layers}
    open_graph(tab, port, "two_hop", "&nodes=1&edges=1&pinned=")
    graph = jclt.load_graph(folder / "two_hop.npz")
    shares = (
        np.array([counts[layer][number] for layer, _, number in graph.features.tolist()]) / features.settings["tokens"]
    )
    tab.get_by_text("Filters", exact=True).click()
    for text, least, most in (("1-5", 0.01, 0.05), ("-0.5", 0, 0.005), ("2-", 0.02, 1), ("many", 0, 1)):
        tab.get_by_label("Density").fill(text)
        shown = read(tab, "[...app.shown.nodes.keys()].filter((n) => app.shown.nodes[n])")
        shown = [node for node in shown if node < len(shares)]
        assert shown == np.flatnonzero((shares >= least) & (shares <= most)).tolist()
    tab.get_by_role("button", name="Clear filters").click()
    assert read(tab, "app.state.density") == ""


def test_suggested_groups_are_those_of_the_graph(tab, demo):
    port, folder, _ = demo
    open_graph(tab, port, "two_hop")
    tab.get_by_role("button", name="Close").click()
    tab.get_by_role("button", name="Suggest supernodes").click()
    tab.get_by_text("No features outside supernodes are fed alike").wait_for()
    tab.get_by_role("button", name="Unpin all").click()
    tab.get_by_role("slider", name="Node threshold").fill("0.9")
    tab.get_by_role("button", name="Suggest supernodes").click()
    tab.get_by_text("supernodes suggested, with").wait_for()
    groups = suggest_supernodes(jclt.load_graph(folder / "two_hop.npz").prune(0.9, 0.98))
    found = read(
        tab,
        "app.groups.map(({ name, members }) => [name, app.shareOfInfluence(members),"
        " members.map((n) => [app.graph.layer[n], app.graph.position[n], app.graph.index[n]])])",
    )
    assert len(groups) > 2
    for (name, _, _), group in zip(found, groups, strict=True):
        assert name == group.name or name.endswith(f" and {len(group.features) - 1} more")
    assert [[tuple(place) for place in places] for *_, places in found] == [list(group.features) for group in groups]
    np.testing.assert_allclose([share for _, share, _ in found], [group.share for group in groups], atol=1e-5)


def test_the_first_look_is_walked_with_the_keyboard_and_seen_once(tab, demo):
    open_graph(tab, demo[0], "two_hop")
    look = tab.get_by_role("region", name="First look")
    look.get_by_role("button", name="Next").focus()
    for step in range(2, 8):
        tab.keyboard.press("Enter")
        assert look.inner_text().startswith(f"{step} of 7") and tab.locator(".pointed").count() == 1
        if step == 4:
            tab.keyboard.press("Shift+Tab")
            tab.keyboard.press("Shift+Tab")
            tab.keyboard.press("Enter")  # "Try it"
            assert tab.evaluate("document.activeElement.textContent") == "Set to what this prompt has"
            assert "Mount Haven" in tab.get_by_label("Another prompt").input_value()
            look.get_by_role("button", name="Next").focus()
    tab.keyboard.press("Escape")
    assert look.is_hidden() and tab.locator(".pointed").count() == 0
    assert tab.evaluate("document.activeElement.getAttribute('role')") == "application"
    tab.reload()
    wait_for(tab, "globalThis.jcltPage?.graph && jcltPage.view.places")
    assert look.is_hidden()
    tab.get_by_text("Files", exact=True).click()
    tab.get_by_role("button", name="First look").click()
    assert look.is_visible()


@pytest.mark.parametrize(("scheme", "width"), [("light", 800), ("dark", 1280)])
def test_axe_finds_no_serious_fault_in_the_first_look_examples_and_the_difference(browser, demo, scheme, width):
    with browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True) as context:
        tab = context.new_page()
        open_graph(tab, demo[0], "two_hop", "&clicked=1_376_16")
        assert tab.get_by_role("region", name="First look").is_visible()
        tab.get_by_role("tab", name="Feature").click()
        tab.get_by_text("Top activations").wait_for()
        assert list_serious_faults(tab) == []
        tab.get_by_role("button", name=re.compile("^state = Colorado, . nodes")).click()
        tab.get_by_role("tab", name="Compare").click()
        tab.get_by_label("The other graph").select_option("other_coder")
        tab.get_by_role("button", name="Picture", exact=True).click()
        assert list_serious_faults(tab) == []
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
