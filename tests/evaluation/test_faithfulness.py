"""Influence beside ablation: against repeated sums over the edges, `intervene`, `ablate`, and the handmade model."""

import numpy as np
import pytest
from handmade_coders import LAST, faithful_coder
from traced_graphs import make_case, trace_whole_graph

import jclt
from jclt.errors import UserError
from jclt.evaluation.faithfulness import compare_outputs, find_later, measure_ablations, predict_ablations
from jclt.evaluation.intervals import average_prompts, correlate, correlate_ranks, divide_sums, rank, tabulate
from jclt.graphs.influence import compute_edge_shares
from jclt.graphs.prediction import predict_changes
from jclt.interventions.groups import change_groups
from jclt.world.handmade import ANSWERS, PROMPTS, build_two_hop


def test_ranks_and_correlations_are_those_by_hand():
    np.testing.assert_array_equal(rank(np.array([3.0, 1.0, 3.0, 7.0])), [1.5, 0, 1.5, 3])
    x, y = np.random.default_rng(0).standard_normal((2, 50))
    assert correlate(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert correlate_ranks(x, np.exp(x)) == pytest.approx(1) and correlate_ranks(x, -x) == pytest.approx(-1)
    assert np.isnan(correlate(x, np.ones(50))) and np.isnan(correlate_ranks(x[:2], y[:2]))


def test_intervals_cover_the_mean_as_often_as_they_say():
    """Of 200 sets of 30 normal numbers about 95% have 0 in their interval."""
    covered = [f.low <= 0 <= f.high for f in map(average_prompts, np.random.default_rng(0).standard_normal((200, 30)))]
    assert 0.88 <= np.mean(covered) <= 0.99
    ratio = divide_sums([1.0, 3.0], [4.0, 4.0], control=[0.5, 0.1])
    assert (ratio.value, ratio.low, ratio.high, ratio.control) == (0.5, 0.25, 0.75, 0.3)
    assert np.isnan(average_prompts([]).value) and average_prompts([1.0, np.nan]).prompts == 1
    with_paper = {"x": divide_sums([1.0, 3.0], [4.0, 4.0], control=0.3, paper="0.72")}
    assert "0.500 [0.250, 0.750]     0.300  0.72" in tabulate("t", {"coder": with_paper})


def test_predictions_are_sums_over_all_paths():
    graph = trace_whole_graph("gpt2", "clt", "float32")
    said, n = predict_ablations(graph), len(graph.features)
    np.testing.assert_allclose(said.influence, graph.influence[:n])
    shares = compute_edge_shares(graph.edges)[:n, :n].astype(np.float64)
    want, power = np.zeros((n, n)), np.eye(n)
    for _ in range(graph.layers):
        power = power @ shares
        want += power
    np.testing.assert_allclose(said.on_features, want.T, atol=1e-9)
    output = graph.nodes.find("output")[graph.logit_probabilities.argmax()]
    for source in (0, n // 2, n - 1):
        changes = predict_changes(graph, {source: -1.0}, total=True)
        np.testing.assert_allclose(said.changes[source, 0], changes[output], rtol=1e-3, atol=1e-4)
        moved, others = said.relative[source] * graph.values[:n], np.arange(n) != source
        np.testing.assert_allclose(moved[others], changes[:n][others], rtol=1e-3, atol=1e-4)
    few = predict_ablations(graph, most=3)
    assert set(few.sources) == set(np.argsort(-graph.influence[:n])[:3])
    np.testing.assert_allclose(few.changes, said.changes[few.sources], rtol=1e-5)


@pytest.mark.exhaustive  # the next test compares a group; both are rows of one program
@pytest.mark.parametrize(("clamped", "treatment"), [(0, "frozen"), (2, "frozen"), (2, "free")])
def test_changes_of_single_features_are_those_of_ablate(clamped, treatment):
    case, graph = make_case("gpt2", "skip", "float32"), trace_whole_graph("gpt2", "skip", "float32")
    setting = {"clamped": clamped, "attention": treatment, "norms": treatment}
    sources = np.arange(len(graph.features))
    found = measure_ablations(case.model, case.coder, graph, sources, **setting)
    tokens = graph.nodes.index[graph.nodes.find("output")]
    tokens = tokens[np.argsort(-graph.logit_probabilities, kind="stable")]
    want = jclt.ablate(*case, graph.features, tokens=tokens, progress=False, **setting)
    np.testing.assert_allclose(found.kl, want.kl, rtol=1e-5, atol=1e-5)
    differences = want.effects - want.effects[:, :1]
    np.testing.assert_allclose(found.effects - found.effects[:, :1], differences, atol=1e-4)
    logits = np.asarray(jclt.run(case.model, case.tokens)[0], np.float64)[-1]
    logs = logits - np.log(np.exp(logits).sum())
    np.testing.assert_allclose(found.original_log_probabilities, logs[tokens], atol=1e-5)


def test_changes_of_groups_are_those_of_intervene():
    """In clamped layers; the other features' activations too."""
    case, graph = make_case("gpt2", "clt", "float32"), trace_whole_graph("gpt2", "clt", "float32")
    group = np.flatnonzero(graph.features[:, 0] == 0)[:3]
    changes = np.zeros((2, len(graph.features)), np.float32)
    changes[1, group] = 0.5
    tokens = graph.nodes.index[graph.nodes.find("output")]
    found = change_groups(case.model, case.coder, case.tokens, graph.features, changes, tokens=tokens, clamped=2)
    edits = [jclt.Scale(1.5, layer=int(s), position=int(p), feature=int(f)) for s, p, f in graph.features[group]]
    alone = jclt.intervene(*case, edits, layers=(0, 1), graph=graph)
    np.testing.assert_allclose(found.effects[0], 0, atol=1e-5)
    np.testing.assert_allclose(found.effects[1], (alone.outputs.after - alone.outputs.before)[: len(tokens)], atol=1e-4)
    f = alone.features
    after = {tuple(x): a for *x, a in zip(f.layer, f.position, f.feature, f.after, strict=True)}
    later = np.flatnonzero(graph.features[:, 0] > 0)
    want = [after[tuple(x)] for x in graph.features[later]]
    np.testing.assert_allclose(found.activations[1, later], want, atol=1e-4)
    with pytest.raises(UserError, match="a column for each feature"):
        change_groups(case.model, case.coder, case.tokens, graph.features, changes, tokens=tokens, clamped=-1)


@pytest.mark.exhaustive  # programs of another model; the numbers are those of the tests above
def test_on_the_handmade_model_the_graph_says_what_ablation_does():
    model = build_two_hop()
    coder = faithful_coder(model)
    graph = jclt.attribute(model, coder, np.asarray(PROMPTS[3]), targets=[ANSWERS[3]])
    said = predict_ablations(graph)
    assert graph.features[:, :2].tolist() == [[0, LAST], [1, LAST]] and find_later(graph, said.sources).sum() == 1
    # Without the city's feature the state's is at 0.5 - 1: off; and the logit, of which it had all, falls to 0 of 2.
    found = measure_ablations(model, coder, graph, said.sources, clamped=1)
    np.testing.assert_allclose(found.activations[0], [0.5, 0], atol=1e-6)
    capital = 4 * 0.5 * (1 - 1 / 24)
    np.testing.assert_allclose(found.effects[:, 0], [-capital + 1 / 24, -capital], atol=1e-5)
    # The prediction is linear: the state's pre-activation changes by -1, twice its value.
    np.testing.assert_allclose(said.changes[:, 0], [-2 * capital + 1 / 24, -capital], atol=1e-5)
    assert np.isnan(compare_outputs(graph, said, found)["logit"])  # two features have no rank correlation
