"""Gradients of a metric with respect to what every receiver reads, and the scores of edges that follow from them.

    score(s -> r) = sum over positions of (other[s] - own[s]) . gradient[r],    own, other: what s writes in two passes

It is how much the metric would change, to first order, if r alone read what s writes in the other pass.

The forward pass is the plain one. A zero is added to the queries, keys, values and MLP inputs of every layer, and to
what it writes at last; the gradient with respect to it is carried back through the norm that each receiver reads
through, for every receiver apart.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from jclt.circuits.edge_runs import WEIGHTS, read_streams
from jclt.circuits.edges import READS, ByReceiver, count_readers, join_receivers
from jclt.circuits.passes import run_pass
from jclt.circuits.rules import make_activate, make_rules_edit
from jclt.models import Compose, ModelConfig, Place, Sites
from jclt.models.weights import declare_layer_weights
from jclt.numerics import einsum
from jclt.shapes import Array, Float, Int, Params, Tokens

Measure = Callable[[Float[Array, "P V"]], Float[Array, "P"]]


class Shifts(eqx.Module):
    """Adds to the values of several sites. In a scan over layers each layer has its own part."""

    values: dict[str, Array]

    def __call__(self, place: Place, value: Array) -> Array:
        return value + self.values[place.site] if place.site in self.values else value


class Moves(NamedTuple):
    """What is added to a pass, so that it lies between two others."""

    embeddings: Float[Array, "P T D"]
    layers: dict[str, Array]  # at further sites, `[L, P, T, ...]`


def compute_gradients(
    config: ModelConfig,
    params: Params,
    tokens: Tokens,
    last: Int[Array, "P"],
    measure: Measure,
    moves: Moves,
    rules: tuple[str, ...] = (),
) -> ByReceiver:
    """The gradients of each prompt's metric by layer and receiver, `[L, P, T, h, D]`; of the logits `[P, T, D]`."""
    heads, shape, width = count_readers(config), (config.layers, *tokens.shape), config.width
    dtype = params["token_embedding"].dtype
    zeros = {read: jnp.zeros((*shape, heads[read], config.head_size), dtype) for read in READS[:-1]}
    zeros |= {site: jnp.zeros((*shape, width), dtype) for site in ("mlp_in", "resid_post")}

    def total(added: dict[str, Array]) -> tuple[Array, Mapping[str, Array]]:
        def move(place: Place, value: Array) -> Array:
            return value + moves.embeddings if place.site == "token_embedding" else value

        logits, seen = run_pass(
            config,
            params,
            tokens,
            last,
            edit=Compose((move, make_rules_edit(config, rules))),
            layer_edit=Shifts(added | moves.layers),
            capture=("resid_pre", "resid_mid"),
            activate=make_activate(rules),
        )
        return measure(logits).sum(), seen

    gradients, seen = jax.grad(total, has_aux=True)(zeros)
    layers = {read: pull_through_norms(config, params, read, seen, gradients[read], rules) for read in READS}
    return ByReceiver(layers, gradients["resid_post"][-1])


def pull_through_norms(
    config: ModelConfig,
    params: Params,
    read: str,
    seen: Mapping[str, Array],
    gradients: Float[Array, "L P T ..."],
    rules: tuple[str, ...],
) -> Float[Array, "L P T h D"]:
    """From gradients of what receivers make of the streams that they read, to those of the streams."""
    count = count_readers(config)[read]
    used = ("mlp_norm",) if read == "mlp_in" else ("attn_norm", WEIGHTS[read])
    weights = {name: params[name] for name in declare_layer_weights(config) if name.startswith(used)}

    def pull(scanned: tuple[Array, Params, Array, Array]) -> Array:
        layer, weights, stream, gradient = scanned
        site = Sites(layer, edit=make_rules_edit(config, rules))
        apart = jnp.broadcast_to(stream[:, :, None], (*stream.shape[:2], count, stream.shape[-1]))
        _, back = jax.vjp(lambda streams: read_streams(config, weights, read, site, streams), apart)
        return back(gradient)[0]

    streams = seen["resid_mid" if read == "mlp_in" else "resid_pre"]
    gradients = gradients[:, :, :, None] if read == "mlp_in" else gradients
    return jax.lax.map(pull, (jnp.arange(config.layers), weights, streams, gradients))


def multiply(changes: Float[Array, "s P T D"], gradients: ByReceiver) -> Float[Array, "P s r"]:
    """The scores of all pairs of a sender and a receiver, also of those that are no edge."""
    layers = {read: einsum("sptd,lpthd->lpsh", changes, gradient) for read, gradient in gradients.layers.items()}
    return join_receivers(ByReceiver(layers, einsum("sptd,ptd->ps", changes, gradients.logits)))
