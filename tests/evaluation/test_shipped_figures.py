"""The figures of the shipped CLT on the page `jclt/evaluation/README.md`, for one prompt of each task, by the commands
that a user runs. Small cases of every measure are in the other files of this folder."""

import json
from pathlib import Path

import pytest

from jclt.cli.main import main

BARS = {
    "faithfulness": {
        "to outputs: rank correlation of influence and |logit change|": 0.9,
        "to features: rank correlation over pairs": 0.8,
    },
    "circuits": {
        "claims confirmed: nodes": 0.6,
        "claims confirmed: edges between features": 0.9,
        "claims confirmed: supernodes": 0.8,
        "sufficiency of the pruned graph (share of p kept)": 0.4,
    },
    "graphs": {"completeness": 0.9, "replacement score": 0.8, "completeness at 0.8": 0.8},
    "distances": {"upstream, 1 layer later: cosine": 0.85, "encoder, 3 layers later: error": 1},
}
"""What the lower end of each interval must reach."""
MEANS = {"graphs": {"all features / those kept at 0.8": 10}}
"""What a mean must reach: the paper's tenth of the nodes. With about 120 active features the interval begins at 8."""
pytestmark = pytest.mark.exhaustive  # one to three minutes each


@pytest.mark.parametrize("question", BARS)
def test_graphs_of_the_shipped_clt_reach_the_bars(question, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "demo", f"--{question}", "--count", "1", "--json", "figures.json"]) == 0
    figures = json.loads(Path("figures.json").read_text())[question]["demo"]
    for name, bar in BARS[question].items():
        assert figures[name]["low"] >= bar, (name, figures[name])
        if question in ("faithfulness", "circuits"):
            assert abs(figures[name]["control"]) < 0.4, (name, figures[name])
    for name, bar in MEANS.get(question, {}).items():
        assert figures[name]["value"] >= bar, (name, figures[name])
    assert "[95% interval]" in capsys.readouterr().out


def test_the_shipped_clt_is_rejected_after_layer_2_and_its_models_neurons_are_accepted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["verify", "demo", "--count", "3", "--json", "verdict.json"]) == 1
    verdict = json.loads(Path("verdict.json").read_text())
    assert verdict["failed"] == [2] and verdict["followed"]["0 concepts"]["value"] > 0.7
    assert main(["verify", "neurons", "--count", "1"]) == 0
    assert "accepted" in capsys.readouterr().out
