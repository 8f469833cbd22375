"""Edges between features of the shipped coder, as in sparse feature circuits (2403.19647): how few of them hold?

    python experiments/neuron_circuits/feature_edges.py [--task agreement] [--pairs 24] [--nodes 200]

Candidates are the nodes of the coder, features and errors, with the largest scores by attribution patching, and all
edges between them and to the metric. Of the edges that are largest, averaged over pairs, a circuit has the nodes
from which a way of such edges leads to the metric. All other features and errors have their mean over the corrupted
prompts by position. Random circuits have as many of these edges. Pairs of the split `train` choose, those of `report`
grade. Expected is in jclt/circuits/README.md. Cost: half a minute on one CPU core.
"""

import argparse

import numpy as np

import jclt
from jclt.circuits import run_circuits, score_feature_edges, score_nodes
from jclt.circuits.nodes import locate_nodes
from jclt.evaluation.circuit_grades import compute_faithfulness

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
DRAWS = 3


def find_leading(kept: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The nodes from which a way of kept edges `[t, s]` leads to the metric, the last target. `targets` are the numbers
    of the others among the nodes."""
    alive = kept[-1].copy()
    while True:
        more = alive | np.any(kept[:-1] & alive[targets][:, None], axis=0)
        if (more == alive).all():
            return alive
        alive = more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="agreement", help="of the small world")
    parser.add_argument("--pairs", type=int, default=24, help="of one length, that choose, and that grade")
    parser.add_argument("--nodes", type=int, default=200, help="candidates, by their scores")
    options = parser.parse_args()
    model = jclt.load_model("demo")
    coder = jclt.load_coder("demo", model=model)
    both = [jclt.make_world_pairs(model, options.task, 4 * options.pairs, split) for split in ("train", "report")]
    both = [both[0].keep_one_length(both[1]), both[1].keep_one_length(both[0])]
    chosen, graded = (pairs.take(range(min(options.pairs, len(pairs)))) for pairs in both)
    scores = score_nodes(model, chosen, coder, "atp")
    shape = scores.values.shape
    nodes = locate_nodes(shape, np.sort(scores.rank_nodes()[: options.nodes]))
    targets = np.flatnonzero(nodes[:, 2] < shape[2] - 1)  # the last unit is the error
    found = score_feature_edges(model, coder, chosen, nodes[targets])
    sizes = np.abs(found.edges[:, *nodes.T])  # [t, s]
    weights, random = {"edges": sizes}, np.random.default_rng(0)
    for draw in range(DRAWS):
        weights[f"random {draw}"] = np.zeros_like(sizes)
        weights[f"random {draw}"][sizes > 0] = random.permutation(sizes[sizes > 0])
    total = int(np.count_nonzero(sizes))
    counts = [max(round(share * total), 1) for share in SHARES]
    circuits, numbers = [np.ones(shape, bool), np.zeros(shape, bool)], []
    for of_edges in weights.values():
        order = np.argsort(-of_edges, axis=None)
        for count in counts:
            kept = np.zeros(sizes.size, bool)
            kept[order[:count]] = True
            leading = find_leading(kept.reshape(sizes.shape), targets)
            circuits.append(np.zeros(shape, bool))
            circuits[-1][tuple(nodes[leading].T)] = True
            numbers.append(int(leading.sum()))
    values = run_circuits(model, graded, coder, np.stack(circuits), ablation="mean", mean_of=chosen)
    print(f"{len(chosen)} pairs choose, {len(graded)} grade; {len(nodes)} of {scores.values.size:,} nodes, "
          f"{total:,} edges; m(all) {values[0].mean():.2f}, m(none) {values[1].mean():.2f}")  # fmt: skip
    circuit, *drawn = np.split(values[2:], len(weights))
    for i, (share, count) in enumerate(zip(SHARES, counts, strict=True)):
        ours, others = (compute_faithfulness(row, *values[:2]) for row in (circuit[i], np.mean(drawn, axis=0)[i]))
        of_random = np.mean([numbers[(draw + 1) * len(counts) + i] for draw in range(DRAWS)])
        print(f"{share:6.1%}: {count:6,} edges, {numbers[i]:4} nodes {ours}; random {of_random:4.0f} nodes {others}")


if __name__ == "__main__":
    main()
