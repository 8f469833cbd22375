"""Influence, scores and pruning are circuit-tracer's on the same graph, and its saved graphs are read."""

import numpy as np
import pytest
from golden_graphs import GRAPHS, golden_graph
from graph_lists import random_graph, replace_lists

from jclt.errors import UserError
from jclt.graphs.circuit_tracer_pt import read_circuit_tracer
from jclt.graphs.graph import Graph
from jclt.graphs.influence import compute_edge_shares

torch = pytest.importorskip("torch", reason="needs circuit-tracer")
peer = pytest.importorskip("circuit_tracer.graph", reason="needs circuit-tracer")
targets = pytest.importorskip("circuit_tracer.attribution.targets", reason="needs circuit-tracer")
mapping = pytest.importorskip("circuit_tracer.utils.tl_nnsight_mapping", reason="needs circuit-tracer")

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

CASES = [*GRAPHS, 0, 1, 2]


def graph_of(case: str | int) -> Graph:
    return golden_graph(case) if isinstance(case, str) else random_graph(case, features=150, layers=5, outputs=3)


def theirs(graph: Graph, dtype=torch.float32, **changes):
    """The same graph as circuit-tracer holds it."""
    config = mapping.UnifiedConfig(graph.layers, 8, 4, 2, 32, 101, "tokenizer", "model", "Llama", dtype=torch.float32)
    given = {
        "input_string": "a b c",
        "input_tokens": torch.tensor(graph.tokens),
        "active_features": torch.tensor(graph.features),
        "adjacency_matrix": torch.tensor(graph.adjacency, dtype=dtype),
        "cfg": config,
        "selected_features": torch.arange(len(graph.features)),
        "activation_values": torch.tensor(graph.activations, dtype=dtype),
        "logit_targets": [
            targets.LogitTarget(name, int(token))
            for name, token in zip(graph.logit_names, graph.logit_tokens, strict=True)
        ],
        "logit_probabilities": torch.tensor(graph.logit_probabilities.copy(), dtype=dtype),
        "scan": "coder",
    }
    return peer.Graph(**given | changes)


@pytest.fixture
def in_double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def in_dtype(graph: Graph, dtype) -> Graph:
    names = ("adjacency", "rest", "rest_mass", "bias", "values", "logit_probabilities")
    return replace_lists(graph, **{name: getattr(graph, name).astype(dtype) for name in names})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("thresholds", [(0.8, 0.98), (0.5, 0.9), (0.95, 0.999), (0.0, 0.0)])
def test_pruning_keeps_what_circuit_tracer_keeps(case, thresholds, in_double):
    """In float64, where rounding decides nothing."""
    graph = in_dtype(graph_of(case), np.float64)
    nodes, edges, cumulative = peer.prune_graph(theirs(graph, torch.float64), *thresholds)
    found = graph.masks(*thresholds, rule="circuit-tracer")
    np.testing.assert_array_equal(found.nodes, nodes)
    np.testing.assert_array_equal(found.edges, edges)
    has = graph.influence > 0
    np.testing.assert_allclose(found.cumulative, cumulative, rtol=1e-12)
    assert has.sum() > 0.2 * len(graph) and len(np.unique(found.cumulative[has])) > 0.9 * has.sum()


@pytest.mark.parametrize("case", CASES)
def test_pruning_in_single_precision_differs_in_nothing_but_rounding(case):
    graph = in_dtype(graph_of(case), np.float32)
    nodes, edges, cumulative = peer.prune_graph(theirs(graph))
    found = graph.masks(rule="circuit-tracer")
    np.testing.assert_array_equal(found.nodes, nodes)
    # The last edge in is where the sum of all passes 98%, which is known to about 1e-7 of it.
    assert np.count_nonzero(found.edges != edges.numpy()) <= 1e-3 * np.count_nonzero(found.edges)
    np.testing.assert_allclose(found.cumulative, cumulative, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_influence_and_scores_are_circuit_tracers(case):
    graph = in_dtype(graph_of(case), np.float32)
    replacement, completeness = peer.compute_graph_scores(theirs(graph))
    found = graph.scores
    assert (found.replacement, found.completeness) == pytest.approx((replacement, completeness), rel=2e-6)
    weights = torch.tensor(graph.output_weights)
    influence = peer.compute_node_influence(torch.tensor(graph.adjacency), weights)
    np.testing.assert_allclose(graph.influence, influence, rtol=2e-5, atol=1e-9)
    np.testing.assert_allclose(
        compute_edge_shares(graph.edges), peer.normalize_matrix(torch.tensor(graph.adjacency)), rtol=1e-5
    )


@pytest.mark.parametrize("case", CASES)
def test_saved_graphs_are_read(case, tmp_path):
    graph = in_dtype(graph_of(case), np.float32)
    theirs(graph).to_pt(str(tmp_path / "graph.pt"))
    found = read_circuit_tracer(tmp_path / "graph.pt")
    for name in ("adjacency", "features", "errors", "tokens", "logit_tokens", "logit_probabilities", "logit_positions"):
        np.testing.assert_array_equal(getattr(found, name), getattr(graph, name), err_msg=name)
    np.testing.assert_allclose(found.activations, graph.activations, rtol=1e-6)
    assert (found.logit_names, found.layers) == (graph.logit_names, graph.layers)
    assert not found.residual.any() or np.abs(found.residual).max() < 1e-5
    assert found.provenance == {"program": "circuit-tracer", "model": "model", "coder": "coder", "prompt": "a b c"}


def test_selected_features_views_types_and_old_targets_are_read(tmp_path):
    graph = in_dtype(random_graph(0, features=10), np.float32)
    more = torch.tensor(np.repeat(graph.features, 2, axis=0))
    values = torch.arange(20, dtype=torch.bfloat16)
    wide = torch.zeros(2 * len(graph), len(graph) + 3)
    wide[::2, 3:] = torch.tensor(graph.adjacency)
    changes = {
        "active_features": more.int(),
        "selected_features": torch.arange(1, 20, 2),
        "activation_values": values,
        "adjacency_matrix": wide[::2, 3:],
        "logit_targets": torch.tensor([7, 105]),  # as ids alone; the second past the vocabulary of 101
        "logit_probabilities": torch.tensor(graph.logit_probabilities).half(),
        "scan": ["one", "two"],
    }
    theirs(graph, **changes).to_pt(str(tmp_path / "graph.pt"))
    found = read_circuit_tracer(tmp_path / "graph.pt")
    np.testing.assert_array_equal(found.adjacency, graph.adjacency)
    np.testing.assert_array_equal(found.features, graph.features)
    np.testing.assert_array_equal(found.activations, np.arange(1, 20, 2, dtype=np.float32))
    assert found.logit_tokens.tolist() == [7, -1] and found.logit_names == ("", "")
    np.testing.assert_allclose(found.logit_probabilities, graph.logit_probabilities, rtol=1e-3)
    assert found.provenance["coder"] == ["one", "two"]
    theirs(graph, **changes | {"activation_values": values[:10]}).to_pt(str(tmp_path / "graph.pt"))
    np.testing.assert_array_equal(read_circuit_tracer(tmp_path / "graph.pt").activations, np.arange(10))


def test_token_texts_are_taken_from_the_outputs(tmp_path):
    graph = random_graph(0)
    same = [targets.LogitTarget(" again", int(graph.tokens[1])), targets.LogitTarget(" new", 99)]
    theirs(graph, logit_targets=same).to_pt(str(tmp_path / "graph.pt"))
    found = read_circuit_tracer(tmp_path / "graph.pt")
    assert found.token_texts[1] == " again" and "" in found.token_texts


def test_edges_against_the_order_of_layers_are_refused(tmp_path):
    graph = random_graph(0)
    graph.adjacency[0, graph.features[:, 0].argmax()] = 1.0
    theirs(graph).to_pt(str(tmp_path / "graph.pt"))
    with pytest.raises(UserError, match="leads from layer [0-9] to 0, expected into a higher layer"):
        read_circuit_tracer(tmp_path / "graph.pt")
