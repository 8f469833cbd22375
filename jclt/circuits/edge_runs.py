"""A pass in which every receiver reads its own mix of senders: along edges that are kept what a sender writes in this
pass, along all others what it writes in another one (or nothing, or a mean).

    receiver r reads    sum over senders s of  kept[s, r] own[s] + (1 - kept[s, r]) other[s],  and the biases

With all edges it is the plain pass; without any it reads what the other pass has. `own[s]` follows from what s itself
reads, so a part all of whose inputs are replaced writes what it does in the other pass.

What a head writes are its values times its part of the output projection. Where attention has a norm behind it
(Gemma), they are divided by the denominator of the pass that they belong to.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jclt.circuits.edges import READS, find_sender_layers, list_senders, split_receivers
from jclt.models import ModelConfig, Sites, ops
from jclt.models.transformer import apply_norm, block, embed, make_context, project, unembed
from jclt.models.weights import declare_layer_weights
from jclt.numerics import einsum
from jclt.shapes import Array, Float, Int, Params, Stream, Tokens

WEIGHTS = {"queries": "query", "keys": "key", "values": "value"}


class Writes(NamedTuple):
    """What every sender adds to the residual stream in one pass."""

    input: Float[Array, "P T D"]
    layers: Float[Array, "L w P T D"]  # heads, then the MLP

    def stack(self) -> Float[Array, "s P T D"]:
        return jnp.concatenate([self.input[None], self.layers.reshape(-1, *self.input.shape)])


def spread_heads(
    config: ModelConfig, weights: Params, heads: Float[Array, "P T H K"], denominator: Float[Array, "P T"] | None
) -> Float[Array, "H P T D"]:
    """What each head of a layer adds to the residual stream; `denominator` is that of the norm after attention."""
    out = einsum("bthk,hkd->hbtd", heads, weights["attn_out"])
    if denominator is None:
        return out
    out = ops.center(out) if config.norm == "layer" else out
    gain = weights["attn_post_norm_gain"].astype(out.dtype) + jnp.asarray(config.norm_offset, out.dtype)
    return out / denominator[None, ..., None] * gain[None, None, None]


def collect_writes(config: ModelConfig, params: Params, seen: Mapping[str, Array]) -> Writes:
    """What senders write, of what a pass captured at `list_write_sites`."""
    stacked = {name: params[name] for name in ("attn_out", "attn_post_norm_gain") if name in params}

    def spread_layer(layer: tuple[Params, Array, Array | None]) -> Array:
        return spread_heads(config, *layer)

    heads = jax.lax.map(spread_layer, (stacked, seen["head_out"], seen.get("attn_post_denominator")))
    positions = seen.get("position_embedding")
    embeddings = seen["token_embedding"] if positions is None else seen["token_embedding"] + positions
    return Writes(embeddings, jnp.concatenate([heads, seen["mlp_out"][:, None]], axis=1))


def list_write_sites(config: ModelConfig) -> tuple[str, ...]:
    after_attention = ("attn_post_denominator",) if config.post_norms else ()
    positions = ("position_embedding",) if config.learned_positions else ()
    return ("token_embedding", *positions, "head_out", *after_attention, "mlp_out")


def read_streams(
    config: ModelConfig, weights: Params, read: str, site: Sites, streams: Float[Array, "P T h D"]
) -> Float[Array, "P T h K"]:
    """What a layer's receivers of one kind make of the residual streams that each of them reads: queries, keys or
    values, or the input of the MLP."""
    if read == "mlp_in":
        return apply_norm(config, weights, "mlp_norm", site, streams)
    normalized = apply_norm(config, weights, "attn_norm", site, streams)
    projected = project(weights, WEIGHTS[read], "bthd,dhk->bthk", normalized)
    if config.qk_norm and read != "values":
        return apply_norm(config, weights, f"{WEIGHTS[read]}_norm", site, projected)
    return projected


class EdgeState(NamedTuple):
    """How far a pass got."""

    streams: Float[Array, "l P T D"]  # before every block, and after the last one
    changes: Float[Array, "s P T D"]  # what replacing a sender adds to a stream; 0 for senders that are yet to come


def run_edges(
    config: ModelConfig,
    params: Params,
    tokens: Tokens,
    last: Int[Array, "P"],
    kept: Float[Array, "s r"],
    other: Writes,
) -> Float[Array, "P V"]:
    """The logits at each prompt's last token. `kept` is 1 for an edge that is kept, 0 for one that is not."""
    state = run_layers(config, params, begin_edges(config, params, tokens, other), kept, other, 0)
    return read_logits(config, params, state, kept, last)


def begin_edges(config: ModelConfig, params: Params, tokens: Tokens, other: Writes) -> EdgeState:
    x = embed(config, params, tokens, number_positions(tokens), Sites(None))
    streams = jnp.zeros((config.layers + 1, *x.shape), x.dtype).at[0].set(x)
    changes = jnp.zeros((len(list_senders(config)), *x.shape), x.dtype).at[0].set(other.input - x)
    return EdgeState(streams, changes)


def run_layers(
    config: ModelConfig,
    params: Params,
    state: EdgeState,
    kept: Float[Array, "s r"],
    other: Writes,
    first: int | Int[Array, ""],
) -> EdgeState:
    """Runs the blocks from the first one on. The state may be that of a run whose edges into earlier layers are kept
    alike."""
    dtype = state.streams.dtype
    positions = number_positions(state.streams[0, ..., 0])
    context = make_context(config, positions, positions.shape[1], dtype)
    replaced = split_receivers(config, 1 - kept.astype(dtype)).layers
    scanned = ({name: params[name] for name in declare_layer_weights(config)}, other.layers, replaced)

    def step(layer: Array, state: EdgeState) -> EdgeState:
        weights, of_layer, replaced = jax.tree.map(lambda x: x[layer], scanned)
        site = MixedReads(config, weights, layer, state.changes, of_layer, replaced)
        x, _ = block(context, weights, layer, site, state.streams[layer], None)
        return EdgeState(state.streams.at[layer + 1].set(x), site.changes)

    known = jnp.asarray(find_sender_layers(config)) < first
    state = state._replace(changes=jnp.where(known[:, None, None, None], state.changes, 0))
    return jax.lax.fori_loop(first, config.layers, step, state)


def read_logits(
    config: ModelConfig, params: Params, state: EdgeState, kept: Float[Array, "s r"], last: Int[Array, "P"]
) -> Float[Array, "P V"]:
    replaced = 1 - kept[:, -1].astype(state.streams.dtype)
    x = state.streams[-1] + einsum("sptd,s->ptd", state.changes, replaced)
    at_last = jnp.take_along_axis(x, last[:, None, None], axis=1)
    return unembed(config, params, at_last, Sites(None))[:, 0]


def number_positions(tokens: Array) -> Int[Array, "P T"]:
    """Each position's number, in the shape of the tokens."""
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape[:2])


class MixedReads(Sites):
    """The sites of one layer whose receivers each read their own mix; and what its senders write."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Params,
        layer: Array,
        changes: Float[Array, "s P T D"],
        other: Float[Array, "w _ T D"],  # one row for all prompts, or one each
        replaced: Mapping[str, Float[Array, "s h"]],
    ):
        super().__init__(layer)
        self.config, self.weights = config, weights
        self.changes, self.other, self.replaced = changes, other, replaced
        self.first = 1 + layer * (config.heads + 1)  # the number of the layer's first sender
        self.streams: dict[str, Array] = {}
        self.heads: Array | None = None
        self.denominator: Array | None = None

    def __call__(self, name: str, value: Array) -> Array:
        match name:
            case "resid_pre":
                self.mix(READS[:-1], value)
            case "queries" | "keys" | "values":
                return read_streams(self.config, self.weights, name, Sites(self.layer), self.streams[name])
            case "head_out":
                self.heads = value
            case "attn_post_denominator":
                self.denominator = value
            case "resid_mid":
                assert self.heads is not None
                heads = spread_heads(self.config, self.weights, self.heads, self.denominator)
                if self.config.parallel:
                    self.mix(READS[-1:], value)
                self.add_changes(self.other[:-1] - heads, 0)
                if not self.config.parallel:
                    self.mix(READS[-1:], value)
            case "mlp_in":
                return read_streams(self.config, self.weights, name, Sites(self.layer), self.streams[name])[:, :, 0]
            case "mlp_out":
                self.add_changes(self.other[-1:] - value[None], self.config.heads)
        return value

    def mix(self, reads: tuple[str, ...], stream: Stream) -> None:
        """What each receiver reads: the stream of this pass, and the changes along edges that are not kept. The changes
        are many numbers, so all receivers of one stream are computed at once."""
        columns = jnp.concatenate([self.replaced[read] for read in reads], axis=1)
        mixed = stream[:, :, None] + einsum("sptd,sh->pthd", self.changes, columns)
        ends = np.cumsum([self.replaced[read].shape[1] for read in reads])[:-1]
        self.streams |= dict(zip(reads, jnp.split(mixed, ends.tolist(), axis=2), strict=True))

    def add_changes(self, changes: Float[Array, "w P T D"], offset: int) -> None:
        start = (self.first + offset, *(jnp.zeros_like(self.first),) * 3)
        self.changes = jax.lax.dynamic_update_slice(self.changes, changes, start)
