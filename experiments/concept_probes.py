"""Where does the model itself hold the intermediate concepts that `intermediates.py` looks for in graphs?

    python experiments/concept_probes.py
    python experiments/concept_probes.py --tasks antonym successor

A linear probe reads a concept's value: from the token embedding where the concept can first be known, and from the
residual stream after each layer, there and at the end of the prompt (the best of these). For every tested prompt it is
trained on the same other prompts as features are selected on: they share neither what the concept follows from, nor the
answer, nor all else that the answer follows from. A concept that embeddings hold already is not the work of MLPs, and
graphs can say a digit no more exactly than the model holds it.
Expected: see README.md. Cost: half a minute on two CPU cores.
"""

import argparse
from collections.abc import Sequence

import numpy as np
from intermediates import NEAR, find_independent, intermediates, list_accepted

from jclt import Model, load_model, run
from jclt.world import TASKS, Example, Split
from jclt.world.measure import pad_prompts

TESTED, OTHERS = 100, 4000
RIDGE = 0.01
"""Times the number of prompts: what is added to the diagonal of the least-squares fit, whose inputs have variance 1."""


def read_streams(model: Model, examples: Sequence[Example], starts: np.ndarray) -> np.ndarray:
    """`[1 + 2 L, N, D]`: the embedding where the concept begins, and the streams after each layer, there and at the
    end."""
    tokens, ends = pad_prompts(model, [example.prompt for example in examples])
    found = []
    for numbers in np.array_split(np.arange(len(tokens)), -(-len(tokens) // 256)):
        seen = run(model, tokens[numbers], capture=("resid_pre", "resid_post"))[1]
        rows, places = np.arange(len(numbers)), (starts[numbers], ends[numbers])
        streams = [np.asarray(stream)[rows, place] for place in places for stream in seen["resid_post"]]
        found.append(np.stack([np.asarray(seen["resid_pre"][0])[rows, places[0]], *streams]))
    return np.concatenate(found, axis=1).astype(np.float64)


class Probe:
    """A linear classifier by ridge regression, fitted to all prompts but some that are left out each time."""

    def __init__(self, inputs: np.ndarray, labels: np.ndarray):
        self.values, numbers = np.unique(labels, return_inverse=True)
        self.mean, self.scale = inputs.mean(axis=0), inputs.std(axis=0) + 1e-6
        self.inputs, self.targets = self.standardize(inputs), np.eye(len(self.values))[numbers]
        self.gram, self.products = self.inputs.T @ self.inputs, self.inputs.T @ self.targets

    def standardize(self, inputs: np.ndarray) -> np.ndarray:
        scaled = (inputs - self.mean) / self.scale
        return np.concatenate([scaled, np.ones((*scaled.shape[:-1], 1))], axis=-1)

    def read(self, x: np.ndarray, kept: np.ndarray) -> str:
        """The value that x has, of those of the `kept` prompts, as fitted to these alone."""
        left_out, targets = self.inputs[~kept], self.targets[~kept]
        gram = self.gram - left_out.T @ left_out + RIDGE * kept.sum() * np.eye(len(self.gram))
        weights = np.linalg.solve(gram, self.products - left_out.T @ targets)
        known = self.targets[kept].any(axis=0)
        return str(self.values[known][(self.standardize(x) @ weights[:, known]).argmax()])


def measure_concept(
    model: Model, name: str, tested: Sequence[Example], others: Sequence[Example]
) -> dict[str, np.ndarray]:
    """In what share of the tested prompts each place tells the value, or one of its neighbours; and the value, with
    those of the other prompts permuted."""
    concepts, known = ([intermediates(example)[name] for example in examples] for examples in (tested, others))
    labels = np.array([concept.value for concept in known])
    inputs = read_streams(model, others, np.array([concept.position for concept in known]))
    seen = read_streams(model, tested, np.array([concept.position for concept in concepts]))
    probes = [Probe(place, labels) for place in inputs]
    permuted = [Probe(place, np.random.default_rng(0).permutation(labels)) for place in inputs]
    hits: dict[str, list[list[bool]]] = {"exact": [], "within 1": [], "permuted": []}
    for row, (example, concept) in enumerate(zip(tested, concepts, strict=True)):
        kept = find_independent(others, example, name)
        read = [probe.read(x, kept) for probe, x in zip(probes, seen[:, row], strict=True)]
        hits["exact"].append([value == concept.value for value in read])
        hits["within 1"].append([value in list_accepted(name, concept.value, name in NEAR) for value in read])
        by_chance = [probe.read(x, kept) for probe, x in zip(permuted, seen[:, row], strict=True)]
        hits["permuted"].append([value == concept.value for value in by_chance])
    return {kind: np.mean(rows, axis=0) for kind, rows in hits.items()}


def write_cells(shares: np.ndarray) -> list[str]:
    """The embedding, and the best layer where the concept begins and at the end."""
    embedding, streams = shares[0], shares[1:].reshape(2, -1)
    best = [f"{place.max():.0%} (layer {place.argmax()})" for place in streams]
    return [f"{embedding:.0%}", *best]


def measure_task(model: Model, task: str, split: Split) -> None:
    tested, others = TASKS[task].examples(split, TESTED, seed=0), TASKS[task].examples("train", OTHERS, seed=1)
    for name in dict.fromkeys(name for example in tested for name in intermediates(example)):
        having = ([example for example in examples if name in intermediates(example)] for examples in (tested, others))
        shares = measure_concept(model, name, *having)
        for near in (False, True) if name in NEAR else (False,):
            cells = write_cells(shares["within 1" if near else "exact"])
            print("|", " | ".join([task, name + ", within 1" * near, *cells]), end=" |")
            print(f" {shares['permuted'].max():.0%} |" if not near else " |", flush=True)


HEAD = "| task | concept | embedding | stream where it begins | stream at the end | permuted, best place |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    parser.add_argument("--split", choices=("choose", "report"), default="report", help="default report")
    options = parser.parse_args()
    model = load_model(options.model)
    print(HEAD, "|---" * (HEAD.count("|") - 1) + "|", sep="\n")
    for task in options.tasks:
        measure_task(model, task, options.split)


if __name__ == "__main__":
    main()
