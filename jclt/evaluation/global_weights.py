"""Weights between features that hold for every prompt, and how much of them is used.

The virtual weight from a source i to a target j of a later layer is what i writes to the layers in between, read by j's
encoder; through the residual stream alone, without attention and without the denominator of j's norm:

    V[j, i] = sum over layers l with l(i) <= l < l(j) of  W_dec(i, l) . W_enc(j)

Most of it never matters, as the two are not active together. With means E over tokens of data:

    ERA[j, i]    = E[1(a(j) > 0) a(i)] V[j, i]          expected residual attribution
    TWERA[j, i]  = E[a(j) a(i)] / E[a(j)] V[j, i]       the same, weighted by the target's activation
"""

from dataclasses import dataclass

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from jclt.attribution.attribute import check_coder
from jclt.coders import Coder
from jclt.errors import UserError
from jclt.features.weights import take_post_gains
from jclt.interventions.intervene import use_one_device
from jclt.models import Model, ModelConfig, forward, token_array
from jclt.models.ops import center
from jclt.numerics import einsum
from jclt.shapes import Array, Bool, Float, Int, Params, Tokens

ROWS = 16
"""Token rows of a batch."""


@dataclass(frozen=True, eq=False)
class GlobalWeights:
    """Among m features; row = target, column = source. 0 where the source's layer is not below the target's."""

    features: Int[np.ndarray, "m 2"]  # layer, number
    virtual: Float[np.ndarray, "m m"]
    era: Float[np.ndarray, "m m"]
    twera: Float[np.ndarray, "m m"]
    together: Float[np.ndarray, "m m"]  # the share of tokens on which both are active
    tokens: int

    def measure_interference(self, share: float = 0.01) -> dict[str, float]:
        """Of the largest positive and the largest negative virtual weights, `share` of all pairs each, the share whose
        features are never active together; beside all pairs."""
        later = self.features[:, None, 0] > self.features[None, :, 0]
        weights, unused = self.virtual[later], self.together[later] == 0
        count = max(1, round(share * len(weights)))
        order = np.argsort(-weights, kind="stable")
        return {
            "largest positive": float(unused[order[:count]].mean()),
            "largest negative": float(unused[order[-count:]].mean()),
            "all": float(unused.mean()),
        }


def measure_global_weights(
    model: Model,
    coder: Coder,
    rows: Int[np.ndarray, "N T"],
    features: Int[np.ndarray, "m 2"],
) -> GlobalWeights:
    """`features`: layer and number of each; `rows`: the data over which the means are taken."""
    check_coder(model, coder)
    model, coder = use_one_device(model, coder)
    tokens, listed = np.atleast_2d(token_array(model, rows)), np.asarray(features)
    if listed.ndim != 2 or listed.shape[1] != 2 or not set(listed[:, 0].tolist()) <= set(coder.config.covered):
        raise UserError(f"features: shape {listed.shape}, expected [m, 2]: layers {coder.config.covered}, and numbers")
    index = np.searchsorted(coder.config.covered, listed[:, 0]).astype(np.int32)
    sums = [np.zeros((len(listed),) * 2) for _ in range(3)]
    mean = np.zeros(len(listed))
    for start in range(0, len(tokens), ROWS):
        part = tokens[start : start + ROWS]
        mask = np.arange(ROWS) < len(part)
        batch = np.resize(part, (ROWS, tokens.shape[1]))
        arguments = map(jnp.asarray, (batch, mask, index, listed[:, 1].astype(np.int32)))
        found = _sum_products(model.config, model.params, coder, *arguments)
        *products, total = (np.asarray(x, np.float64) for x in found)
        sums = [a + b for a, b in zip(sums, products, strict=True)]
        mean += total
    count = tokens.size
    virtual = compute_virtual_weights(model, coder, listed)
    both, source_where_target, together = (x / count for x in sums)
    mean = mean / count
    weighted = both / np.where(mean > 0, mean, np.inf)[:, None]
    return GlobalWeights(listed, virtual, source_where_target * virtual, weighted * virtual, together, count)


def compute_virtual_weights(model: Model, coder: Coder, features: Int[np.ndarray, "m 2"]) -> Float[np.ndarray, "m m"]:
    covered = np.asarray(coder.config.covered)
    written = np.zeros((len(covered), len(features), model.config.width))
    read = np.zeros((len(features), model.config.width))
    for index, layer in enumerate(covered.tolist()):
        of_layer = np.flatnonzero(features[:, 0] == layer)
        if len(of_layer):
            decoder = np.asarray(coder.take_decoder_rows(index, features[of_layer, 1]), np.float64)
            gains = np.asarray(take_post_gains(model, coder, index), np.float64)
            written[index : index + decoder.shape[1], of_layer] = np.moveaxis(decoder * gains, 1, 0)
            read[of_layer] = fold_encoder(model, coder, index)[features[of_layer, 1]]
    virtual = np.zeros((len(features), len(features)))
    for index, layer in enumerate(covered.tolist()):
        later, earlier = features[:, 0] > layer, features[:, 0] <= layer
        virtual[np.ix_(later, earlier)] += read[later] @ written[index, earlier].T
    return np.where(features[:, None, 0] > features[None, :, 0], virtual, 0)


def fold_encoder(model: Model, coder: Coder, index: int) -> Float[np.ndarray, "F D"]:
    """The encoder's rows as directions of the residual stream: with the gain and the centring of the norm that the
    coder reads after."""
    rows, _ = coder.load_encoder(index).encoder(0)
    rows, config = jnp.asarray(rows, jnp.float32), model.config
    if coder.config.reads == "mlp_in" and "mlp_norm_gain" in model.params:
        gain = model.params["mlp_norm_gain"][coder.config.covered[index]].astype(jnp.float32)
        rows = rows * (gain + jnp.float32(config.norm_offset))[None]
    if coder.config.reads != "resid_mid" and config.norm == "layer":
        rows = center(rows)
    return np.asarray(rows, np.float64)


@eqx.filter_jit
def _sum_products(
    config: ModelConfig,
    params: Params,
    coder: Coder,
    tokens: Tokens,
    mask: Bool[Array, "B"],
    index: Int[Array, "m"],
    features: Int[Array, "m"],
) -> tuple[Float[Array, "m m"], Float[Array, "m m"], Float[Array, "m m"], Float[Array, "m"]]:
    """Sums over tokens of a(j) a(i), 1(a(j) > 0) a(i), 1(a(j) > 0) 1(a(i) > 0) and a(j)."""
    reads = coder.config.reads
    _, seen, _ = forward(config, params, tokens, capture=(reads,))
    encoded = jnp.stack([coder.encode(i, seen[reads][layer]) for i, layer in enumerate(coder.config.covered)])
    active = jnp.where(mask[None, :, None], encoded[index, :, :, features].astype(jnp.float32), jnp.float32(0))
    active = active.reshape(len(index), -1)
    fires = (active > 0).astype(jnp.float32)
    both, when, together = (einsum("jn,in->ji", a, b) for a, b in ((active, active), (fires, active), (fires, fires)))
    return both, when, together, active.sum(axis=1)


def choose_often_active(model: Model, coder: Coder, rows: Int[np.ndarray, "N T"], each: int) -> Int[np.ndarray, "m 2"]:
    """Of each covered layer the features that are active on most tokens."""
    counts = np.zeros((len(coder.config.covered), coder.config.features))
    for start in range(0, len(rows), ROWS):
        counts += np.asarray(_count_active(model.config, model.params, coder, jnp.asarray(rows[start : start + ROWS])))
    chosen = np.argsort(-counts, axis=1, kind="stable")[:, :each]
    return np.stack([np.repeat(coder.config.covered, each), chosen.ravel()], axis=1)


@eqx.filter_jit
def _count_active(config: ModelConfig, params: Params, coder: Coder, tokens: Tokens) -> Float[Array, "C F"]:
    reads = coder.config.reads
    _, seen, _ = forward(config, params, tokens, capture=(reads,))
    encoded = [coder.encode(i, seen[reads][layer]) for i, layer in enumerate(coder.config.covered)]
    return jnp.stack([jnp.sum((a > 0).astype(jnp.float32), axis=(0, 1)) for a in encoded])
