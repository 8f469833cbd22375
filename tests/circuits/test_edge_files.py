"""Circuit files: their names and numbers, written out by hand; and there and back."""

import json

import numpy as np
import pytest
from golden_cases import golden_model

from jclt import UserError
from jclt.circuits import load_circuit, save_circuit
from jclt.circuits.edge_files import make_edge_scores
from jclt.circuits.edges import find_edges, list_edges, prune_edges

MADE = {"method": "eap", "metric": "probability", "ablation": "zero", "rules": ["norm"]}


def draw_scores(config, seed=0):
    edges = list_edges(config)
    values = np.where(edges, np.random.default_rng(seed).normal(size=edges.shape), 0).astype(np.float32)
    return make_edge_scores(config, values, "3 pairs", MADE)


def name_all(layers, heads, parallel):
    """Every edge, as a file names them: each head has its own queries, keys and values."""
    names, before = set(), ["input"]
    for layer in range(layers):
        own = [f"a{layer}.h{head}" for head in range(heads)]
        names |= {f"{sender}->{head}<{letter}>" for sender in before for head in own for letter in "qkv"}
        names |= {f"{sender}->m{layer}" for sender in (before if parallel else before + own)}
        before += [*own, f"m{layer}"]
    return names | {f"{sender}->logits" for sender in before}


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama3"])
def test_a_circuit_comes_back(name, tmp_path):
    """`neox` has attention and MLP in parallel; in `llama3` heads share keys and values."""
    model = golden_model(name)
    config, path = model.config, tmp_path / "circuit.json"
    scores = draw_scores(config)
    kept = prune_edges(config, scores.take_best(60))
    save_circuit(path, scores, kept, {"grades": []})
    content = json.loads(path.read_text())
    sizes = content["cfg"]["n_layers"], content["cfg"]["n_heads"], content["cfg"]["parallel_attn_mlp"]
    assert sizes == (config.layers, config.heads, name == "neox") and content["cfg"]["d_model"] == config.width
    assert set(content["edges"]) == name_all(*sizes) and content["made"] == {**MADE, "source": "3 pairs"}
    inside = {edge for edge, row in content["edges"].items() if row["in_graph"]}
    ends = {part.split("<")[0] for edge in inside for part in edge.split("->")} | {"logits"}
    assert {node for node, row in content["nodes"].items() if row["in_graph"]} == ends and len(ends) > 2
    got, circuit = load_circuit(model, path)
    np.testing.assert_array_equal(circuit, kept)
    np.testing.assert_allclose(got.values, scores.values, rtol=1e-14)
    for count in (1, 7, 40):
        np.testing.assert_array_equal(got.take_best(count), scores.take_best(count))
    assert (got.method, got.metric, got.ablation, got.rules) == ("eap", "probability", "zero", ("norm",))


def test_heads_that_share_keys_have_equal_parts_and_parts_add_up(tmp_path):
    model, path = golden_model("llama3"), tmp_path / "circuit.json"
    config = model.config
    group = config.heads // config.key_heads
    scores = draw_scores(config)
    save_circuit(path, scores)
    content = json.loads(path.read_text())
    column = scores.receivers.index("a1.h0<k>")
    parts = [content["edges"][f"m0->a1.h{head}<k>"]["score"] for head in range(group)]
    assert group > 1 and parts == [float(scores.values[scores.senders.index("m0"), column]) / group] * group
    assert content["edges"]["m0->a1.h0<q>"]["score"] == float(
        scores.values[scores.senders.index("m0"), scores.receivers.index("a1.h0<q>")]
    )


def test_files_of_others_are_read(tmp_path):
    """Older ones have no scores, plain truth values of nodes, and not all edges."""
    model, path = golden_model("gpt2"), tmp_path / "theirs.json"
    edges = {
        "input->a0.h1<v>": {"score": None, "in_graph": True},
        "a0.h1->logits": {"score": -2, "in_graph": True},
        "input->m0": {"score": 0.5, "in_graph": False},
    }
    path.write_text(json.dumps({"cfg": {"n_layers": model.config.layers}, "nodes": {"m0": True}, "edges": edges}))
    scores, kept = load_circuit(model, path)
    np.testing.assert_array_equal(kept, find_edges(model.config, ["input->a0.h1<v>", "a0.h1->logits"]))
    assert scores.values.sum() == -1.5 and np.count_nonzero(scores.values) == 2
    assert scores.method == scores.source == "theirs.json" and scores.metric == "logit_difference"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"cfg": {}}, "'edges' is missing or no object"),
        ({"cfg": [], "edges": {}}, "'cfg' is missing or no object"),
        ({"cfg": {"n_layers": 99}, "edges": {}}, "cfg has n_layers 99, expected"),
        ({"cfg": {}, "edges": {"a1.h0->m0": {"score": 1}}}, "edge 'a1.h0->m0' does not exist in this model"),
        ({"cfg": {}, "edges": {"input->m0": {"score": "big"}}}, "edge 'input->m0': expected a finite score"),
        ({"cfg": {}, "edges": {"input->m0": {"score": 1, "in_graph": 1}}}, "in_graph true or false"),
        ({"cfg": {}, "edges": {"input->m0": 3}}, "edge 'input->m0': expected a finite score"),
    ],
)
def test_what_is_no_circuit_is_named(content, message, tmp_path):
    path = tmp_path / "circuit.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load_circuit(golden_model("gpt2"), path)
