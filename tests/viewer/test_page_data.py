"""The page's modules read what `build_page_data` writes, and prune and score as `Graph` does."""

import base64
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from golden_graphs import golden_graph
from graph_lists import hand_graph, random_graph
from page_modules import run_modules

from jclt.graphs import Graph, import_json, label_nodes, suggest_supernodes
from jclt.graphs.pruning import NEVER_REMOVED
from jclt.viewer.page_data import build_page_data
from jclt.viewer.page_limit import limit_edges

PUBLISHED = Path(__file__).parents[1] / "golden" / "published_graphs"
THRESHOLDS = [(0.8, 0.98, "paper"), (0.8, 0.98, "circuit-tracer"), (0.5, 0.9, "paper"), (0.95, 1.0, "paper")]
THRESHOLDS += [(1.0, 1.0, "circuit-tracer"), (0.0, 0.0, "paper"), (0.63, 0.71, "circuit-tracer")]

PRUNE = """
const { readGraph } = await load('graph.js');
const { prune, measureScores, keepAll } = await load('pruning.js');
const list = (mask) => [...mask.keys()].filter((i) => mask[i]);
print(data.graphs.map((content) => {
  const graph = readGraph(content), whole = measureScores(graph, keepAll(graph));
  const edges = [...graph.targets].map((target, i) => [target, graph.sources[i]]);
  return { edges, whole: [whole.replacement, whole.completeness],
    cases: data.thresholds.map(([nodes, edges, rule]) => {
      const kept = prune(graph, nodes, edges, rule), { replacement, completeness } = measureScores(graph, kept);
      return { nodes: list(kept.nodes), edges: list(kept.edges), scores: [replacement, completeness] };
    }) };
}));
"""


def list_graphs() -> list[Graph]:
    published = [
        import_json(PUBLISHED / f"{name}.json.gz")
        for name in ("dallas-austin-gemma-2-2b-clt", "dollar-gemma-2-2b-part")
    ]
    return [
        hand_graph(),
        random_graph(1, features=25, rest=0.3, positions=True),
        random_graph(4, features=60, layers=6, tokens=9, outputs=3),
        random_graph(1, features=25, rest=0.3, vectors=True),
        golden_graph("gemma2"),
        *published,
    ]


def test_pruning_and_scores_in_the_page_are_those_of_graphs(tmp_path):
    graphs = list_graphs()
    data = {"graphs": [build_page_data(graph, "one") for graph in graphs], "thresholds": THRESHOLDS}
    for graph, got in zip(graphs, run_modules(PRUNE, data, tmp_path), strict=True):
        np.testing.assert_array_equal(got["edges"], np.argwhere(graph.adjacency))
        np.testing.assert_allclose(got["whole"], list(graph.scores.both.values()), atol=1e-5)
        for (nodes, edges, rule), case in zip(THRESHOLDS, got["cases"], strict=True):
            masks = graph.masks(nodes, edges, rule)
            assert case["nodes"] == np.flatnonzero(masks.nodes).tolist()
            assert case["edges"] == np.flatnonzero(masks.edges[graph.adjacency != 0]).tolist()
            pruned = graph.keep(masks.nodes, masks.edges)
            np.testing.assert_allclose(case["scores"], list(pruned.scores.both.values()), atol=1e-5)
    assert set(NEVER_REMOVED) == {rule for _, _, rule in THRESHOLDS}


SUGGEST = """
const { readGraph } = await load('graph.js');
const { prune, measureScores, keepAll } = await load('pruning.js');
const { suggestSupernodes } = await load('suggest.js');
print(data.graphs.map((content) => data.thresholds.map(([nodes, edges]) => {
  const graph = readGraph(content), kept = nodes === 1 ? keepAll(graph) : prune(graph, nodes, edges);
  return suggestSupernodes(graph, kept, measureScores(graph, kept).visits);
})));
"""


def test_supernodes_that_the_page_suggests_are_those_of_graphs(tmp_path):
    graphs, thresholds = [*list_graphs(), import_json(PUBLISHED / "meow-gemma-2-2b-clt.json.gz")], [(0.9, 0.98), (1, 1)]
    graphs[2] = label_nodes(graphs[2], {(layer, n): f"{n % 3}  {layer}" for layer, _, n in graphs[2].features.tolist()})
    data = {"graphs": [build_page_data(graph, "one") for graph in graphs], "thresholds": thresholds}
    count = 0
    for graph, cases in zip(graphs, run_modules(SUGGEST, data, tmp_path), strict=True):
        for (nodes, edges), got in zip(thresholds, cases, strict=True):
            groups = suggest_supernodes(graph if nodes == 1 else graph.prune(nodes, edges))
            assert [graph.features[group["members"]].tolist() for group in got] == [
                [list(place) for place in group.features] for group in groups
            ]
            for group, wanted in zip(got, groups, strict=True):
                unnamed = f" and {len(wanted.features) - 1} more"
                assert group["name"] == wanted.name or (group["name"].endswith(unnamed) and unnamed in wanted.name)
            count += len(groups)
    assert count > 20


def test_the_view_of_a_file_is_the_first_view_and_a_saved_one_replaces_it():
    graph = replace(hand_graph(), supernodes={"two": (0, 1)}, annotations={"qParams": {"pinnedIds": ["none", "E_5_0"]}})
    data = build_page_data(graph, "hand")
    assert data["view"] == {"pinnedIds": ["E_5_0", "0_17_0", "2_40_1"], "supernodes": [["two", "0_17_0", "2_40_1"]]}
    assert build_page_data(graph, "hand", view={"pinnedIds": []})["view"]["pinnedIds"] == []
    assert build_page_data(graph, "hand", labels={(2, 40): "mine"})["labels"] == ["", "mine"]


def test_numbers_are_exact():
    graph = random_graph(3)
    data = build_page_data(graph, "random")
    influence = np.frombuffer(base64.b64decode(data["influence"]), "<f8")
    np.testing.assert_array_equal(influence, graph.influence)


def test_a_page_shows_the_strongest_edges_of_a_large_graph():
    graph = random_graph(4, features=60, layers=6, tokens=9, outputs=3)
    edges = int(np.count_nonzero(graph.adjacency))
    assert limit_edges(graph, edges) is graph
    shown = limit_edges(graph, edges // 4)
    kept = int(np.count_nonzero(shown.adjacency))
    assert edges // 40 < kept <= edges // 4
    counts = f"{len(shown.features)} of 60 features and {kept} of {edges:,} edges"
    assert build_page_data(shown, "large")["about"]["shown"].startswith(counts)
    # What is not shown counts as before: all that reaches an output is its edges and `rest`.
    for of_whole, of_shown in zip(graph.nodes.find("output"), shown.nodes.find("output"), strict=True):
        whole, left = (x.adjacency[node].sum() + x.rest[node] for x, node in ((graph, of_whole), (shown, of_shown)))
        assert left == pytest.approx(whole, rel=1e-6)
    strongest = graph.prune(0.5, 0.5)
    missing = set(map(tuple, strongest.features.tolist())) - set(map(tuple, shown.features.tolist()))
    assert len(missing) <= len(strongest.features) // 4
