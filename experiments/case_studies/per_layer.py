"""The cross-layer transcoder (CLT) beside per-layer transcoders that were trained by the same recipe.

    python experiments/case_studies/per_layer.py

Prompts of all tasks. Each claim has the CLT's figure, and as its control that of the per-layer transcoders, or of as
many of the model's neurons as the CLT has active features, the others set to 0. The answer with all MLPs replaced
counts if it is the model's or a right one. Beside the claims, in figures.txt: the graphs of all three kinds in one
table, and what the replacement models do when the residual stream is changed between two layers (`jclt verify`).
Expected: see README.md. Cost: two minutes on two CPU cores, mostly to compile; in all.py graphs are made once.
"""

from pathlib import Path

import numpy as np
from beside import (
    CLT,
    COLORS,
    NAMES,
    PER_LAYER,
    draw_prompts,
    encode,
    load_named,
    make_first_graphs,
    make_graphs,
    show_first,
)
from common import Outcome, Outcomes, decode, load, pad_tokens
from report import Claim, Study, main

from jclt import run
from jclt.coders import CoderReplacement
from jclt.evaluation import verify
from jclt.evaluation.graph_figures import measure_path, summarize_graphs
from jclt.evaluation.intervals import tabulate
from jclt.evaluation.questions import THRESHOLDED
from jclt.evaluation.verdict import Verdict, find_pairs, tabulate_verdicts
from jclt.graphs import Graph

PAIRS = 4
"""Of prompts of each task, for the changes between layers."""

DIRECT = f"1 / edges of a path from embeddings; {NAMES[PER_LAYER]}"
"""How direct paths are: the fewer edges, the higher. The paper gives the mean number of edges of each kind of graph."""


def list_answered(name: str, seed: int, count: int) -> list[float]:
    """Of each prompt, whether the answer stays with a coder in place of every MLP."""
    model, _ = load()
    examples = draw_prompts(seed, count)
    tokens = pad_tokens(model, examples)
    replaced = run(model, tokens, edit=CoderReplacement(load_named(name)), unroll=True)[0]
    original, ends = run(model, tokens)[0], [len(ids) - 1 for ids in encode(examples)]
    answers = [[int(logits[row, end].argmax()) for row, end in enumerate(ends)] for logits in (replaced, original)]
    return [
        float(new == old or decode(new) in example.answers)
        for new, old, example in zip(*answers, examples, strict=True)
    ]


def measure(seed: int, count: int) -> Outcomes:
    graphs = {name: make_graphs(name, seed, count) for name in (CLT, PER_LAYER, THRESHOLDED)}
    scores = {name: [graph.scores for graph in graphs[name]] for name in graphs}
    answered = {name: list_answered(name, seed, count) for name in graphs}
    paths = [[measure_path(graph) for graph in graphs[name]] for name in (CLT, PER_LAYER)]
    outcomes = {DIRECT: [Outcome(1 / a, 1 / b) for a, b in zip(*paths, strict=True)]}
    for other in (PER_LAYER, THRESHOLDED):
        figures = {
            "replacement score": [[x.replacement for x in scores[name]] for name in (CLT, other)],
            "completeness": [[x.completeness for x in scores[name]] for name in (CLT, other)],
            "same answer, all MLPs replaced": [answered[name] for name in (CLT, other)],
        }
        for figure, sides in figures.items():
            outcomes[f"{figure}; {NAMES[other]}"] = [Outcome(*pair) for pair in zip(*sides, strict=True)]
    return outcomes


def write_details(folder: Path) -> str:
    """The graphs of all kinds in one table, and the verdicts, with a picture of these."""
    model, _ = load()
    table = tabulate("graphs, a prompt of each task", {x: summarize_graphs(make_first_graphs(x)) for x in NAMES})
    pairs = find_pairs(model, "world", PAIRS)
    verdicts = {name: verify(model, load_named(name), pairs) for name in (CLT, PER_LAYER)}
    draw_reactions(verdicts, folder / "reactions.png")
    said = [f"{name}: {verdict}" for name, verdict in verdicts.items()]
    return "\n".join([table, "", f"{len(pairs)} pairs of prompts", tabulate_verdicts(verdicts), *said])


def draw_reactions(verdicts: dict[str, Verdict], path: Path) -> None:
    """Of what the MLPs after a layer do when a concept is changed there: what the coder's later features do, what its
    earlier features have written, and the rest."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    keys = list(verdicts[CLT].one_hop)
    for offset, (name, verdict) in zip((-0.2, 0.2), verdicts.items(), strict=True):
        places = np.arange(len(keys)) + offset
        followed = np.array([verdict.followed[key].value for key in keys])
        axes.bar(places, followed, 0.36, color=COLORS[name], label=f"{NAMES[name]}: followed")
        if verdict.hopped:
            hops = [verdict.one_hop[key].value for key in keys]
            axes.bar(places, hops, 0.36, bottom=followed, color=COLORS[name], alpha=0.35, label="written in one hop")
    axes.set_xticks(range(len(keys)), [f"after layer {layer}" for layer, _ in keys])
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of the MLPs' reaction")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)
    plt.close(figure)


def show() -> Graph:
    return show_first("two_hop")


ANSWERS = "50% of uncertain tokens; per layer and neurons less, in a figure only"
STUDY = Study(
    "per_layer",
    (
        Claim(f"replacement score; {NAMES[PER_LAYER]}", "0.61; 0.37", 0.61, ratio=1),
        Claim(f"completeness; {NAMES[PER_LAYER]}", "0.80; 0.78", 0.8, ratio=1),
        Claim(DIRECT, "43%; 27% (2.3 edges; 3.7)", 0.43, ratio=1),
        Claim(f"same answer, all MLPs replaced; {NAMES[PER_LAYER]}", ANSWERS, 0.98, ratio=1),
        Claim(f"replacement score; {NAMES[THRESHOLDED]}", "far above neurons", 0.61, ratio=1),
        Claim(f"completeness; {NAMES[THRESHOLDED]}", "″", 0.8, ratio=1),
        Claim(f"same answer, all MLPs replaced; {NAMES[THRESHOLDED]}", ANSWERS, 0.98, ratio=1),
    ),
    measure,
    show,
    write_details,
)

if __name__ == "__main__":
    main(STUDY)
