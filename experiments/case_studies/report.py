"""The table of a case study, its verdicts and its files."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from common import Code, Outcome, Outcomes, Swap, load

import jclt
from jclt import UserError
from jclt.graphs import Graph, describe, strongest_paths, with_supernodes
from jclt.viewer.picture import draw_graph
from jclt.world import Example

mpl.use("Agg")
SEEDS, PROMPTS = (0, 1, 2), 24


class Claim(NamedTuple):
    """What must hold in every seed: ours is at least `least`; the control at most `most`, and at most ours divided by
    `ratio`."""

    name: str  # as in the outcomes
    paper: str
    least: float
    most: float = 1.0
    ratio: float = 0.0


class Study(NamedTuple):
    name: str
    claims: Sequence[Claim]
    measure: Callable[[int, int], Outcomes]  # of a seed and a number of prompts
    show: Callable[[], Graph]  # the pruned graph of one prompt
    write_details: Callable[[Path], str] | None = None  # further figures: pictures in a folder, and a table


def bootstrap(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """The interval that holds 95% of the means of prompts drawn again."""
    outcomes, random = np.asarray(values), np.random.default_rng(0)
    means = outcomes[random.integers(len(outcomes), size=(draws, len(outcomes)))].mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def judge(claim: Claim, seeds: Sequence[Sequence[Outcome]]) -> dict[str, Any]:
    means = [np.mean(np.asarray(outcomes), axis=0).tolist() for outcomes in seeds]
    pooled = [outcome for outcomes in seeds for outcome in outcomes]
    ours, control = ([outcome[side] for outcome in pooled] for side in (0, 1))
    return {
        **{"claim": claim.name, "paper": claim.paper, "prompts": len(pooled)},
        **{"ours": float(np.mean(ours)), "interval": bootstrap(ours), "seeds": [mean[0] for mean in means]},
        **{"control": float(np.mean(control)), "control_interval": bootstrap(control)},
        **{"bar": write_bar(claim)},
        "holds": all(a >= claim.least and b <= claim.most and a >= claim.ratio * b for a, b in means),
    }


def write_bar(claim: Claim) -> str:
    control = f"{claim.most:.0%}"
    if claim.ratio:
        control = "ours" if claim.ratio == 1 else f"ours / {claim.ratio:g}"
    return f">= {100 * claim.least:g}%, control <= {control}"


HEAD = "| study | claim; control | paper | ours (95% interval) | by seed | control | bar | verdict |"


def write_row(study: str, row: dict[str, Any]) -> str:
    ours, control = (
        f"{row[name]:.0%} ({row[interval][0]:.0%} to {row[interval][1]:.0%})".replace("-0%", "0%")
        for name, interval in (("ours", "interval"), ("control", "control_interval"))
    )
    seeds = ", ".join(f"{mean:.0%}" for mean in row["seeds"])
    verdict = "holds" if row["holds"] else "does not hold"
    cells = (study, row["claim"], row["paper"] or "–", ours, seeds, control, row["bar"], verdict)
    return f"| {' | '.join(cells)} |"


def write_head(*more: str) -> str:
    """The first two lines of the table."""
    head = HEAD + "".join(f" {name} |" for name in more)
    return head + "\n" + "|---" * (head.count("|") - 1) + "|"


def run_study(study: Study, prompts: int = PROMPTS, seeds: Sequence[int] = SEEDS) -> list[dict[str, Any]]:
    found = [study.measure(seed, prompts) for seed in seeds]
    return [judge(claim, [outcomes[claim.name] for outcomes in found]) for claim in study.claims]


def write_files(study: Study, rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """The figures as numbers and as a picture, and the graph as a page, as data and as a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "verdicts.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw_verdicts(study.name, rows, folder / "verdicts.png")
    graph = study.show()
    paths = [describe(graph, path) for path in strongest_paths(graph, 5)]
    (folder / "paths.txt").write_text("\n".join(paths) + "\n")
    jclt.export_json(graph, folder / "graph.json")
    jclt.export_html(graph, folder / "graph.html")
    if study.write_details is not None:
        (folder / "figures.txt").write_text(study.write_details(folder) + "\n")
    draw_graph(graph, folder / "graph.png", title=study.name)


def draw_verdicts(name: str, rows: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.5 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        kinds = (("ours", "interval", "#2a6fb0", -0.18), ("control", "control_interval", "#a3a3a3", 0.18))
        for kind, interval, color, offset in kinds:
            axes.barh(place + offset, row[kind], 0.34, color=color, label=kind if place == 0 else None)
            axes.plot(row[interval], [place + offset] * 2, color="#2b2b2b", linewidth=1)
    axes.set_yticks(range(len(rows)), [row["claim"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_title(name)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)
    plt.close(figure)


def show_swaps(swaps: Sequence[Swap], example: Example) -> Graph:
    """The pruned graph of an example, with the features of each concept as a supernode."""
    return show_codes(example, {swap.name: swap.codes for swap in swaps})


def show_codes(example: Example, codes: Mapping[str, Sequence[Code]]) -> Graph:
    model, coder = load()
    graph = jclt.attribute(model, coder, example.prompt).prune()
    groups: dict[str, list[int]] = {}
    places, taken = graph.features.tolist(), set[int]()
    for name, of_name in codes.items():
        cells = {(layer, code.place(example), feature) for code in of_name for layer, feature in code.features}
        nodes = [i for i, place in enumerate(places) if tuple(place) in cells and i not in taken]
        taken |= set(nodes)
        if nodes:
            groups[f"{name} = {of_name[0].read(example)}"] = nodes
    return with_supernodes(graph, groups)


def main(study: Study) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="of each seed")
    parser.add_argument("--out", type=Path, default=Path("runs/case_studies") / study.name)
    options = parser.parse_args()
    start = time.perf_counter()
    try:
        rows = run_study(study, options.prompts)
        print(write_head(), *(write_row(study.name, row) for row in rows), sep="\n")
        write_files(study, rows, options.out)
        if study.write_details is not None:
            print((options.out / "figures.txt").read_text())
    except UserError as reason:
        sys.exit(str(reason))
    print(f"{time.perf_counter() - start:.0f} seconds; figures and the graph are in {options.out}")
