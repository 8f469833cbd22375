"""Circuits of every task of the small world: how many neurons, and how many edges, do 90% of what the model does?

    python experiments/neuron_circuits/tasks.py
    python experiments/neuron_circuits/tasks.py --tasks induction --reference zero
    python experiments/neuron_circuits/tasks.py --tasks induction --layers    # which layers' neurons it takes

Of each task pairs of one length: of the split `train` they choose, of `report` they grade. Neurons are chosen by RelP,
and all others have their mean over corrupted prompts by position; edges are chosen by EAP with integrated gradients,
and along all others goes what the corrupted prompt writes. Beside them are random circuits of the same size. The metric
is the logit difference; of greater-than, whose answers are many years, the difference of the probabilities of right and
wrong years. Expected: the table of jclt/circuits/README.md.
Cost: 48 seconds on two idle CPU cores, 87 of processor time.
"""

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np

import jclt
from jclt.circuits import run_circuits, score_edges, score_nodes
from jclt.circuits.node_scores import Reference
from jclt.evaluation import CircuitGrades, grade_edges, grade_nodes
from jclt.evaluation.circuit_grades import compute_faithfulness
from jclt.models import Model
from jclt.world import TASKS

NEURONS = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
EDGES = (5, 10, 20, 40, 80, 160, 320)
ENOUGH = 0.9


def draw_pairs(model: Model, task: str, count: int) -> list[jclt.PromptPairs]:
    """Pairs that choose and pairs that grade, of one length."""
    chosen, graded = (jclt.make_world_pairs(model, task, 4 * count, split) for split in ("train", "report"))
    both = chosen.keep_one_length(graded), graded.keep_one_length(chosen)
    return [pairs.take(range(min(count, len(pairs)))) for pairs in both]


def find_metric(task: str) -> Literal["difference", "logit_difference"]:
    return "difference" if task == "greater_than" else "logit_difference"


def write_cell(grades: Sequence[CircuitGrades]) -> str:
    """The smallest circuit that does enough: its size, its grades, and the faithfulness of a random one."""
    ours, random = grades
    size = ours.find_size(ENOUGH)
    if size is None:
        return f"more than {ours.sizes[-1]:,} of {ours.total:,}"
    at = ours.sizes.index(size)
    faith, rest = ours.faithfulness[at], ours.completeness[at]
    interval = f"{faith.value:.2f} [{faith.low:.2f}, {faith.high:.2f}]/{rest.value:.2f}"
    return f"{size:,} of {ours.total:,}: {interval}; {random.faithfulness[at].value:.2f}"


def write_row(model: Model, task: str, count: int, reference: Reference) -> str:
    chosen, graded = draw_pairs(model, task, count)
    metric = find_metric(task)
    scores = score_nodes(model, chosen, "neurons", "relp", metric=metric, reference=reference)
    sizes = [size for size in NEURONS if size < scores.values.size]
    neurons = grade_nodes(model, graded, scores, sizes, mean_of=chosen, draws=1)
    edges = grade_edges(model, graded, score_edges(model, chosen, "eap ig inputs", metric=metric), EDGES, draws=1)
    ends = f"{neurons[0].whole.mean():.2f}, {neurons[0].empty.mean():.2f}"
    cells = (task, f"{len(graded)}, {len(graded.clean[0])}", ends, write_cell(neurons), write_cell(edges))
    return f"| {' | '.join(cells)} |"


def print_layers(model: Model, task: str, count: int) -> None:
    """How many neurons have a score; what the model does without the neurons of a layer, and with these alone."""
    chosen, graded = draw_pairs(model, task, count)
    config, scores = model.config, score_nodes(model, chosen, "neurons", "relp", metric=find_metric(task)).values
    every = np.ones((config.layers, len(graded.clean[0]), config.mlp_width), bool)
    without = np.stack([every] * config.layers)
    without[range(config.layers), range(config.layers)] = False
    masks = np.concatenate([every[None], ~every[None], without, ~without])
    values = run_circuits(model, graded, "neurons", masks, mean_of=chosen, metric=find_metric(task))
    faith = [f"{compute_faithfulness(row, *values[:2]).value:.2f}" for row in values[2:]]
    names = f"without each layer's neurons {', '.join(faith[: config.layers])}"
    print(f"{task}: {np.count_nonzero(scores):,} neurons of {scores.size:,} have a score")
    print(f"{names}; with each one's alone {', '.join(faith[config.layers :])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--pairs", type=int, default=24, help="that choose, and that grade")
    parser.add_argument(
        "--reference", default="corrupted", choices=("corrupted", "zero"), help="of the neurons' scores"
    )
    parser.add_argument(
        "--layers", action="store_true", help="only faithfulness without, and with, one layer's neurons"
    )
    options = parser.parse_args()
    start, model = time.perf_counter(), jclt.load_model("demo")
    if options.layers:
        for task in options.tasks:
            print_layers(model, task, options.pairs)
        return
    print(f"size for {ENOUGH:.0%}: faithfulness [95%]/completeness; faithfulness of random ones of that size")
    print("| task | pairs, tokens | m(all), m(none) | neurons | edges |\n|---|---|---|---|---|")
    with ThreadPoolExecutor(2) as pool:  # nearly all of the time goes into compiling, for each length of prompts anew
        for row in pool.map(lambda task: write_row(model, task, options.pairs, options.reference), options.tasks):
            print(row, flush=True)
    print(f"{time.perf_counter() - start:.0f} s, {time.process_time():.0f} s of processor time")


if __name__ == "__main__":
    main()
