"""Coders of the model compiled by hand, one faithful and one not, and the edges that their graphs must show."""

import jax.numpy as jnp
import numpy as np

import jclt
from jclt.coders import CoderConfig, CoderLayer, SparseCoder
from jclt.models import Model
from jclt.shapes import Array
from jclt.world.handmade import ANSWERS, PROMPTS, STATE_OF_CITY

LAST = 2
Node = tuple
"""("token", position), ("feature", layer, position, index), ("logit", token) or ("bias",): all constants together."""


def faithful_coder(model: Model) -> SparseCoder:
    """The neurons, each writing to its own layer alone: a ReLU CLT with two active features, one in each layer."""
    up, down = model.params["up"], model.params["down"]
    return _coder(model, skipping=jnp.zeros_like(down[0]), read=up[1].T, write=down[1])


def unfaithful_coder(model: Model) -> SparseCoder:
    """A city's feature writes the state in layer 0 and the capital in layer 1, whose own features are gone.

    On the prompts it reconstructs both layers, with one active feature.
    """
    up, down = model.params["up"], model.params["down"]
    _, seen = jclt.run(model, np.asarray(PROMPTS), capture=("mlp_neurons", "mlp_out"))
    cities = np.arange(len(PROMPTS))
    active = seen["mlp_neurons"][0, cities, LAST, cities]
    capitals = seen["mlp_out"][1, :, LAST] - model.params["down_bias"][1][None]
    return _coder(
        model, skipping=capitals / active[:, None], read=jnp.zeros_like(up[1].T), write=jnp.zeros_like(down[1])
    )


def _coder(model: Model, *, skipping: Array, read: Array, write: Array) -> SparseCoder:
    """Layer 0 has its neurons, which write `skipping` to layer 1; layer 1 has features that read and write these."""
    p = model.params
    bias, constant = p["up_bias"], p["down_bias"]
    layers = (
        CoderLayer(p["up"][0].T, bias[0], None, jnp.stack([p["down"][0], skipping], axis=1), constant[0], None),
        CoderLayer(read, bias[1], None, write[:, None], constant[1], None),
    )
    config = CoderConfig("clt", model.config.mlp_width, "relu").fitted(model.config, model.name)
    return SparseCoder(layers, config)


def nodes(city: int) -> tuple[Node, Node, Node]:
    """The city's feature, the state's feature and the capital's logit."""
    return ("feature", 0, LAST, city), ("feature", 1, LAST, STATE_OF_CITY[city]), ("logit", ANSWERS[city])


def expected_edges(city: int, *, norms: bool = False, faithful: bool = True) -> dict[tuple[Node, Node], float]:
    """Every edge that is not 0, (target, source) -> value; `city` counts from 0. A feature's edges sum to its
    pre-activation, the logit's to the logit minus the mean logit.

    Without the state's feature, as the unfaithful coder has it, the city's writes the capital as well.
    """
    hop, state, logit = nodes(city)
    asked, bias = ("token", LAST), ("bias",)
    first, second, last = (np.sqrt(n / 39 + 1e-5) if norms else 1.0 for n in (3, 5, 10))
    into_hop = {("token", 1): 1.0, asked: 1.0, bias: -1.5}
    into_state = {hop: 1.0, asked: 1.0, bias: -1.5}
    capital = 4 * 0.5 * (1 - 1 / 24)
    into_logit = {state: capital, hop: -1 / 24} if faithful else {hop: capital - 1 / 24}
    into_logit |= {asked: -1 / 24} | ({bias: -2 / 24} if norms else {})
    edges = {(hop, source): value / first for source, value in into_hop.items()}
    if faithful:
        edges |= {(state, source): value / second for source, value in into_state.items()}
    return edges | {(logit, source): value / last for source, value in into_logit.items()}
