"""`jclt circuit`: what it prints and writes is what the calls find, on the shipped model."""

import json
from dataclasses import replace

import numpy as np
import pytest

import jclt
from jclt.circuits import load_circuit, run_edge_circuits, save_circuit
from jclt.circuits.edge_files import make_edge_scores
from jclt.circuits.edges import list_edges, prune_edges
from jclt.cli.main import main
from jclt.evaluation import CircuitGrades
from jclt.files import read_json

TASK = ["circuit", "demo", "--task", "agreement"]


def test_nodes_are_scored(capsys, tmp_path):
    path = tmp_path / "heads.json"
    options = ["--nodes", "heads", "--method", "atp", "--count", "2", "--size", "8", "2", "--json", str(path)]
    assert main([*TASK, *options]) == 0
    model = jclt.load_model("demo")
    scores = jclt.score_nodes(model, jclt.make_world_pairs(model, "agreement", 2, "train"), "heads", "atp")
    assert capsys.readouterr().out == f"{scores.summarize()}\nwritten: {path}\n"
    content, best = read_json(path), scores.rank_nodes()[:8]
    assert [row["score"] for row in content["nodes"]] == scores.values.ravel()[best].tolist()
    assert content["total"] == 112 and content["grades"] == []


@pytest.mark.exhaustive  # by default the page of circuits grades nodes
def test_nodes_are_graded_on_other_pairs(capsys):
    assert main([*TASK, "--nodes", "heads", "--method", "atp", "--count", "2", "--size", "8", "2", "--grade"]) == 0
    model = jclt.load_model("demo")
    chosen, graded = (jclt.make_world_pairs(model, "agreement", 2, split) for split in ("train", "report"))
    scores = jclt.score_nodes(model, chosen, "heads", "atp")
    grades, random = jclt.grade_nodes(model, graded, scores, (2, 8), mean_of=chosen)
    assert capsys.readouterr().out == f"{scores.summarize()}\ngraded on others: {graded!r}\n\n{grades}\n\n{random}\n"


def test_edges_go_into_files(capsys, tmp_path, monkeypatch):
    """With drawn scores and grades; tests below have those of the model. The largest size is the circuit."""
    path, graph, asked = tmp_path / "circuit.json", tmp_path / "circuit.npz", []
    model = jclt.load_model("demo")
    edges, random = list_edges(model.config), np.random.default_rng(0)
    values = np.where(edges, random.normal(size=edges.shape), 0).astype(np.float32)
    scores = make_edge_scores(model.config, values, "2 pairs", {"method": "eap", "ablation": "zero"})
    ends = random.normal(size=(2, 2)), random.normal(size=(2, 2)), np.ones(2), np.zeros(2)
    grades = CircuitGrades("eap", "edges", 479, (2, 96), *ends, "zero", "logit_difference")

    def record(answer):
        return lambda model, pairs, *given, **settings: asked.append((given, settings)) or answer

    monkeypatch.setattr("jclt.circuits.score_edges", record(scores))
    monkeypatch.setattr("jclt.evaluation.grade_edges", record([grades]))
    options = ["--count", "2", "--grade", "--size", "96", "2", "--ablation", "zero"]
    assert main([*TASK, "--edges", *options, "--json", str(path), "--out", str(graph)]) == 0
    (scored, settings), (graded, _) = asked
    assert scored == ("eap ig inputs",) and settings == {"metric": "logit_difference", "ablation": "zero"}
    assert graded == ([scores], [2, 96])
    printed = capsys.readouterr().out
    assert printed.startswith(f"{scores.summarize()}\ngraded on others: <PromptPairs: 2 pairs")
    assert printed.endswith(f"\n{grades}\nwritten: {path}\nwritten: {graph}\n")
    loaded, kept = load_circuit(model, path)
    np.testing.assert_array_equal(loaded.values, values)
    np.testing.assert_array_equal(kept, prune_edges(model.config, scores.take_best(96)))
    assert read_json(path)["grades"][0]["faithfulness"]["96"]["value"] == grades.faithfulness[1].value
    assert np.count_nonzero(jclt.load_graph(graph).adjacency) > 10


def test_a_circuit_that_is_read_is_graded(capsys, tmp_path, monkeypatch):
    """As it stands in the file, with its ablation and metric, unless others are given; or its best edges by --size."""
    path, again = tmp_path / "circuit.json", tmp_path / "again.json"
    model = jclt.load_model("demo")
    edges, random = list_edges(model.config), np.random.default_rng(0)
    values = np.where(edges, random.normal(size=edges.shape), 0)
    scores = make_edge_scores(model.config, values, "some", {"method": "eap", "metric": "difference"})
    kept = prune_edges(model.config, edges & (random.random(edges.shape) < 0.8))
    save_circuit(path, scores, kept)
    assert (
        main([*TASK, "--count", "2", "--read", str(path), "--ablation", "zero", "--grade", "--json", str(again)]) == 0
    )
    graded = jclt.make_world_pairs(model, "agreement", 2, "report")
    masks = np.stack([kept, edges & ~kept, edges, np.zeros_like(edges)])
    inside, rest, whole, none = run_edge_circuits(model, graded, masks, ablation="zero", metric="difference")
    printed, content = capsys.readouterr().out, read_json(again)
    assert f"circuit of {kept.sum()} of 479 edges\ngraded on others: {graded!r}" in printed
    ours, drawn = content["grades"]
    assert (ours["name"], drawn["name"], ours["ablation"], ours["metric"]) == (
        "circuit",
        "random",
        "zero",
        "difference",
    )
    for row, name in ((inside, "faithfulness"), (rest, "completeness")):
        want = (row - none).sum() / (whole - none).sum()
        assert ours[name][str(kept.sum())]["value"] == pytest.approx(want, abs=1e-6)
    loaded, circuit = load_circuit(model, again)
    np.testing.assert_array_equal(circuit, kept)
    np.testing.assert_allclose(loaded.values, values, rtol=1e-14)
    assert (loaded.method, loaded.metric, loaded.ablation) == ("eap", "difference", "unknown")  # as in the file
    asked = []
    monkeypatch.setattr("jclt.evaluation.grade_edges", lambda *given, **settings: asked.append((given, settings)) or [])
    assert main([*TASK, "--count", "2", "--read", str(again), "--metric", "kl", "--grade", "--size", "9", "3"]) == 0
    (((_, _, (by,), sizes), settings),) = asked
    np.testing.assert_array_equal(by.values, loaded.values)
    assert (by.metric, sizes, settings["ablation"]) == ("kl", [3, 9], "counterfactual")  # the file does not say
    save_circuit(path, replace(scores, per_pair=0 * scores.per_pair), kept)
    assert main([*TASK, "--read", str(path), "--size", "9"]) == 2
    assert capsys.readouterr().err.endswith("has no scores, expected some, or a circuit and no --size\n")


@pytest.mark.exhaustive  # by default ACDC is tested by itself, and the page of circuits runs it
def test_a_search_begins_within_the_best_edges(capsys, tmp_path):
    path = tmp_path / "circuit.json"
    options = [
        "--method",
        "acdc",
        "--threshold",
        "0.05",
        "--within",
        "60",
        "--count",
        "4",
        "--grade",
        "--json",
        str(path),
    ]
    assert main([*TASK, "--edges", *options]) == 0
    printed = capsys.readouterr().out
    model = jclt.load_model("demo")
    scores, kept = load_circuit(model, path)
    assert printed.startswith(f"<EdgeCircuit: {kept.sum()} of 479 edges> after ") and 20 < kept.sum() < 60
    np.testing.assert_array_equal(scores.values, kept)
    first, beside, random = read_json(path)["grades"]
    faithful = [row["faithfulness"][str(kept.sum())]["value"] for row in (first, beside, random)]
    assert faithful[0] > faithful[1] > faithful[2]
    assert main([*TASK, "--edges", *options[:2], "--threshold", "99"]) == 2
    assert capsys.readouterr().err.endswith("no edge is left at --threshold 99.0, expected a smaller one\n")


@pytest.mark.exhaustive  # by default the pairs are the task's
def test_every_second_pair_of_a_file_grades(capsys, tmp_path):
    """Of prompts of one length, and with features of a coder as nodes."""
    model, path = jclt.load_model("demo"), tmp_path / "pairs.jsonl"
    pairs = jclt.make_world_pairs(model, "agreement", 5)
    columns = zip(pairs.clean, pairs.corrupted, pairs.answers, pairs.wrong_answers, strict=True)
    names = "clean", "corrupted", "answer", "wrong_answer"
    rows = [
        {name: [int(x) for x in np.ravel(np.array(ids))] for name, ids in zip(names, row, strict=True)}
        for row in columns
    ]
    rows[4] = {key: value[1:] if key in ("clean", "corrupted") else value for key, value in rows[4].items()}
    path.write_text("\n".join(map(json.dumps, rows)))
    assert main(["circuit", "demo", "--pairs", str(path), "--coder", "demo", "--grade", "--ablation", "zero"]) == 0
    printed = capsys.readouterr().out
    config = jclt.load_coder("demo", model=model).config
    nodes = 7 * len(config.covered) * (config.features + 1)  # at each position and layer, with an error
    assert printed.startswith(
        f"of prompts of 7 tokens, as nodes are at positions\n<NodeScores: relp of {nodes:,} nodes (clt)"
    )
    assert "over 2 pairs>" in printed and "zero ablation" in printed and "2 pairs\n" in printed
    path.write_text(json.dumps(rows[0]))
    assert main(["circuit", "demo", "--pairs", str(path), "--grade"]) == 2
    assert "1 pair is left, expected at least 2 with --grade" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["circuit", "demo", "--task", "agrement"],
            "circuit: --task 'agrement': does not exist, expected one of: acronym",
        ),
        (["circuit", "demo", "--pairs", "{}/none"], "{}/none: not found, expected a file of pairs of prompts"),
        ([*TASK, "--nodes", "neuron"], "circuit: --nodes 'neuron': does not exist, expected one of: embeddings"),
        ([*TASK, "--method", "eap"], "circuit: --method 'eap': does not exist, expected one of: atp, relp"),
        ([*TASK, "--edges", "--method", "atp"], "circuit: --method 'atp': does not exist, expected one of: eap, relp"),
        ([*TASK, "--metric", "kl"], "circuit: --metric 'kl': does not exist, expected one of: logit_difference"),
        ([*TASK, "--ablation", "noise"], "circuit: --ablation 'noise': does not exist, expected one of: zero, mean"),
        ([*TASK, "--edges", "--within", "9"], "circuit: --within is for --edges --method acdc"),
        ([*TASK, "--edges", "--method", "acdc"], "circuit: --method acdc needs --threshold T above 0, such as 0.05"),
        (
            [*TASK, "--edges", "--method", "acdc", "--threshold", "1", "--size", "9"],
            "circuit: --size with --method acdc, whose circuit has one size",
        ),
        ([*TASK, "--out", "x.npz"], "circuit: --out is the graph of edges, expected --edges or --read FILE"),
        ([*TASK, "--read", "{}/none"], "{}/none: not found, expected a circuit file, JSON with cfg, nodes and edges"),
        ([*TASK, "--read", "{}/none", "--method", "eap"], "circuit: --method with --read, whose file has the scores"),
        ([*TASK, "--json", "{}"], "{}: is a folder, expected a file"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_loaded(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jclt.models.load_model", lambda name, **_: pytest.fail("a model is loaded"))
    assert main([part.replace("{}", str(tmp_path)) for part in arguments]) == 2
    output = capsys.readouterr().err
    assert output.startswith(f"jclt: {says.replace('{}', str(tmp_path))}") and output.count("\n") == 1
