"""`trace_neurons`: the edges between chosen neurons of a prompt, from the embeddings and to an output, under rules of
the backward pass that make a neuron's activation linear in what it reads (`rules.py`).

    edge(s -> t) = da_t / da_s  a_s,    a_t = sum of edges from embeddings and all neurons, and biases

With `direct`, gradients stop at the input of every MLP in between, so that an edge has no path through other neurons;
without it has them all. The edges of `jclt.attribute` in the basis of neurons are the direct ones. `relative` edges are
divided by what they sum up to: those into a neuron sum to 1 minus the shares of the biases.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jclt.attribution.true_pass import widen
from jclt.circuits.edge_gradients import Shifts
from jclt.circuits.passes import run_pass
from jclt.circuits.rules import make_activate, make_rules_edit, read_rules
from jclt.errors import UserError
from jclt.graphs import Graph, build_node_table
from jclt.models import Compose, Model, ModelConfig, Place
from jclt.models.model import Prompt, token_row
from jclt.numerics import einsum
from jclt.shapes import Array, Float, Int, Params

NEURON_RULES = "neuron circuits"
EMBEDDINGS = ("token_embedding", "position_embedding")
TARGETS_AT_ONCE = 16


@dataclass(frozen=True, eq=False, repr=False)
class NeuronEdges:
    """Edges between neurons. Sources are the neurons, then the tokens' and the positions' embeddings (if any); targets
    are the neurons, and the output last."""

    neurons: Int[np.ndarray, "n 3"]  # layer, position, number
    edges: Float[np.ndarray, "t s"]
    values: Float[np.ndarray, "t"]  # the neurons' activations, and the output
    bias: Float[np.ndarray, "t"]
    rest: Float[np.ndarray, "t"]  # from neurons that were not chosen
    rest_mass: Float[np.ndarray, "t"]  # the sum of its terms' sizes
    tokens: Int[np.ndarray, "T"]
    token_texts: tuple[str, ...]
    output: str
    layers: int
    settings: dict[str, Any]

    @property
    def relative(self) -> Float[np.ndarray, "t s"]:
        """Each edge as a share of its target's value."""
        values = self.values[:, None]
        small = 1e-6 * np.abs(self.values).mean()
        return self.edges / np.where(np.abs(values) < small, np.where(values < 0, -small, small), values)

    def __repr__(self) -> str:
        kind = "direct " if self.settings["direct"] else ""
        return f"<NeuronEdges: {len(self.neurons)} neurons, {np.count_nonzero(self.edges)} {kind}edges>"

    def to_graph(self) -> Graph:
        """The same as a graph, which can be pruned, saved and shown. Only direct edges make one: otherwise a path would
        count several times."""
        if not self.settings["direct"]:
            raise UserError("graph: of edges that are not direct, expected those of trace_neurons(..., direct=True)")
        rows, length = np.r_[: len(self.neurons), self.edges.shape[1]], len(self.tokens)
        size = self.edges.shape[1] + 1

        def spread(of_targets: Float[np.ndarray, "t ..."]) -> Float[np.ndarray, "N ..."]:
            of_nodes = np.zeros((size, *of_targets.shape[1:]), of_targets.dtype)
            of_nodes[rows] = of_targets
            return of_nodes

        nodes = build_node_table(
            layers=self.layers,
            values=spread(self.values),
            features=self.neurons,
            errors=np.zeros((0, 2), np.int64),
            tokens=self.tokens,
            positions=np.arange(size - 1 - len(self.neurons) - length),
            logit_tokens=np.array([-1]),
            logit_positions=np.array([length - 1]),
        )
        return Graph(
            adjacency=np.pad(spread(self.edges), ((0, 0), (0, 1))),
            nodes=nodes,
            bias=spread(self.bias),
            rest=spread(self.rest),
            rest_mass=spread(self.rest_mass),
            activations=self.values[:-1],
            token_texts=self.token_texts,
            logit_names=(self.output,),
            logit_probabilities=np.zeros(1, self.edges.dtype),
            logit_weights=np.ones(1, self.edges.dtype),
            layers=self.layers,
            provenance={"basis": "neurons", **self.settings},
        )


class TracePlan(NamedTuple):
    """What programs are compiled for."""

    model: ModelConfig
    rules: tuple[str, ...]
    direct: bool


class Reads(NamedTuple):
    """What targets read: the normalized inputs of the MLPs, and the logits."""

    normalized: Float[Array, "L 1 T D"]
    logits: Float[Array, "1 V"]


def trace_neurons(
    model: Model,
    prompt: Prompt,
    neurons: Int[np.ndarray, "_ _"],
    answers: Iterable[int],
    wrong_answers: Iterable[int] = (),
    *,
    rules: str | Iterable[str] = NEURON_RULES,
    direct: bool = True,
) -> NeuronEdges:
    """Edges between these neurons (layer, position, number) at one prompt, and to the mean logit of the answers minus
    that of the wrong answers. `rules` (`rules.py`) must make neurons linear: by default those of the paper."""
    tokens, config = token_row(model, prompt), model.config
    plan = TracePlan(config, read_rules(rules), direct)
    neurons = check_neurons(config, np.asarray(neurons), len(tokens))
    if not {"norm", "attention", "identity"} <= set(plan.rules) or (
        config.gated and not {"half", "gate"} & set(plan.rules)
    ):
        raise UserError(f"rules {', '.join(plan.rules)}: expected norm, attention, identity, and half or gate")
    direction = np.zeros(config.vocabulary)
    for sign, group in ((1, list(answers)), (-1, list(wrong_answers))):
        for token in group:
            direction[token] += sign / len(group)
    params = widen(dict(model.params))
    dtype = params["token_embedding"].dtype
    found = trace(plan, params, jnp.asarray(tokens[None]), jnp.asarray(neurons), jnp.asarray(direction, dtype))
    edges, values, everything, mass, embedded = (np.asarray(x) for x in found)
    of_neurons = edges[:, : len(neurons)]
    texts = [str(i) if model.tokenizer is None else model.tokenizer.text(i) for i in tokens.tolist()]
    rest = everything - of_neurons.sum(axis=1)
    return NeuronEdges(
        neurons=neurons,
        edges=edges,
        values=values,
        bias=values - everything - embedded,
        rest=rest,
        rest_mass=np.maximum(mass - np.abs(of_neurons).sum(axis=1), np.abs(rest)),
        tokens=tokens.astype(np.int64),
        token_texts=tuple(texts),
        output="answers - wrong answers" if len(list(wrong_answers)) else "answers",
        layers=config.layers,
        settings={"rules": list(plan.rules), "direct": direct, "model": model.name},
    )


def check_neurons(config: ModelConfig, neurons: np.ndarray, length: int) -> Int[np.ndarray, "n 3"]:
    """The neurons, sorted."""
    if neurons.ndim != 2 or neurons.shape[1] != 3 or not len(neurons):
        raise UserError(f"neurons: array of shape {list(neurons.shape)}, expected rows of layer, position and number")
    sizes = np.array([config.layers, length, config.mlp_width])
    if (neurons < 0).any() or (neurons >= sizes).any():
        row = neurons[((neurons < 0) | (neurons >= sizes)).any(axis=1)][0].tolist()
        raise UserError(f"neuron {row}: expected a layer, position and number below {sizes.tolist()}")
    return np.unique(neurons.astype(np.int64), axis=0)


@partial(jax.jit, static_argnames=("plan",))
@jax.named_scope("trace_neurons")
def trace(
    plan: TracePlan,
    params: Params,
    tokens: Int[Array, "1 T"],
    neurons: Int[Array, "n 3"],
    direction: Float[Array, "V"],
) -> tuple[Array, ...]:
    """Edges `[n + 1, s]`; and of each target its value, the sums of the edges from all neurons and of their sizes, and
    the sum of those from embeddings."""
    config = plan.model
    (layers, positions, _), last = neurons.T, jnp.full(1, tokens.shape[1] - 1)
    names = tuple(name for name in EMBEDDINGS if name in params)
    seen = run_pass(config, params, tokens, last, capture=("mlp_neurons", "mlp_normalized", "logits", *names))[1]
    active = seen["mlp_neurons"][:, 0]  # [L T M]
    embeddings = jnp.stack([seen[name][0] for name in names])

    def read(added: Array, embedded: Array) -> Reads:
        """As a function of what is added to the neurons and the embeddings."""

        def edit(place: Place, value: Array) -> Array:
            if place.site == "token_embedding":
                return value + embedded[None]
            return jax.lax.stop_gradient(value) if plan.direct and place.site == "mlp_in" else value

        edits = Compose((edit, make_rules_edit(config, plan.rules)))
        shifts = Shifts({"mlp_neurons": added[:, None]})
        options: Any = {"edit": edits, "layer_edit": shifts, "activate": make_activate(plan.rules)}
        logits, seen = run_pass(config, params, tokens, last, capture=("mlp_normalized",), **options)
        return Reads(seen["mlp_normalized"], logits)

    reads, back = jax.vjp(read, jnp.zeros_like(active), jnp.zeros_like(embeddings[0]))
    vectors, values = find_vectors(plan, params, seen["mlp_normalized"][layers, 0, positions], neurons)

    def trace_target(target: tuple[Array, Array, Array, Array]) -> tuple[Array, ...]:
        layer, position, vector, is_output = target
        normalized = jnp.zeros_like(reads.normalized).at[layer, 0, position].set(vector)
        to_neurons, to_embeddings = back(Reads(normalized, is_output * direction[None]))
        products = to_neurons * active
        of_embeddings = einsum("td,etd->et", to_embeddings, embeddings).reshape(-1)
        edges = jnp.concatenate([products[tuple(neurons.T)], of_embeddings])
        return edges, products.sum(), jnp.abs(products).sum(), of_embeddings.sum()

    zero = jnp.zeros(1, layers.dtype)
    targets = (
        jnp.concatenate([layers, zero]),
        jnp.concatenate([positions, zero]),
        jnp.concatenate([vectors, jnp.zeros_like(vectors[:1])]),
        (jnp.arange(len(neurons) + 1) == len(neurons)).astype(vectors.dtype),
    )
    edges, everything, mass, embedded = jax.lax.map(trace_target, targets, batch_size=TARGETS_AT_ONCE)
    output = einsum("v,v->", direction, reads.logits[0])
    return edges, jnp.append(values, output), everything, mass, embedded


def find_vectors(
    plan: TracePlan, params: Params, normalized: Float[Array, "n D"], neurons: Int[Array, "n 3"]
) -> tuple[Float[Array, "n D"], Float[Array, "n"]]:
    """The gradient of each neuron's activation by the normalized input of its MLP, under the rules; and its value."""
    config, (layers, _, numbers) = plan.model, neurons.T
    activate, c = make_activate(plan.rules), config

    def project(name: str, x: Float[Array, "n D"]) -> Float[Array, "n"]:
        projected = einsum("nd,nd->n", x, params[name][layers, :, numbers])
        bias = params.get(f"{name}_bias")
        return projected if bias is None else projected + bias[layers, numbers]

    def compute(normalized: Float[Array, "n D"]) -> Float[Array, "n"]:
        gain = params["mlp_norm_gain"][layers] + jnp.asarray(c.norm_offset, normalized.dtype)
        x = normalized * gain
        x = x + params["mlp_norm_bias"][layers] if "mlp_norm_bias" in params else x
        return activate(config, project("up", x), project("gate", x) if config.gated else None)

    values, back = jax.vjp(compute, normalized)
    return back(jnp.ones_like(values))[0], values
