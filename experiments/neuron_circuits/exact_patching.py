"""Do gradients say what patching finds? Correlations of node scores with the exact effects, by kind of node and task.

    python experiments/neuron_circuits/exact_patching.py                    # the shipped model, four tasks
    python experiments/neuron_circuits/exact_patching.py --tasks ioi --pairs 40

For each (layer, position), and head, the exact effect is the change of the metric when that node alone takes its value
of the corrupted run. Correlated are means over pairs: Pearson's / Spearman's, the latter over nodes that differ between
the runs. Expected: RelP at least 0.8 and above AtP, integrated gradients of activations at least 0.93; the table of
jclt/circuits/README.md says where that is so. Cost: four minutes on one CPU core.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--model", default="demo")
    options = parser.parse_args()
    model = jclt.load_model(options.model)
    print(f"{'':28}" + "".join(f"{name:>21}" for name in METHODS), flush=True)
    for task in options.tasks:
        pairs = jclt.make_world_pairs(model, task, options.pairs).keep_one_length()
        for kind in KINDS:
            exact = score_nodes(model, pairs, kind, "exact").values.ravel()
            cells = []
            for settings in METHODS.values():
                scores = score_nodes(model, pairs, kind, **settings).values.ravel()
                differs = (exact != 0) | (scores != 0)
                ranks = spearmanr(scores[differs], exact[differs])[0]
                cells.append(f"{pearsonr(scores[differs], exact[differs])[0]:.2f}/{ranks:.2f}")
            nodes = f"{np.count_nonzero(exact)} {kind}"
            print(f"{task:12}{nodes:>16}" + "".join(f"{cell:>21}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
