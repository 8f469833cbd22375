"""Edges between neurons, with and without paths through the neurons in between: which of them hold a circuit together?

    python experiments/neuron_circuits/edges.py [--task agreement] [--model demo] [--pairs 24] [--neurons 400]

Candidates are the neurons with the largest scores by RelP, and at each prompt all edges into them from embeddings and
from each other, and to the output. An edge's weight is its share of its target, times what the target contributes to
the output along all paths; of the prompts the mean of its size. Of the strongest share of the edges a circuit has the
neurons into which one leads, as the paper's code has it; and, beside it, those alone that lie on a way of such edges
from an embedding to the output. All other neurons have their mean over the corrupted prompts by position. Pairs of the
small world choose from the split `train` and grade on `report`; of a file one half each. Expected is in README.md.
"""

import argparse

import numpy as np

import jclt
from jclt.circuits import run_circuits, score_nodes
from jclt.circuits.neuron_edges import NeuronEdges, trace_neurons
from jclt.evaluation.circuit_grades import compute_faithfulness
from jclt.models import Model

SHARES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def weigh_edges(found: NeuronEdges, attributions: np.ndarray) -> np.ndarray:
    """Edges `[t, s]` as parts of the output; `attributions` are those of the neurons along all paths."""
    return np.abs(found.relative * np.append(attributions, found.values[-1])[:, None])


def find_connected(kept: np.ndarray) -> np.ndarray:
    """The neurons on a way of kept edges `[t, s]` from an embedding to the output."""
    count = len(kept) - 1
    alive = np.ones(count, bool)
    while True:
        live = np.append(alive, np.ones(kept.shape[1] - count, bool))
        fed = (kept[:-1] & live).any(axis=1)
        leads_on = (kept[:, :count] & np.append(alive, True)[:, None]).any(axis=0)
        left = alive & fed & leads_on
        if (left == alive).all():
            return alive
        alive = left


def find_fed(kept: np.ndarray) -> np.ndarray:
    """The neurons into which an edge is kept."""
    return np.any(kept[:-1], axis=1)


def draw_pairs(model: Model, options: argparse.Namespace) -> list[jclt.PromptPairs]:
    """Pairs that choose and pairs that grade, all of one length."""
    if options.data:
        pairs = jclt.load_pairs(model, options.data).keep_one_length()
        both = [pairs.take(range(start, len(pairs), 2)) for start in (0, 1)]
    else:
        both = [jclt.make_world_pairs(model, options.task, 4 * options.pairs, split) for split in ("train", "report")]
        both = [both[0].keep_one_length(both[1]), both[1].keep_one_length(both[0])]
    return [pairs.take(range(min(options.pairs, len(pairs)))) for pairs in both]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo")
    parser.add_argument("--task", default="agreement", help="of the small world")
    parser.add_argument("--data", help="pairs from a file instead")
    parser.add_argument("--pairs", type=int, default=24, help="of one length, that choose, and that grade")
    parser.add_argument("--neurons", type=int, default=400, help="candidates, by their scores")
    options = parser.parse_args()
    model = jclt.load_model(options.model)
    chosen, graded = draw_pairs(model, options)
    scores = score_nodes(model, chosen, "neurons", "relp", rules="neuron circuits")
    shape, best = scores.values.shape, scores.rank_nodes()[: options.neurons]
    neurons = np.stack(np.unravel_index(np.sort(best), shape), axis=1)
    print(f"{len(chosen)} pairs choose, {len(graded)} grade; {len(neurons)} of {scores.values.size:,} neurons")
    circuits = [np.ones(shape, bool), np.zeros(shape, bool)]
    candidates = np.zeros(shape, bool)
    candidates[tuple(neurons.T)] = True
    circuits.append(candidates)
    rows: list[tuple[str, float, int]] = []
    random = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {}
    for ids, right, wrong in zip(chosen.clean, chosen.answers, chosen.wrong_answers, strict=True):
        direct, every = (trace_neurons(model, ids, neurons, right, wrong, direct=direct) for direct in (True, False))
        attributions = every.edges[-1, : len(neurons)]
        for name, found in (("direct", direct), ("all paths", every)):
            weights[name] = weights.get(name, 0) + weigh_edges(found, attributions)
    weights["random"] = np.zeros_like(weights["direct"])
    edges = weights["direct"] > 0
    weights["random"][edges] = random.permutation(weights["direct"][edges])
    for name, sizes in weights.items():
        order, total = np.argsort(-sizes, axis=None), int(np.count_nonzero(sizes))
        print(f"{name}: {total:,} edges")
        for share in SHARES:
            kept = np.zeros(sizes.size, bool)
            kept[order[: max(round(share * total), 1)]] = True
            for find in (find_fed, find_connected):
                found = find(kept.reshape(sizes.shape))
                circuits.append(np.zeros(shape, bool))
                circuits[-1][tuple(neurons[found].T)] = True
                rows.append((name, share, int(found.sum())))
    values = run_circuits(model, graded, "neurons", np.stack(circuits), ablation="mean", mean_of=chosen)
    print(f"m(all) {values[0].mean():.2f}, m(none) {values[1].mean():.2f}; all candidates: faithfulness "
          f"{compute_faithfulness(values[2], values[0], values[1])}")  # fmt: skip
    cells = [
        f"{count:4} neurons {compute_faithfulness(row, values[0], values[1])}"
        for (_, _, count), row in zip(rows, values[3:], strict=True)
    ]
    print("edges kept: the neurons into which one leads, and those on a way to the output, with their faithfulness")
    for (name, share, _), fed, connected in zip(rows[::2], cells[::2], cells[1::2], strict=True):
        print(f"{name:10} {share:6.1%}: {fed}; {connected}")


if __name__ == "__main__":
    main()
