"""Whether a coder's features represent a state: in the true model the features of one state are exchanged for those of
another.

In the prompt about a city, the features of its state are set to zero, and those of the other state to their mean over
that state's prompts. Features and means come from other cities than those tested.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from jclt.coders import Coder
from jclt.evaluation.batches import make_one_batch
from jclt.evaluation.features import compute_features, measure_effects, predict_with_features
from jclt.models import Model
from jclt.models.model import on_mesh
from jclt.world.example import Split, find_position, last_position
from jclt.world.facts import ASKED, CITIES, CITY_SPLIT, STATE_OF, STATES, value_of
from jclt.world.measure import get_vocabulary, pad_prompts

ExchangeAt = Literal["end", "from the city on"]
"""At the last token of the prompt, or at all tokens from the city's last word on."""

# ---------------------------------------------------------------- which features are a state's


class QuestionForm(NamedTuple):
    """One form of the question about a city's state, asked for every city, and the coder's activations on it."""

    tokens: np.ndarray  # [cities, T], padded at the end, so that forms share a program
    end: int  # the position of the answer
    positions: np.ndarray  # [T], a mask: where features are exchanged
    activations: np.ndarray  # [l, cities, T, F]


def read_forms(
    model: Model, coder: Coder, layers: tuple[int, ...], where: ExchangeAt, relation: str = "capital"
) -> list[QuestionForm]:
    prompts = [[form.format(city=city, relation=relation) for city in CITIES] for form in ASKED]
    all_tokens = pad_prompts(model, [prompt for form_prompts in prompts for prompt in form_prompts])[0]
    forms = []
    for form_prompts, tokens in zip(prompts, np.split(all_tokens, len(ASKED)), strict=True):
        end = last_position(form_prompts[0])
        start = end if where == "end" else find_position(form_prompts[0], CITIES[0])
        with on_mesh(model):
            rows = make_one_batch(model, tokens)
            activations = np.asarray(compute_features(model.config, model.params, coder, layers, rows))
        positions = np.arange(tokens.shape[1])
        forms.append(
            QuestionForm(tokens, end, (positions >= start) & (positions <= end), activations[:, : len(tokens)])
        )
    return forms


def average_states(activations: np.ndarray, known: Sequence[int]) -> np.ndarray:
    """The means `[states, l, ...]` over the known cities of each state, from `[l, cities, ...]`."""
    cities = [[i for i in known if STATE_OF[CITIES[i]] == state] for state in STATES]
    return np.stack([activations[:, of_state].mean(axis=1) for of_state in cities])


def score_features(
    model: Model, coder: Coder, layers: tuple[int, ...], forms: Sequence[QuestionForm], known: Sequence[int]
) -> np.ndarray:
    """First-order effect on the logit of a state's capital of replacing each feature's mean activation in other states
    by its mean in this state: `[states, l, F]`, in the true model, on the known cities."""
    is_known, values = np.isin(np.arange(len(CITIES)), known), list_values(model)
    total = []
    for form in forms:
        with on_mesh(model):
            rows = make_one_batch(model, form.tokens)
            within = np.pad(is_known, (0, len(rows) - len(is_known)))
            end = np.int32(form.end)  # an array, so that all forms share a program
            arguments = (model.config, model.params, coder, layers, rows, within, end, values)
            effects = np.asarray(measure_effects(*arguments))
        means = average_states(form.activations, known)
        others = (np.sum(means, axis=0) - means) / (len(STATES) - 1)
        total.append(((means - others) * effects)[:, :, form.positions].sum(axis=2))
    return np.sum(total, axis=0)


def list_values(model: Model, relation: str = "capital") -> np.ndarray:
    """The token of each state's capital, or of its value for another relation."""
    vocabulary = get_vocabulary(model)
    return np.array([vocabulary[f" {value_of(state, relation)}"] for state in STATES])


def select_largest(scores: np.ndarray, size: int) -> np.ndarray:
    """A mask `[states, l, F]` of each state's `size` features with the largest scores, those with positive ones."""
    flat = scores.reshape(len(scores), -1)
    chosen = np.zeros(flat.shape, bool)
    np.put_along_axis(chosen, np.argsort(-flat, axis=1)[:, :size], True, axis=1)
    return (chosen & (flat > 0)).reshape(scores.shape)


# ---------------------------------------------------------------- the exchange


@dataclass(frozen=True)
class StateExchange:
    moved: float  # how often the answer becomes the other state's
    control: float  # the same with as many features drawn at random from the active ones
    unmoved: float  # how often the answer is that of the city's state when nothing is exchanged
    features: dict[str, tuple[tuple[int, int], ...]]  # of each state: the model's layer, feature

    def summary(self) -> dict[str, float]:
        return {"moved": self.moved, "control": self.control, "unmoved": self.unmoved}


def exchange_states(
    model: Model,
    coder: Coder,
    *,
    layers: tuple[int, ...] = (0, 1),
    size: int = 16,
    where: ExchangeAt = "from the city on",
    split: Split = "report",
    relation: str = "capital",
    seed: int = 0,
) -> StateExchange:
    """Exchanges the state of each city of the split for each of the nine others, in every form of the question.

    A state's features are at most `size` of these covered layers: those with the largest effect on its capital's logit.
    With another `relation`, the same features show whether they represent the state or only its capital.
    """
    tested = [i for i, city in enumerate(CITIES) if CITY_SPLIT[city] == split]
    known = [i for i, city in enumerate(CITIES) if CITY_SPLIT[city] not in (split, "report")]
    forms = read_forms(model, coder, layers, where)
    scores = score_features(model, coder, layers, forms, known)
    chosen = select_largest(scores, size)
    active = np.any([f.activations[:, known][:, :, f.positions].any(axis=(1, 2)) for f in forms], axis=0)
    drawn = select_largest(np.random.default_rng(seed).random(scores.shape) * active, size)
    nothing = np.zeros_like(chosen)
    tests = forms if relation == "capital" else read_forms(model, coder, layers, where, relation)
    values = list_values(model, relation)
    moved, control, unmoved = (
        np.mean([measure_exchange(model, coder, layers, form, known, tested, sets, values) for form in tests], axis=0)
        for sets in (chosen, drawn, nothing)
    )
    return StateExchange(
        moved=float(moved[0]),
        control=float(control[0]),
        unmoved=float(unmoved[1]),
        features={
            state: tuple((coder.config.covered[layers[i]], int(f)) for i, f in np.argwhere(sets))
            for state, sets in zip(STATES, chosen, strict=True)
        },
    )


def measure_exchange(
    model: Model,
    coder: Coder,
    layers: tuple[int, ...],
    form: QuestionForm,
    known: Sequence[int],
    tested: Sequence[int],
    sets: np.ndarray,
    values: np.ndarray,
) -> tuple[float, float]:
    """How often the answer is the other state's value, and how often it is still that of the city's state."""
    states = np.array([STATES.index(STATE_OF[city]) for city in CITIES])
    pairs = [(city, state) for city in tested for state in range(len(STATES)) if state != states[city]]
    cities, others = np.array(pairs).T
    with on_mesh(model):
        rows = make_one_batch(model, form.tokens[cities])
        padding = len(rows) - len(cities)
        city_state, other_state = (np.pad(index, (0, padding)) for index in (states[cities], others))
        means = np.where(sets[:, :, None], average_states(form.activations, known), 0)
        touched = (sets[city_state] | sets[other_state])[:, :, None] & form.positions[:, None]
        arguments = (means[other_state].swapaxes(0, 1), touched.swapaxes(0, 1))
        words = np.asarray(predict_with_features(model.config, model.params, coder, layers, rows, *arguments))
    answers = words[: len(cities), form.end]
    return float(np.mean(answers == values[others])), float(np.mean(answers == values[states[cities]]))
