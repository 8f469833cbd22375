"""What a language model knows of the small world: its accuracy by task, and where it computes a city's state."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import jax
import numpy as np

from jclt.errors import UserError
from jclt.models import Model, Replace, run
from jclt.world.example import Example, Split, find_position
from jclt.world.facts import ASKED, CITIES, CITY_SPLIT, STATE_OF, STATES, value_of
from jclt.world.tasks import TASKS

BATCH = 256


def pad_prompts(model: Model, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[N, T]`, padded on the right with zeros, and each prompt's last position."""
    ids = [model.encode(prompt) for prompt in prompts]
    tokens = np.zeros((len(ids), max(map(len, ids))), np.int32)
    for row, prompt in zip(tokens, ids, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.array([len(prompt) - 1 for prompt in ids])


def predict(model: Model, prompts: Sequence[str]) -> np.ndarray:
    """The probabilities `[N, V]` of every prompt's next token."""
    tokens, ends = pad_prompts(model, prompts)
    probabilities = []
    for start in range(0, len(tokens), BATCH):
        rows, last = tokens[start : start + BATCH], ends[start : start + BATCH]
        logits, _ = run(model, rows)
        probabilities.append(np.asarray(jax.nn.softmax(logits[np.arange(len(rows)), last], axis=-1)))
        if not np.isfinite(probabilities[-1]).all():
            raise UserError(f"model {model.name}: its logits are not finite, expected numbers")
    return np.concatenate(probabilities)


class Answer(NamedTuple):
    predicted: str  # the most probable next token
    probability: float  # of all right answers together
    right: bool  # whether the predicted token is a right answer


def answer_examples(model: Model, examples: Sequence[Example]) -> list[Answer]:
    """The model's answer to each example's prompt."""
    vocabulary = get_vocabulary(model)
    tokens = {index: token for token, index in vocabulary.items()}
    answers = []
    for example, row in zip(examples, predict(model, [e.prompt for e in examples]), strict=True):
        right, predicted = [vocabulary[answer] for answer in example.answers], int(row.argmax())
        answers.append(Answer(tokens[predicted], float(row[right].sum()), predicted in right))
    return answers


def measure_accuracy(model: Model, split: Split = "report", count: int = 400, seed: int = 0) -> dict[str, float]:
    """The share of right answers on up to `count` examples of every task."""
    return {
        name: float(np.mean([a.right for a in answer_examples(model, task.examples(split, count, seed))]))
        for name, task in TASKS.items()
    }


def get_vocabulary(model: Model) -> dict[str, int]:
    assert model.tokenizer is not None
    return model.tokenizer.backend.get_vocab()


# ---------------------------------------------------------------- swapping the residual streams of two cities


@dataclass(frozen=True)
class Swap:
    """The effect of the residual stream after `layer`, at positions `where`, from a prompt about another city."""

    layer: int
    where: str
    kept: float  # how often the answer stays the same, for another city of the same state
    moved: float  # how often it becomes the other state's capital, for a city of another state


def measure_swaps(model: Model, split: Split = "report", partners: int = 4, seed: int = 0) -> list[Swap]:
    """For every layer and three sets of positions, averaged over the forms of the question for a capital."""
    random = Random(seed)
    cities = [city for city in CITIES if CITY_SPLIT[city] == split for _ in range(partners)]
    same = [random.choice([c for c in CITIES if c != city and STATE_OF[c] == STATE_OF[city]]) for city in cities]
    others = [random.choice([c for c in CITIES if STATE_OF[c] != STATE_OF[city]]) for city in cities]
    kept = [swap_streams(model, form, cities, same) for form in ASKED]
    moved = [swap_streams(model, form, cities, others) for form in ASKED]
    return [
        Swap(*place, float(np.mean([k[place] for k in kept])), float(np.mean([m[place] for m in moved])))
        for place in kept[0]
    ]


def swap_streams(model: Model, form: str, cities: list[str], donors: list[str]) -> dict[tuple[int, str], float]:
    """For each layer and set of positions, how often the answer is the capital of the donor's state."""
    prompts = [form.format(city=city, relation="capital") for city in cities]
    donor_prompts = [form.format(city=city, relation="capital") for city in donors]
    tokens = pad_prompts(model, prompts)[0]
    city, end = find_position(prompts[0], cities[0]), len(model.encode(prompts[0])) - 1
    places = {"city": slice(city - 1, city + 1), "from the city on": slice(city, end + 1), "end": slice(end, end + 1)}
    vocabulary = get_vocabulary(model)
    capitals = np.array([vocabulary[f" {value_of(STATE_OF[city], 'capital')}"] for city in donors])
    _, seen = run(model, pad_prompts(model, donor_prompts)[0], capture=("resid_post",))
    moved = {}
    for layer in range(model.config.layers):
        for where, positions in places.items():
            logits, _ = run(model, tokens, edit=Replace(seen, layer=layer, position=positions))
            moved[layer, where] = float(np.mean(np.asarray(logits[:, -1].argmax(axis=-1)) == capitals))
    return moved


BARS = dict.fromkeys(TASKS, 0.98) | {"two_hop": 0.97, "successor": 0.90}
"""A model knows a task if its share of right answers is at least this."""
KEPT, MOVED = 0.95, 0.90
"""The same for `Swap.kept` and `Swap.moved`."""


def find_state_swap(swaps: list[Swap], probes: dict[str, float]) -> Swap:
    """The swap at the end of the prompt, after the first layer where a probe reads the state there."""
    ends = {swap.layer: swap for swap in swaps if swap.where == "end"}
    return next((ends[layer] for layer in sorted(ends) if probes[f"resid_post {layer} end"] >= 0.9), ends[max(ends)])


# ---------------------------------------------------------------- where a probe reads the state


def probe(features: np.ndarray, seed: int = 0) -> float:
    """The accuracy of ridge regression from `features[city]` to the state, on held-out cities; chance is 0.1."""
    x = features - features.mean(axis=0)
    gram = x @ x.T
    gram /= np.trace(gram) / len(gram)
    states = np.array([STATES.index(STATE_OF[city]) for city in CITIES])
    right = []
    for fold in np.array_split(np.random.default_rng(seed).permutation(len(CITIES)), 5):
        others = np.setdiff1d(np.arange(len(CITIES)), fold)
        regularized = gram[np.ix_(others, others)] + 0.01 * np.eye(len(others))
        dual = np.linalg.solve(regularized, np.eye(10)[states[others]] - 0.1)
        right.append(np.mean((gram[np.ix_(fold, others)] @ dual).argmax(axis=1) == states[fold]))
    return float(np.mean(right))


def probe_states(model: Model, form: str = ASKED[0]) -> dict[str, float]:
    """The accuracy of probes for the state: on the city's two embeddings, and on the stream at the city and the end."""
    prompts = [form.format(city=city, relation="capital") for city in CITIES]
    tokens = np.array([model.encode(prompt) for prompt in prompts])
    city = find_position(prompts[0], CITIES[0])
    _, seen = run(model, tokens, capture=("token_embedding", "resid_mid", "resid_post"))
    embedding = np.asarray(seen["token_embedding"])
    accuracies = {"embeddings": probe(embedding[:, city - 1 : city + 1].sum(axis=1))}
    for layer in range(model.config.layers):
        for site in ("resid_mid", "resid_post"):
            for where, position in (("city", city), ("end", tokens.shape[1] - 1)):
                accuracies[f"{site} {layer} {where}"] = probe(np.asarray(seen[site][layer][:, position]))
    return accuracies
