"""Influence, scores and pruning equal circuit-tracer's on the same graph, and its saved graphs are read."""

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


def to_circuit_tracer(graph: Graph, dtype=torch.float32, **changes):
    """The same graph as an object of circuit-tracer."""
    config = mapping.UnifiedConfig(graph.layers, 8, 4, 2, 32, 101, "tokenizer", "model", "Llama", dtype=torch.float32)
    arguments = {
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
    return peer.Graph(**arguments | changes)


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
    """In float64, so that rounding does not change the result."""
    graph = in_dtype(graph_of(case), np.float64)
    nodes, edges, cumulative = peer.prune_graph(to_circuit_tracer(graph, torch.float64), *thresholds)
    masks = graph.masks(*thresholds, rule="circuit-tracer")
    np.testing.assert_array_equal(masks.nodes, nodes)
    np.testing.assert_array_equal(masks.edges, edges)
    positive = graph.influence > 0
    np.testing.assert_allclose(masks.cumulative, cumulative, rtol=1e-12)
    assert positive.sum() > 0.2 * len(graph) and len(np.unique(masks.cumulative[positive])) > 0.9 * positive.sum()


@pytest.mark.parametrize("case", CASES)
def test_pruning_in_single_precision_differs_in_nothing_but_rounding(case):
    graph = in_dtype(graph_of(case), np.float32)
    nodes, edges, cumulative = peer.prune_graph(to_circuit_tracer(graph))
    masks = graph.masks(rule="circuit-tracer")
    np.testing.assert_array_equal(masks.nodes, nodes)
    # The last edge in is where the sum of all passes 98%, which is known to about 1e-7 of it.
    assert np.count_nonzero(masks.edges != edges.numpy()) <= 1e-3 * np.count_nonzero(masks.edges)
    np.testing.assert_allclose(masks.cumulative, cumulative, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_influence_and_scores_are_circuit_tracers(case):
    graph = in_dtype(graph_of(case), np.float32)
    replacement, completeness = peer.compute_graph_scores(to_circuit_tracer(graph))
    scores = graph.scores
    assert (scores.replacement, scores.completeness) == pytest.approx((replacement, completeness), rel=2e-6)
    weights = torch.tensor(graph.output_weights)
    influence = peer.compute_node_influence(torch.tensor(graph.adjacency), weights)
    np.testing.assert_allclose(graph.influence, influence, rtol=2e-5, atol=1e-9)
    np.testing.assert_allclose(
        compute_edge_shares(graph.edges), peer.normalize_matrix(torch.tensor(graph.adjacency)), rtol=1e-5
    )


@pytest.mark.parametrize("case", CASES)
def test_saved_graphs_are_read(case, tmp_path):
    graph = in_dtype(graph_of(case), np.float32)
    to_circuit_tracer(graph).to_pt(str(tmp_path / "graph.pt"))
    loaded = read_circuit_tracer(tmp_path / "graph.pt")
    for name in ("adjacency", "features", "errors", "tokens", "logit_tokens", "logit_probabilities", "logit_positions"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(graph, name), err_msg=name)
    np.testing.assert_allclose(loaded.activations, graph.activations, rtol=1e-6)
    assert (loaded.logit_names, loaded.layers) == (graph.logit_names, graph.layers)
    assert not loaded.residual.any() or np.abs(loaded.residual).max() < 1e-5
    assert loaded.provenance == {"program": "circuit-tracer", "model": "model", "coder": "coder", "prompt": "a b c"}


def test_selected_features_views_types_and_old_targets_are_read(tmp_path):
    graph = in_dtype(random_graph(0, features=10), np.float32)
    repeated = torch.tensor(np.repeat(graph.features, 2, axis=0))
    values = torch.arange(20, dtype=torch.bfloat16)
    wide = torch.zeros(2 * len(graph), len(graph) + 3)
    wide[::2, 3:] = torch.tensor(graph.adjacency)
    changes = {
        "active_features": repeated.int(),
        "selected_features": torch.arange(1, 20, 2),
        "activation_values": values,
        "adjacency_matrix": wide[::2, 3:],
        "logit_targets": torch.tensor([7, 105]),  # as ids alone; the second past the vocabulary of 101
        "logit_probabilities": torch.tensor(graph.logit_probabilities).half(),
        "scan": ["one", "two"],
    }
    to_circuit_tracer(graph, **changes).to_pt(str(tmp_path / "graph.pt"))
    loaded = read_circuit_tracer(tmp_path / "graph.pt")
    np.testing.assert_array_equal(loaded.adjacency, graph.adjacency)
    np.testing.assert_array_equal(loaded.features, graph.features)
    np.testing.assert_array_equal(loaded.activations, np.arange(1, 20, 2, dtype=np.float32))
    assert loaded.logit_tokens.tolist() == [7, -1] and loaded.logit_names == ("", "")
    np.testing.assert_allclose(loaded.logit_probabilities, graph.logit_probabilities, rtol=1e-3)
    assert loaded.provenance["coder"] == ["one", "two"]
    to_circuit_tracer(graph, **changes | {"activation_values": values[:10]}).to_pt(str(tmp_path / "graph.pt"))
    np.testing.assert_array_equal(read_circuit_tracer(tmp_path / "graph.pt").activations, np.arange(10))


def test_token_texts_are_taken_from_the_outputs(tmp_path):
    graph = random_graph(0)
    same = [targets.LogitTarget(" again", int(graph.tokens[1])), targets.LogitTarget(" new", 99)]
    to_circuit_tracer(graph, logit_targets=same).to_pt(str(tmp_path / "graph.pt"))
    loaded = read_circuit_tracer(tmp_path / "graph.pt")
    assert loaded.token_texts[1] == " again" and "" in loaded.token_texts


def test_edges_against_the_order_of_layers_are_refused(tmp_path):
    graph = random_graph(0)
    graph.adjacency[0, graph.features[:, 0].argmax()] = 1.0
    to_circuit_tracer(graph).to_pt(str(tmp_path / "graph.pt"))
    with pytest.raises(UserError, match="leads from layer [0-9] to 0, expected into a higher layer"):
        read_circuit_tracer(tmp_path / "graph.pt")
