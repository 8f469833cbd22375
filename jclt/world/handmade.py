"""A transformer written by hand that answers in two hops, so that its attribution graph is known exactly.

A prompt is `<bos> city relation`; the answer is the capital of the city's state. The residual stream has one direction
for each token, each position and each copied city. Layer 0's head copies the city to the last position; a neuron of its
MLP for each city writes the state; a neuron of layer 1's MLP for each state writes the capital.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from jclt.models import Model, ModelConfig, declare

BEGIN, RELATION = 0, 1
CITY_TOKENS = tuple(range(2, 14))
STATE_TOKENS = tuple(range(14, 18))
CAPITAL_TOKENS = tuple(range(18, 22))
SPARE = (22, 23)
"""Tokens of no meaning. With norms on, the MLP biases write their directions."""

STATE_OF_CITY = (0, 1, 2, 3) * 3
"""Each city's state, both counted from 0: the neurons that stand for them in layer 0 and in layer 1."""
CAPITAL_OF = (2, 0, 3, 1)
"""Each state's capital, counted from 0."""
PROMPTS = tuple((BEGIN, city, RELATION) for city in CITY_TOKENS)
ANSWERS = tuple(CAPITAL_TOKENS[CAPITAL_OF[state]] for state in STATE_OF_CITY)
"""Each city's capital as a token."""

SHAPE = ModelConfig(
    family="gpt2",
    vocabulary=24,
    width=24 + 3 + 12,  # directions of the tokens, of the positions, of the copied cities
    layers=2,
    heads=1,
    mlp_width=12,
    context=3,
    norm="none",
    activation="relu",
    gated=False,
    mlp_bias=True,
    learned_positions=True,
    attn_scale=1.0,
    tied=True,
    bos_token=BEGIN,
)
SATURATED = 1000.0  # a score so far above the others that their exponentials are 0, also in float64


def compiled_two_hop(*, basis_seed: int | None = None, norms: bool = False) -> Model:
    """The model, in a random orthogonal basis of its residual stream where a seed for it is given.

    At the last position every edge is the same for all cities. Into the city's neuron in layer 0: its embedding 1, the
    relation's 1, bias -1.5. Into the state's neuron in layer 1: the city's neuron 1, the relation's embedding 1, bias
    -1.5. Into the capital's logit minus the mean logit: the state's neuron 2 (1 - 1/24); the city's neuron and the
    relation's embedding -1/24 each, since they too are tokens' directions. Every other edge is 0.

    `norms` switches RMSNorm on, and biases of the down projections, each of which writes a spare token's direction;
    layer 1 reads that of layer 0 as a third of its -1.5. What writes to the stream makes up for the denominator of what
    it read, so each edge is the one above divided by its target's own denominator, sqrt(n / 39 + epsilon): n = 3 for
    the neuron in layer 0, 5 for the one in layer 1, 10 for the logit, which also has a bias of -2/24 to divide.
    """
    config = replace(SHAPE, norm="rms") if norms else SHAPE
    biased = float(norms)
    # The squared length of what layer 0's attention and the two MLPs read, at the positions that matter.
    attention, first, second = (np.sqrt(n / config.width + config.norm_epsilon) if norms else 1.0 for n in (2, 3, 5))

    basis = np.eye(config.width)
    if basis_seed is not None:
        basis = np.linalg.qr(np.random.default_rng(basis_seed).standard_normal(basis.shape))[0]
    token, position, copied = np.split(basis, [config.vocabulary, config.vocabulary + config.context])
    cities, states, capitals, spare = (token[list(ids)] for ids in (CITY_TOKENS, STATE_TOKENS, CAPITAL_TOKENS, SPARE))

    w = {name: np.full(weight.shape, weight.constant) for name, weight in declare(config).items()}
    w["token_embedding"], w["position_embedding"] = token, position
    # Each position's query is the key of the one before.
    w["query"][0, :, 0, :2], w["key"][0, :, 0, :2] = position[1:].T, SATURATED * position[:2].T
    w["value"][0, :, 0, :12], w["attn_out"][0, 0, :12] = cities.T, attention * copied

    w["up"][0], w["up_bias"][0] = (copied + token[RELATION]).T, -1.5 / first
    w["down"][0] = 2 * first * states[list(STATE_OF_CITY)]
    w["up"][1, :, :4] = (states + token[RELATION] - 0.5 * biased * spare[0]).T
    w["up_bias"][1] = (-1.5 + 0.5 * biased) / second
    w["down"][1, :4] = 4 * second * capitals[list(CAPITAL_OF)]
    w["down_bias"] = biased * spare
    return Model(config, {name: jnp.asarray(own, jnp.float32) for name, own in w.items()}, None, "compiled two-hop")
