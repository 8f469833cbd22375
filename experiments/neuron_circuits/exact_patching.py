"""Do gradients say what patching finds? Correlations of node scores with the exact effects, by kind of node and task.

    python experiments/neuron_circuits/exact_patching.py                    # the shipped model, four tasks
    python experiments/neuron_circuits/exact_patching.py --tasks ioi --pairs 40

For each (layer, position), and head, the exact effect is the change of the logit difference when that node alone takes
its value of the corrupted run. (Probabilities are near 1, where gradients say less.) Correlated are means over pairs of
one length, over nodes that have an effect: Pearson's / Spearman's / Spearman's over those with a large one, of at least
1% of the largest one of their task and kind. Then, how far scores are off, as a share of the effect: the median over
the large effects of all tasks and kinds, and over the small ones.

Expected: RelP at least 0.8 in ranks of large effects, but for the MLPs of greater-than, and integrated gradients of
activations at least 0.93; the table of jclt/circuits/README.md. Cost: four minutes of processor time.
"""

import argparse

import numpy as np
from scipy.stats import pearsonr, spearmanr

import jclt
from jclt.circuits import score_nodes

METHODS: dict[str, dict] = {
    "atp": {"method": "atp"},
    "relp": {"method": "relp"},
    "relp with attention": {"method": "relp", "rules": "relp with attention"},
    "gim": {"method": "gim"},
    "ig inputs": {"method": "ig inputs"},
    "ig activations": {"method": "ig activations"},
}
KINDS = ("streams", "heads", "mlps")
TASKS = ("agreement", "ioi", "two_hop", "greater_than")


LARGE = 0.01
"""Of the largest effect of a task and kind."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--steps", type=int, default=5, help="points of integrated gradients")
    parser.add_argument("--split", default="report", choices=("choose", "report"))
    parser.add_argument("--model", default="demo")
    options = parser.parse_args()
    model = jclt.load_model(options.model)
    print(f"{'':28}" + "".join(f"{name:>21}" for name in METHODS), flush=True)
    is_large: list[np.ndarray] = []
    errors: dict[str, list[np.ndarray]] = {name: [] for name in METHODS}
    for task in options.tasks:
        pairs = jclt.make_world_pairs(model, task, 4 * options.pairs, options.split).keep_one_length()
        pairs = pairs.take(range(min(options.pairs, len(pairs))))
        for kind in KINDS:
            exact = score_nodes(model, pairs, kind, "exact").values.ravel()
            has_effect, cells = exact != 0, []
            is_large.append(np.abs(exact[has_effect]) >= LARGE * np.abs(exact).max())
            for name, settings in METHODS.items():
                scores = score_nodes(model, pairs, kind, steps=options.steps, **settings).values.ravel()
                both = scores[has_effect], exact[has_effect]
                errors[name].append(np.abs(both[0] / both[1] - 1))
                large = is_large[-1]
                of_large = spearmanr(both[0][large], both[1][large])[0]
                cells.append(f"{pearsonr(*both)[0]:.2f}/{spearmanr(*both)[0]:.2f}/{of_large:.2f}")
            nodes = f"{np.count_nonzero(exact)} {kind}"
            print(f"{task:12}{nodes:>16}" + "".join(f"{cell:>21}" for cell in cells), flush=True)
    are_large = np.concatenate(is_large)
    for name, chosen in (("at least", are_large), ("below", ~are_large)):
        medians = (np.median(np.concatenate(rows)[chosen]) for rows in errors.values())
        title = f"off, {name} {LARGE:.0%}: {chosen.sum()}"
        print(f"{title:28}" + "".join(f"{median:21.0%}" for median in medians))


if __name__ == "__main__":
    main()
