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
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from intermediates import NEAR, find_independent, intermediates, list_accepted, run_in_parts, select_having

from jclt import Model, load_model
from jclt.world import TASKS, Example
from jclt.world.measure import pad_prompts

TESTED, OTHERS = 100, 4000
RIDGE = 0.01
"""The penalty of a probe's weights, for each prompt that it is fitted to. Its inputs have variance 1."""


class Prompts(NamedTuple):
    """Prompts that have a concept, and what the model holds of each."""

    examples: list[Example]
    values: np.ndarray  # [N]
    tokens: np.ndarray  # [N], where the concept begins
    vectors: np.ndarray  # [1 + 2 L, N, D]: their embeddings, and the streams after each layer, there and at the end


def read_prompts(model: Model, examples: Sequence[Example], name: str) -> Prompts:
    having, values, starts = select_having(examples, name)
    tokens, ends = pad_prompts(model, [example.prompt for example in having])
    found = []
    for some, seen in run_in_parts(model, tokens, ("token_embedding", "resid_post")):
        rows, places = np.arange(len(some)), (starts[some], ends[some])
        streams = [np.asarray(stream)[rows, place] for place in places for stream in seen["resid_post"]]
        found.append(np.stack([np.asarray(seen["token_embedding"])[rows, places[0]], *streams]))
    vectors = np.concatenate(found, axis=1).astype(np.float64)
    return Prompts(having, values, tokens[np.arange(len(tokens)), starts], vectors)


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


def predict_values(name: str, tested: Prompts, others: Prompts, labels: np.ndarray) -> np.ndarray:
    """`[N, 1 + 2 L]`: what the probe of each place, fitted to the other prompts with these labels, predicts of each
    tested prompt."""
    probes, found = [Probe(vectors, labels) for vectors in others.vectors], []
    for row, (example, value) in enumerate(zip(tested.examples, tested.values, strict=True)):
        kept = find_independent(others.examples, example, name)
        kept = find_other_tokens(others.tokens, others.values, kept, tested.tokens[row], value)
        found.append([probe.predict(x, kept) for probe, x in zip(probes, tested.vectors[:, row], strict=True)])
    return np.array(found)


def measure_places(name: str, tested: Prompts, predicted: np.ndarray, near: bool = False) -> np.ndarray:
    """For each place, the share of the prompts whose value, or a neighbour of it, is predicted."""
    accepted = [list_accepted(name, value, near) for value in tested.values]
    return np.mean([np.isin(row, values) for row, values in zip(predicted, accepted, strict=True)], axis=0)


def measure_concept(name: str, others: Prompts, choosing: Prompts, reported: Prompts) -> Iterator[list[str]]:
    """The cells of a row: the embedding, and the best layer where the concept begins and at the end. And of a second
    one for values within 1."""
    permuted = np.random.default_rng(0).permutation(others.values)
    chosen, found = (predict_values(name, tested, others, others.values) for tested in (choosing, reported))
    by_chance = measure_places(name, reported, predict_values(name, reported, others, permuted))
    for near in (False, True) if name in NEAR else (False,):
        layers = measure_places(name, choosing, chosen, near)[1:].reshape(2, -1).argmax(axis=1)
        places = [0, *(1 + layers + [0, len(others.vectors) // 2])]
        shares = measure_places(name, reported, found, near)[places]
        cells = [f"{share:.0%} (layer {layer})" for share, layer in zip(shares[1:], layers, strict=True)]
        yield [name + ", within 1" * near, f"{shares[0]:.0%}", *cells, "" if near else f"{by_chance[places].max():.0%}"]


def measure_task(model: Model, task: str) -> None:
    examples = TASKS[task].examples("train", OTHERS, seed=1)
    tested = [TASKS[task].examples(split, TESTED, seed=0) for split in ("choose", "report")]
    for name in dict.fromkeys(name for example in tested[1] for name in intermediates(example)):
        prompts = [read_prompts(model, some, name) for some in (examples, *tested)]
        for cells in measure_concept(name, *prompts):
            print("|", " | ".join([task, *cells]), "|", flush=True)


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
