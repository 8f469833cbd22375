"""What a language model has learned of the world: accuracy by task, and where it works out a city's state."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jclt.errors import UserError
from jclt.models import Model, Replace, run
from jclt.world.example import Example, Split, after
from jclt.world.facts import ASKED, CITIES, CITY_SPLIT, STATE_OF, STATES, value_of
from jclt.world.tasks import TASKS

BATCH = 256


def padded(model: Model, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[N, T]`, filled up behind with zeros that nothing before them sees, and each prompt's last position."""
    ids = [model.encode(prompt) for prompt in prompts]
    tokens = np.zeros((len(ids), max(map(len, ids))), np.int32)
    for row, prompt in zip(tokens, ids, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.array([len(prompt) - 1 for prompt in ids])


def predictions(model: Model, prompts: Sequence[str]) -> np.ndarray:
    """The probabilities `[N, V]` of every prompt's next token."""
    tokens, ends = padded(model, prompts)
    found = []
    for start in range(0, len(tokens), BATCH):
        rows, last = tokens[start : start + BATCH], ends[start : start + BATCH]
        logits, _ = run(model, rows)
        found.append(np.asarray(jax.nn.softmax(logits[np.arange(len(rows)), last], axis=-1)))
        if not np.isfinite(found[-1]).all():
            raise UserError(f"model {model.name}: its logits are not finite, expected numbers")
    return np.concatenate(found)


class Answer(NamedTuple):
    said: str  # the most probable next token
    probability: float  # that of all right answers together
    right: bool  # whether what was said is one of them


def answers(model: Model, examples: Sequence[Example]) -> list[Answer]:
    """What the model says after each example's prompt."""
    vocabulary = vocabulary_of(model)
    tokens = {index: token for token, index in vocabulary.items()}
    found = []
    for example, row in zip(examples, predictions(model, [e.prompt for e in examples]), strict=True):
        right, said = [vocabulary[answer] for answer in example.answers], int(row.argmax())
        found.append(Answer(tokens[said], float(row[right].sum()), said in right))
    return found


def accuracy(model: Model, split: Split = "report", count: int = 400, seed: int = 0) -> dict[str, float]:
    """The share of right answers on up to `count` examples of every task."""
    return {
        name: float(np.mean([a.right for a in answers(model, task.examples(split, count, seed))]))
        for name, task in TASKS.items()
    }


def vocabulary_of(model: Model) -> dict[str, int]:
    assert model.tokenizer is not None
    return model.tokenizer.backend.get_vocab()


# ---------------------------------------------------------------- exchanging one city's residual stream for another's


@dataclass(frozen=True)
class Swap:
    """What follows when the stream after `layer` at the positions `where` comes from a prompt about another city."""

    layer: int
    where: str
    kept: float  # how often the answer stays when the other city lies in the same state
    moved: float  # how often it becomes the other state's capital when it does not


def swaps(model: Model, split: Split = "report", partners: int = 4, seed: int = 0) -> list[Swap]:
    """Every layer and three places, averaged over the ways to ask for a capital."""
    random = Random(seed)
    asked = [city for city in CITIES if CITY_SPLIT[city] == split for _ in range(partners)]
    same = [random.choice([c for c in CITIES if c != city and STATE_OF[c] == STATE_OF[city]]) for city in asked]
    others = [random.choice([c for c in CITIES if STATE_OF[c] != STATE_OF[city]]) for city in asked]
    kept = [exchanged(model, form, asked, same) for form in ASKED]
    moved = [exchanged(model, form, asked, others) for form in ASKED]
    return [
        Swap(*place, float(np.mean([k[place] for k in kept])), float(np.mean([m[place] for m in moved])))
        for place in kept[0]
    ]


def exchanged(model: Model, form: str, cities: list[str], donors: list[str]) -> dict[tuple[int, str], float]:
    """For each layer and place, how often the answer is the capital of the donor's state."""
    prompts = [form.format(city=city, relation="capital") for city in cities]
    given = [form.format(city=city, relation="capital") for city in donors]
    tokens, at, end = padded(model, prompts)[0], after(prompts[0], cities[0]), len(model.encode(prompts[0])) - 1
    places = {"city": slice(at - 1, at + 1), "from the city on": slice(at, end + 1), "end": slice(end, end + 1)}
    vocabulary = vocabulary_of(model)
    capitals = np.array([vocabulary[f" {value_of(STATE_OF[city], 'capital')}"] for city in donors])
    _, seen = run(model, padded(model, given)[0], capture=("resid_post",))
    found = {}
    for layer in range(model.config.layers):
        for where, positions in places.items():
            mask = np.zeros((model.config.layers, 1, end + 1, 1), bool)
            mask[layer, :, positions] = True
            logits, _ = run(model, tokens, edit=Replace(seen, {"resid_post": jnp.asarray(mask)}))
            found[layer, where] = float(np.mean(np.asarray(logits[:, -1].argmax(axis=-1)) == capitals))
    return found


BARS = dict.fromkeys(TASKS, 0.98) | {"two_hop": 0.97, "successor": 0.90}
"""The share of right answers from which on a model is said to know a task."""
KEPT, MOVED = 0.95, 0.90
"""The same for the exchange of a city's stream."""


def state_swap(found: list[Swap], probes: dict[str, float]) -> Swap:
    """The exchange at the end of the prompt after the first layer where the state can be read off there."""
    ends = {swap.layer: swap for swap in found if swap.where == "end"}
    return next((ends[layer] for layer in sorted(ends) if probes[f"resid_post {layer} end"] >= 0.9), ends[max(ends)])


# ---------------------------------------------------------------- where the state can be read


def probe(features: np.ndarray, seed: int = 0) -> float:
    """How well ridge regression reads the states of cities it was not fitted on off `features[city]`; chance is .1."""
    x = features - features.mean(axis=0)
    gram = x @ x.T
    gram /= np.trace(gram) / len(gram)
    states = np.array([STATES.index(STATE_OF[city]) for city in CITIES])
    right = []
    for fold in np.array_split(np.random.default_rng(seed).permutation(len(CITIES)), 5):
        rest = np.setdiff1d(np.arange(len(CITIES)), fold)
        dual = np.linalg.solve(gram[np.ix_(rest, rest)] + 0.01 * np.eye(len(rest)), np.eye(10)[states[rest]] - 0.1)
        right.append(np.mean((gram[np.ix_(fold, rest)] @ dual).argmax(axis=1) == states[fold]))
    return float(np.mean(right))


def state_probes(model: Model, form: str = ASKED[0]) -> dict[str, float]:
    """How well the state can be read off the two words' embeddings, and off the stream at the city and the end."""
    prompts = [form.format(city=city, relation="capital") for city in CITIES]
    tokens = np.array([model.encode(prompt) for prompt in prompts])
    at = after(prompts[0], CITIES[0])
    _, seen = run(model, tokens, capture=("token_embedding", "resid_mid", "resid_post"))
    embedding = np.asarray(seen["token_embedding"])
    found = {"embeddings": probe(embedding[:, at - 1 : at + 1].sum(axis=1))}
    for layer in range(model.config.layers):
        for site in ("resid_mid", "resid_post"):
            for where, position in (("city", at), ("end", tokens.shape[1] - 1)):
                found[f"{site} {layer} {where}"] = probe(np.asarray(seen[site][layer][:, position]))
    return found
