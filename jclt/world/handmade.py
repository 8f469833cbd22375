"""A transformer with weights set by hand, which answers in two hops; its attribution graph is known exactly.

A prompt is `<bos> city relation`; the answer is the capital of the city's state. The residual stream has one direction
for each token, each position and each copied city. The head of layer 0 copies the city to the last position. In the MLP
of layer 0 a neuron for each city writes the state; in the MLP of layer 1 a neuron for each state writes the capital.
"""

from dataclasses import replace
from typing import Literal

import jax.numpy as jnp
import numpy as np

from jclt.models import Model, ModelConfig, declare

BEGIN, RELATION = 0, 1
CITY_TOKENS = tuple(range(2, 14))
STATE_TOKENS = tuple(range(14, 18))
CAPITAL_TOKENS = tuple(range(18, 22))
SPARE = (22, 23)
"""Tokens without meaning. With `norms`, the MLP biases write their directions."""

STATE_OF_CITY = (0, 1, 2, 3) * 3
"""For the number of each city the number of its state. They are also the neurons of the two layers."""
CAPITAL_OF = (2, 0, 3, 1)
"""For the number of each state the number of its capital."""
PROMPTS = tuple((BEGIN, city, RELATION) for city in CITY_TOKENS)
ANSWERS = tuple(CAPITAL_TOKENS[CAPITAL_OF[state]] for state in STATE_OF_CITY)
"""The token of each city's capital."""

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
SATURATED = 1000.0  # this score is so much larger than the others that their exponentials are 0, also in float64


def build_two_hop(*, basis_seed: int | None = None, norms: bool | Literal["layer"] = False) -> Model:
    """The model; with a seed, in a random orthogonal basis of its residual stream.

    All edges into the last position are these, for every city:

    | target | source: edge |
    |---|---|
    | city's neuron in layer 0 | city's embedding: 1, relation's embedding: 1, bias: -1.5 |
    | state's neuron in layer 1 | city's neuron: 1, relation's embedding: 1, bias: -1.5 |
    | capital's logit minus the mean logit | state's neuron: 2 (1 - 1/24), city's neuron: -1/24, relation's: -1/24 |

    The last two are not 0 because the state and the relation are also directions of tokens.

    `norms` adds RMSNorm, and biases of the down projections, each of which writes the direction of a spare token.
    Layer 1 reads the one of layer 0 as a third of its -1.5. Each write compensates for the denominator of its read. So
    each edge is the one above divided by the denominator of its target, sqrt(n / 39 + epsilon): n = 3 for the neuron in
    layer 0, 5 for the one in layer 1, and 10 for the logit, which also has an edge of -2/24 from the biases. With
    "layer" it is a layer norm, and 40 in place of 39: such a model can be saved.
    """
    config = replace(SHAPE, norm="rms") if norms else SHAPE
    if norms == "layer":
        config = replace(SHAPE, norm="layer", width=SHAPE.width + 1, qkv_bias=True, attn_out_bias=True)
    bias = float(bool(norms))
    # n is the squared length of what layer 0's attention and the two MLPs read, at the positions that matter.
    attention, first, second = (np.sqrt(n / config.width + config.norm_epsilon) if norms else 1.0 for n in (2, 3, 5))

    basis = np.eye(config.width)
    if basis_seed is not None or norms == "layer":
        drawn = np.random.default_rng(basis_seed or 0).standard_normal(basis.shape)
        if norms == "layer":
            drawn[:, 0] = 1  # the mean, which the norm takes away; every direction of the model is orthogonal to it
        basis = np.linalg.qr(drawn)[0].T[config.width - SHAPE.width :]
    token, position, copied = np.split(basis, [config.vocabulary, config.vocabulary + config.context])
    cities, states, capitals, spare = (token[list(ids)] for ids in (CITY_TOKENS, STATE_TOKENS, CAPITAL_TOKENS, SPARE))

    w = {name: np.full(weight.shape, weight.constant) for name, weight in declare(config).items()}
    w["token_embedding"], w["position_embedding"] = token, position
    # Each position's query is the key of the one before.
    w["query"][0, :, 0, :2], w["key"][0, :, 0, :2] = position[1:].T, SATURATED * position[:2].T
    w["value"][0, :, 0, :12], w["attn_out"][0, 0, :12] = cities.T, attention * copied

    w["up"][0], w["up_bias"][0] = (copied + token[RELATION]).T, -1.5 / first
    w["down"][0] = 2 * first * states[list(STATE_OF_CITY)]
    w["up"][1, :, :4] = (states + token[RELATION] - 0.5 * bias * spare[0]).T
    w["up_bias"][1] = (-1.5 + 0.5 * bias) / second
    w["down"][1, :4] = 4 * second * capitals[list(CAPITAL_OF)]
    w["down_bias"] = bias * spare
    params = {name: jnp.asarray(weight, jnp.float32) for name, weight in w.items()}
    return Model(config, params, None, "handmade two-hop")
