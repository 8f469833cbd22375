"""Clusters of neurons: which neurons act alike over prompts, what a cluster stands for, and how to change it.

Prompts ask for a relation of a subject (the capital of a state) and are of one length. A neuron's profile over them has
two parts, each scaled to length 1: what its activation gets from the tokens of the subject, of the relation and of the
rest; and what it gives to the answer. Both are under rules that make the model linear, along all paths. Clusters join
neurons whose profiles are close (cosine distance, average linkage). What a cluster gives to the answers has a mean, and
parts that depend on the subject, on the relation, and only on both together, which is the answer. It stands for the
part with the largest mean square; for every question if that is the mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage

import jclt
from jclt.attribution.true_pass import widen
from jclt.circuits import score_nodes
from jclt.circuits.passes import run_pass
from jclt.circuits.rules import RULE_SETS, make_activate, make_rules_edit
from jclt.models import Compose, Model, ModelConfig, Place
from jclt.shapes import Array, Bool, Float, Int, Params

RULES = "neuron circuits"
KINDS = ("every", "subject", "relation", "answer")


class Question(NamedTuple):
    subject: str
    relation: str
    prompt: str


@dataclass(frozen=True, eq=False)
class Neurons:
    """Chosen neurons and their profiles over prompts."""

    where: Int[np.ndarray, "n 3"]  # layer, position, number
    inputs: Float[np.ndarray, "n G P"]  # what the activation gets from each group of tokens
    outputs: Float[np.ndarray, "n P"]  # what it gives to the answer
    active: Bool[np.ndarray, "L T M"]  # the neurons that are active in some prompt: random ones are of these


class Cluster(NamedTuple):
    members: Bool[np.ndarray, "L T M"]
    kind: str
    shares: tuple[float, ...]  # of the mean square of its contribution, by kind
    values: tuple[tuple[str, str], ...]  # the subjects and relations of the questions that it serves


# ---------------------------------------------------------------- profiles


@partial(jax.jit, static_argnames=("config",))
def trace_inputs(
    config: ModelConfig, params: Params, tokens: Int[Array, "P T"], group: Bool[Array, "T"]
) -> Float[Array, "L P T M"]:
    """What each neuron's activation gets from the embeddings of a group of tokens."""
    last, rules = jnp.full(len(tokens), tokens.shape[1] - 1), RULE_SETS[RULES]

    def read(factor: Array) -> Array:
        def scale(place: Place, value: Array) -> Array:
            return jnp.where(group[:, None], factor * value, value) if place.site == "token_embedding" else value

        edit = Compose((scale, make_rules_edit(config, rules)))
        _, seen = run_pass(
            config, params, tokens, last, edit=edit, activate=make_activate(rules), capture=("mlp_neurons",)
        )
        return seen["mlp_neurons"]

    one = jnp.ones((), params["token_embedding"].dtype)
    return jax.jvp(read, (one,), (one,))[1]


def group_tokens(questions: Sequence[Question], tokens: Int[np.ndarray, "P T"]) -> Bool[np.ndarray, "3 T"]:
    """The tokens that differ between relations, those that differ otherwise (the subject's), and the rest."""
    varies = (tokens != tokens[0]).any(axis=0)
    relations = np.array([question.relation for question in questions])
    same = [(tokens[relations == name] == tokens[relations == name][0]).all(axis=0) for name in set(relations)]
    of_relation = varies & np.all(same, axis=0)
    return np.stack([varies & ~of_relation, of_relation, ~varies])


def choose_neurons(
    model: Model, questions: Sequence[Question], answers: dict[tuple[str, str], str], count: int
) -> Neurons:
    """Those whose gift to the answer, by RelP without corrupted prompts, differs most between questions."""
    words = set(answers.values())
    rows = []
    for question in questions:
        right = answers[question.subject, question.relation]
        rows.append((question.prompt, None, right, tuple(words - {right})))
    pairs = jclt.make_pairs(model, rows)
    scores = score_nodes(model, pairs, "neurons", "relp", rules=RULES, reference="zero").per_pair
    best = np.argsort(-scores.std(axis=0), axis=None, kind="stable")[:count]
    where = np.stack(np.unravel_index(best, scores.shape[1:]), axis=1)
    layers, positions, numbers = where.T
    tokens, params = np.stack(pairs.clean), widen(dict(model.params))
    inputs = [
        np.asarray(trace_inputs(model.config, params, jnp.asarray(tokens), jnp.asarray(group)))
        for group in group_tokens(questions, tokens)
    ]
    seen = np.asarray(jclt.run(model, tokens, capture=("mlp_neurons",))[1]["mlp_neurons"], np.float32)
    return Neurons(
        where=where,
        inputs=np.stack([of_group[layers, :, positions, numbers] for of_group in inputs], axis=1),
        outputs=-scores[:, layers, positions, numbers].T,
        active=(seen != 0).any(axis=1),
    )


# ---------------------------------------------------------------- clusters


def scale_rows(rows: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def join_neurons(neurons: Neurons, distance: float) -> list[Int[np.ndarray, "_"]]:
    """The numbers of the neurons of each cluster, the largest cluster first."""
    profiles = np.concatenate(
        [scale_rows(neurons.inputs.reshape(len(neurons.where), -1)), scale_rows(neurons.outputs)], 1
    )
    labels = fcluster(linkage(profiles, "average", metric="cosine"), distance, "distance")
    clusters = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return sorted(clusters, key=len, reverse=True)


def split_squares(grid: Float[np.ndarray, "S R"]) -> tuple[float, ...]:
    """The shares of the mean square that the mean, rows, columns and only both together explain."""
    mean = grid.mean()
    rows, columns = grid.mean(axis=1) - mean, grid.mean(axis=0) - mean
    parts = [mean**2, np.square(rows).mean(), np.square(columns).mean()]
    whole = max(float(np.square(grid).mean()), 1e-12)
    return (*(float(part) / whole for part in parts), float(whole - sum(parts)) / whole)


def name_cluster(
    grid: Float[np.ndarray, "S R"], subjects: list[str], relations: list[str]
) -> tuple[str, tuple[float, ...], tuple[tuple[str, str], ...]]:
    """The kind, the shares, and the questions that get at least half of what the best one gets."""
    shares = split_squares(grid)
    kind = KINDS[int(np.argmax(shares))]
    means = {"subject": grid.mean(axis=1, keepdims=True), "relation": grid.mean(axis=0, keepdims=True), "answer": grid}
    if kind not in means:
        return kind, shares, ()
    served = np.argwhere(means[kind] >= means[kind].max() / 2).tolist()
    values = [("" if kind == "relation" else subjects[i], "" if kind == "subject" else relations[j]) for i, j in served]
    return kind, shares, tuple(values)


def find_clusters(neurons: Neurons, questions: Sequence[Question], distance: float) -> list[Cluster]:
    subjects, relations = (list(dict.fromkeys(column)) for column in list(zip(*questions, strict=True))[:2])
    clusters = []
    for numbers in join_neurons(neurons, distance):
        given, grid = neurons.outputs[numbers].sum(axis=0), np.zeros((len(subjects), len(relations)))
        for i, subject in enumerate(subjects):
            for j, relation in enumerate(relations):
                asked = [q.subject == subject and q.relation == relation for q in questions]
                grid[i, j] = given[asked].mean()
        members = np.zeros(neurons.active.shape, bool)
        members[tuple(neurons.where[numbers].T)] = True
        clusters.append(Cluster(members, *name_cluster(grid, subjects, relations)))
    return clusters


# ---------------------------------------------------------------- interventions


class ChangeNeurons(eqx.Module):
    """Multiplies all neurons and adds to them."""

    factor: Float[Array | np.ndarray, "L #P T M"]
    added: Float[Array | np.ndarray, "L #P T M"]

    def __call__(self, place: Place, value: Array) -> Array:
        if place.site != "mlp_neurons":
            return value
        return value * jnp.asarray(self.factor)[place.layer] + jnp.asarray(self.added)[place.layer]


def shift_back(values: np.ndarray) -> np.ndarray:
    """To the position before, along the axis before the last; the first position loses its own."""
    moved = np.zeros_like(values)
    moved[..., :-1, :] = values[..., 1:, :]
    return moved


def draw_alike(
    members: Bool[np.ndarray, "L T M"], active: Bool[np.ndarray, "L T M"], random: np.random.Generator
) -> Bool[np.ndarray, "L T M"]:
    """As many other neurons of each layer and position, of those that are active in some prompt if there are enough."""
    drawn = np.zeros_like(members)
    for layer, position in np.argwhere(members.any(axis=-1)):
        own = members[layer, position]
        order = random.permutation(np.flatnonzero(~own))
        order = order[np.argsort(~active[layer, position, order], kind="stable")]
        drawn[layer, position, order[: own.sum()]] = True
    return drawn
