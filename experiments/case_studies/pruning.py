"""Pruning: how few features and edges keep most of the explanation?

    python experiments/case_studies/pruning.py

Prompts of all tasks, pruned to the nodes with 75% of the influence and the edges with 98%: here a tenth of the features
then keeps the 80% of completeness that it keeps in the paper. What is removed counts as error. Controls keep other
nodes or edges of the same graph: as many features, drawn at random; or the fewest features by activation, or edges by
size, that explain as much as the pruned graph does. Beside the claims, the curves of the three kinds of nodes.
Expected: see README.md. Cost: two minutes on two CPU cores, mostly to compile; in all.py graphs are made once.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from beside import CLT, COLORS, NAMES, make_first_graphs, make_graphs, show_first
from common import Outcome, Outcomes
from report import Claim, Study, main

from jclt.graphs import Graph, curve
from jclt.graphs.adjacency import count_edges

PAPER = ((0.95, 236, 0.87), (0.9, 137, 0.83), (0.8, 55, 0.70), (0.7, 27, 0.58))
"""Threshold, nodes and completeness of one prompt in the paper, an acronym."""
NODES = 0.75
"""The share of the influence that the nodes kept have. Chosen on `choose`, where 0.8 leaves out 90 to 91% of the
features, and 0.75 leaves out 92 to 93%."""
THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.5)


def keep_features(graph: Graph, features: np.ndarray) -> Graph:
    """The graph with these features alone, and all that is no feature."""
    nodes = ~graph.nodes.is_kind("feature")
    nodes[features] = True
    return graph.keep(nodes)


def find_fewest(enough: Callable[[int], bool], most: int) -> int:
    """The least number that is enough, where more is never less."""
    least = 0
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if enough(middle) else (middle + 1, most)
    return least


def count_by_activation(graph: Graph, completeness: float) -> int:
    order = np.argsort(-graph.activations, kind="stable")
    return find_fewest(lambda n: keep_features(graph, order[:n]).scores.completeness >= completeness, len(order))


def count_by_size(graph: Graph, completeness: float) -> int:
    """The largest edges, whatever their influence."""
    sizes = np.abs(graph.adjacency)
    largest = np.sort(sizes[sizes > 0])[::-1]
    every = np.ones(len(graph), bool)

    def is_enough(count: int) -> bool:
        return graph.keep(every, sizes >= largest[count - 1]).scores.completeness >= completeness if count else False

    return find_fewest(is_enough, len(largest))


def measure_prompt(graph: Graph, random: np.random.Generator) -> dict[str, Outcome]:
    pruned, whole = graph.prune(NODES), graph.scores.completeness
    features, edges = len(graph.features), count_edges(graph.adjacency)
    kept, kept_edges = len(pruned.features), count_edges(pruned.adjacency)
    drawn = keep_features(graph, random.permutation(features)[:kept]).scores.completeness
    reached = pruned.scores.completeness
    by_activation, by_size = count_by_activation(graph, reached), count_by_size(graph, reached)
    return {
        "completeness kept; as many random features": Outcome(reached / whole, drawn / whole),
        "features left out; by activation": Outcome(1 - kept / features, 1 - by_activation / features),
        "edges left out; by size": Outcome(1 - kept_edges / edges, 1 - by_size / edges),
    }


def measure(seed: int, count: int) -> Outcomes:
    random = np.random.default_rng(seed)
    found = [measure_prompt(graph, random) for graph in make_graphs(CLT, seed, count)]
    return {claim: [outcomes[claim] for outcomes in found] for claim in found[0]}


def write_details(folder: Path) -> str:
    """What is kept at each threshold, means over prompts, as a table and as a picture."""
    import matplotlib.pyplot as plt

    lines = [f"{'threshold':>9}  {'nodes of':26}{'features':>9}{'edges':>9}{'completeness':>13}{'replacement':>12}"]
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for name in NAMES:
        points = np.array([list_points(graph) for graph in make_first_graphs(name)]).mean(axis=0)
        lines += [
            f"{threshold:9.2f}  {NAMES[name]:26}{features:9.1f}{edges:9.0f}{completeness:13.2f}{replacement:12.2f}"
            for threshold, (features, edges, completeness, replacement) in zip((1, *THRESHOLDS), points, strict=True)
        ]
        for panel, column in zip(panels, (0, 1), strict=True):
            panel.plot(points[:, column], points[:, 2], "o-", ms=3, color=COLORS[name], label=NAMES[name])
    panels[0].plot([n for _, n, _ in PAPER], [c for *_, c in PAPER], "k^:", ms=4, label="paper, one prompt")
    for panel, what in zip(panels, ("features kept", "edges kept"), strict=True):
        panel.set(xscale="log", xlabel=what)
    panels[0].set_ylabel("completeness")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(folder / "curves.png")
    plt.close(figure)
    return "\n".join(lines)


def list_points(graph: Graph) -> list[tuple[float, ...]]:
    """Features, edges and scores of the whole graph and at each threshold."""
    whole = graph.scores
    points: list[tuple[float, ...]] = [
        (len(graph.features), count_edges(graph.adjacency), whole.completeness, whole.replacement)
    ]
    for point in curve(graph, THRESHOLDS):
        others = len(graph) - len(graph.features)
        points.append((point.nodes - others, point.edges, point.scores.completeness, point.scores.replacement))
    return points


def show() -> Graph:
    return show_first("acronym")


STUDY = Study(
    "pruning",
    (
        Claim("completeness kept; as many random features", "80%", 0.8, ratio=1.25),
        Claim("features left out; by activation", "about 90%: a tenth of the nodes", 0.9, ratio=1),
        Claim("edges left out; by size", "about 99.8%: a 500th of the edges", 0.96, ratio=1),
    ),
    measure,
    show,
    write_details,
)

if __name__ == "__main__":
    main(STUDY)
