"""Where does the model itself hold the intermediate concepts that `intermediates.py` looks for in graphs?

    python experiments/concept_probes.py
    python experiments/concept_probes.py --tasks antonym successor

A linear probe predicts a concept's value: from the token embedding where the concept can first be known, and from the
residual stream after the best layer, there and at the end of the prompt. The layer is chosen on the split `choose`, and
the table is of `report`. For every tested prompt the probe is fitted to other prompts, the same on which features are
selected: they share neither what the concept follows from, nor the answer, nor all else that the answer follows from.
Nor do they have the same token where the concept begins, unless the token is the value, as of a bracket.
Expected: see README.md. Cost: a minute on two CPU cores.
"""

import argparse
from collections.abc import Sequence

import numpy as np
from intermediates import NEAR, find_independent, intermediates, list_accepted

from jclt import Model, load_model, run
from jclt.world import TASKS, Example
from jclt.world.measure import pad_prompts

TESTED, OTHERS = 100, 4000
RIDGE = 0.01
"""The penalty of a probe's weights, for each prompt that it is fitted to. Its inputs have variance 1."""


def read_places(model: Model, examples: Sequence[Example], starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[N]` where the concept begins, and vectors `[1 + 2 L, N, D]`: their embeddings, and the residual streams
    after each layer, there and at the end."""
    tokens, ends = pad_prompts(model, [example.prompt for example in examples])
    found = []
    for some in np.array_split(np.arange(len(tokens)), -(-len(tokens) // 256)):
        sites = run(model, tokens[some], capture=("resid_pre", "resid_post"))[1]
        rows, places = np.arange(len(some)), (starts[some], ends[some])
        streams = [np.asarray(stream)[rows, place] for place in places for stream in sites["resid_post"]]
        found.append(np.stack([np.asarray(sites["resid_pre"][0])[rows, places[0]], *streams]))
    return tokens[np.arange(len(tokens)), starts], np.concatenate(found, axis=1).astype(np.float64)


class Probe:
    """A linear classifier by ridge regression. Each fit is to other prompts, most of them the same, so their products
    are computed once, and those of prompts that are left out are subtracted."""

    def __init__(self, inputs: np.ndarray, labels: np.ndarray):
        self.values, numbers = np.unique(labels, return_inverse=True)
        self.mean, self.scale = inputs.mean(axis=0), inputs.std(axis=0) + 1e-6
        self.inputs, self.targets = self.standardize(inputs), np.eye(len(self.values))[numbers]
        self.gram, self.products = self.inputs.T @ self.inputs, self.inputs.T @ self.targets

    def standardize(self, inputs: np.ndarray) -> np.ndarray:
        scaled = (inputs - self.mean) / self.scale
        return np.concatenate([scaled, np.ones((*scaled.shape[:-1], 1))], axis=-1)

    def fit(self, kept: np.ndarray) -> np.ndarray:
        """The weights `[D + 1, values]`, fitted to the `kept` prompts."""
        left_out, targets = self.inputs[~kept], self.targets[~kept]
        penalty = RIDGE * kept.sum() * np.eye(len(self.gram))
        return np.linalg.solve(self.gram - left_out.T @ left_out + penalty, self.products - left_out.T @ targets)

    def predict(self, x: np.ndarray, kept: np.ndarray) -> str:
        """The value at x: one of those that the `kept` prompts have."""
        known = self.targets[kept].any(axis=0)
        return str(self.values[known][(self.standardize(x) @ self.fit(kept)[:, known]).argmax()])


def find_other_tokens(tokens: np.ndarray, labels: np.ndarray, kept: np.ndarray, token: int, value: str) -> np.ndarray:
    """The `kept` prompts with other tokens than this one; all of them if no other token has the value."""
    others = kept & (tokens != token)
    return others if (labels[others] == value).any() else kept


def measure_concept(
    model: Model, name: str, tested: Sequence[Example], others: Sequence[Example]
) -> dict[str, np.ndarray]:
    """For each place, the share of the tested prompts whose value is predicted: exactly, within 1, and exactly by
    probes that were fitted to permuted labels."""
    tested_concepts, other_concepts = (
        [intermediates(example)[name] for example in examples] for examples in (tested, others)
    )
    labels = np.array([concept.value for concept in other_concepts])
    tokens, inputs = read_places(model, others, np.array([concept.position for concept in other_concepts]))
    tested_tokens, x = read_places(model, tested, np.array([concept.position for concept in tested_concepts]))
    permuted = np.random.default_rng(0).permutation(labels)
    probes, by_chance = ([Probe(place, y) for place in inputs] for y in (labels, permuted))
    hits: dict[str, list[list[bool]]] = {"exact": [], "within 1": [], "permuted": []}
    for row, (example, concept) in enumerate(zip(tested, tested_concepts, strict=True)):
        independent = find_independent(others, example, name)
        kept = find_other_tokens(tokens, labels, independent, tested_tokens[row], concept.value)
        found, chance = (
            [probe.predict(vector, kept) for probe, vector in zip(kind, x[:, row], strict=True)]
            for kind in (probes, by_chance)
        )
        accepted = list_accepted(name, concept.value, name in NEAR)
        hits["exact"].append([value == concept.value for value in found])
        hits["within 1"].append([value in accepted for value in found])
        hits["permuted"].append([value == concept.value for value in chance])
    return {kind: np.mean(rows, axis=0) for kind, rows in hits.items()}


def measure_task(model: Model, task: str) -> None:
    """Prints a row for each concept: the embedding, and the best layer where the concept begins and at the end."""
    others = TASKS[task].examples("train", OTHERS, seed=1)
    choosing, reported = (TASKS[task].examples(split, TESTED, seed=0) for split in ("choose", "report"))
    for name in dict.fromkeys(name for example in reported for name in intermediates(example)):
        having = [[x for x in examples if name in intermediates(x)] for examples in (choosing, reported, others)]
        chosen, shares = (measure_concept(model, name, tested, having[2]) for tested in having[:2])
        for kind in ("exact", "within 1") if name in NEAR else ("exact",):
            layers = chosen[kind][1:].reshape(2, -1).argmax(axis=1)
            places = [0, *(1 + layers + [0, model.config.layers])]
            cells = [f"{shares[kind][0]:.0%}"]
            cells += [f"{shares[kind][place]:.0%} (layer {n})" for place, n in zip(places[1:], layers, strict=True)]
            cells.append(f"{shares['permuted'][places].max():.0%}" if kind == "exact" else "")
            print("|", " | ".join([task, name + ", within 1" * (kind != "exact"), *cells]), "|", flush=True)


HEAD = "| task | concept | embedding | stream where it begins | stream at the end | permuted, best of the three |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    options = parser.parse_args()
    model = load_model(options.model)
    print(HEAD, "|---" * (HEAD.count("|") - 1) + "|", sep="\n")
    for task in options.tasks:
        measure_task(model, task)


if __name__ == "__main__":
    main()
