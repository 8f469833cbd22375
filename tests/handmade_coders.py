"""A faithful and an unfaithful coder of the handmade model, and the edges that their graphs must have."""

import jax
import jax.numpy as jnp
import numpy as np

import jclt
from jclt.coders import CoderConfig, CoderLayer, SparseCoder
from jclt.models import Model
from jclt.world.handmade import ANSWERS, PROMPTS, STATE_OF_CITY

VARIANTS = {
    "plain": {},
    "rotated": {"basis_seed": 1},
    "norms": {"norms": True},
    "rotated norms": {"basis_seed": 2, "norms": True},
}
"""The options of `build_two_hop` that make each variant of the model."""
LAST = 2
Node = tuple
"""("token", position), ("feature", layer, position, index), ("logit", token) or ("bias",): all constants together."""


def faithful_coder(model: Model) -> SparseCoder:
    """A ReLU CLT whose features are the neurons and write only to their layer. One is active in each layer."""
    up, down = np.asarray(model.params["up"]), np.asarray(model.params["down"])
    return _coder(model, skipping=np.zeros_like(down[0]), read=up[1].T, write=down[1])


def unfaithful_coder(model: Model) -> SparseCoder:
    """The feature of a city writes the state in layer 0 and the capital in layer 1; layer 1 has no features.

    On the prompts it reconstructs both layers with one active feature.
    """
    up, down = np.asarray(model.params["up"]), np.asarray(model.params["down"])
    _, seen = jax.device_get(jclt.run(model, np.asarray(PROMPTS), capture=("mlp_neurons", "mlp_out")))
    cities = np.arange(len(PROMPTS))
    active = seen["mlp_neurons"][0, cities, LAST, cities]
    capitals = seen["mlp_out"][1, :, LAST] - np.asarray(model.params["down_bias"])[1]
    return _coder(model, skipping=capitals / active[:, None], read=np.zeros_like(up[1].T), write=np.zeros_like(down[1]))


def _coder(model: Model, *, skipping: np.ndarray, read: np.ndarray, write: np.ndarray) -> SparseCoder:
    """The features of layer 0 are its neurons and also write `skipping` to layer 1; those of layer 1 read `read`."""
    p = jax.device_get(model.params)
    bias, constant = p["up_bias"], p["down_bias"]
    layers = (
        (p["up"][0].T, bias[0], None, np.stack([p["down"][0], skipping], axis=1), constant[0], None),
        (read, bias[1], None, write[:, None], constant[1], None),
    )
    config = CoderConfig("clt", model.config.mlp_width, "relu").fit_to_model(model.config, model.name)
    return SparseCoder(tuple(CoderLayer(*jax.tree.map(jnp.asarray, layer)) for layer in layers), config)


def nodes(city: int) -> tuple[Node, Node, Node]:
    """The city's feature, the state's feature and the capital's logit."""
    return ("feature", 0, LAST, city), ("feature", 1, LAST, STATE_OF_CITY[city]), ("logit", ANSWERS[city])


def expected_edges(city: int, *, norms: bool = False, faithful: bool = True) -> dict[tuple[Node, Node], float]:
    """Every edge that is not 0, as (target, source) -> value, for the city with this number.

    The edges of a feature sum to its pre-activation, those of the logit to the logit minus the mean logit. In the
    unfaithful coder there is no feature for the state, and the city's feature writes the capital.
    """
    hop, state, logit = nodes(city)
    token, bias = ("token", LAST), ("bias",)
    first, second, last = (np.sqrt(n / 39 + 1e-5) if norms else 1.0 for n in (3, 5, 10))
    into_hop = {("token", 1): 1.0, token: 1.0, bias: -1.5}
    into_state = {hop: 1.0, token: 1.0, bias: -1.5}
    capital = 4 * 0.5 * (1 - 1 / 24)
    into_logit = {state: capital, hop: -1 / 24} if faithful else {hop: capital - 1 / 24}
    into_logit |= {token: -1 / 24} | ({bias: -2 / 24} if norms else {})
    edges = {(hop, source): value / first for source, value in into_hop.items()}
    if faithful:
        edges |= {(state, source): value / second for source, value in into_state.items()}
    return edges | {(logit, source): value / last for source, value in into_logit.items()}
