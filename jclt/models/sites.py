"""The named places of the forward pass, and what can be done at each: capture, replace, freeze.

A site is a value on its way through the network. The transformer hands every value to a `Sites` object under the site's
name and goes on with what it gets back; where nothing was asked for, that is the value itself, and the compiled program
is the one without sites.
"""
# JAX's own types are partial, hence the exceptions.
# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable, Iterable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp

from jclt.errors import UserError, nearest
from jclt.models.config import ModelConfig
from jclt.shapes import Array, Bool, Layer

LAYER_SITES: dict[str, str] = {
    "resid_pre": "B T D: the residual stream before the block",
    "attn_denominator": "B T: what the norm before attention divides by",
    "attn_in": "B T D: what attention reads, after its norm",
    "query_denominator": "B T H: what the norm of the queries divides by (Qwen 3, Gemma 3)",
    "key_denominator": "B T G: what the norm of the keys divides by (Qwen 3, Gemma 3)",
    "queries": "B T H K: before rotation",
    "keys": "B T G K: before rotation",
    "values": "B T G K",
    "attn_scores": "B H T S: scaled and soft-capped, before the mask",
    "pattern": "B H T S: how much position T attends to position S",
    "head_out": "B T H K: each head's mix of values, before the output projection",
    "attn_raw_out": "B T D: what attention returns, before its post-norm",
    "attn_post_denominator": "B T: what the norm after attention divides by (Gemma)",
    "attn_out": "B T D: what attention adds to the residual stream",
    "resid_mid": "B T D: the stream that the MLP's norm reads (in parallel blocks, resid_pre)",
    "mlp_denominator": "B T: what the norm before the MLP divides by",
    "mlp_normalized": "B T D: the MLP's input after its norm, before the norm's gain and bias",
    "mlp_in": "B T D: what the MLP reads, after its norm",
    "mlp_neurons": "B T M: neurons, before the down projection",
    "mlp_raw_out": "B T D: what the MLP returns, before its post-norm",
    "mlp_post_denominator": "B T: what the norm after the MLP divides by (Gemma)",
    "mlp_out": "B T D: what the MLP adds to the residual stream",
    "resid_post": "B T D: the residual stream after the block",
}
"""Captured with a leading layer axis."""

MODEL_SITES: dict[str, str] = {
    "token_embedding": "B T D: embeddings of the tokens",
    "position_embedding": "B T D: embeddings of the positions (GPT-2)",
    "final_denominator": "B T: what the final norm divides by",
    "resid_final": "B T D: what the unembedding reads: the last resid_post after the final norm",
    "logits": "B T V",
}
"""Outside the layers."""

SITES = LAYER_SITES | MODEL_SITES

PEER_NAMES: dict[str, str] = {
    "hook_embed": "token_embedding",
    "hook_pos_embed": "position_embedding",
    "hook_resid_pre": "resid_pre",
    "ln1.hook_scale": "attn_denominator",
    "attn.hook_q": "queries",
    "attn.hook_k": "keys",
    "attn.hook_v": "values",
    "attn.hook_attn_scores": "attn_scores",
    "attn.hook_pattern": "pattern",
    "attn.hook_z": "head_out",
    "hook_attn_out": "attn_out",
    "hook_resid_mid": "resid_mid",
    "ln2.hook_scale": "mlp_denominator",
    "ln2.hook_normalized": "mlp_normalized",
    "mlp.hook_in": "mlp_in",
    "hook_mlp_in": "resid_mid",
    "mlp.hook_post": "mlp_neurons",
    "mlp.hook_out": "mlp_raw_out",
    "hook_mlp_out": "mlp_out",
    "hook_resid_post": "resid_post",
    "ln_final.hook_scale": "final_denominator",
}
"""What TransformerLens and circuit-tracer call the same places, relative to the block."""

PATTERNS_AND_DENOMINATORS = ("pattern", *(name for name in SITES if name.endswith("denominator")))
"""What the local replacement model freezes: with these constant, everything but the MLPs is linear."""

Edit = Callable[[str, Layer, Array], Array]
"""Given a site's name, its layer and its value there, returns what the network goes on with; often the value itself."""


def check_sites(names: Iterable[str], config: ModelConfig) -> tuple[str, ...]:
    """The names as a tuple, or an error naming the first that this model has not and, for a peer's name, ours."""
    absent: list[str] = [] if config.qk_norm else ["query_denominator", "key_denominator"]
    absent += [] if config.post_norms else ["attn_post_denominator", "mlp_post_denominator"]
    absent += [] if config.learned_positions else ["position_embedding"]
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if name in PEER_NAMES and name not in SITES:
            raise UserError(f"site '{name}': this is called '{PEER_NAMES[name]}' here")
        if name not in SITES:
            raise UserError(f"site '{name}' does not exist; {nearest(name, SITES)}")
        if name in absent:
            raise UserError(f"site '{name}': a {config.family} model of this configuration has none")
    return names


class Replace(eqx.Module):
    """An edit that puts given values at given sites, everywhere or where a mask says so.

    Values are shaped as they are captured (with a leading layer axis inside the layers, and without a batch axis where
    the prompt had none); a mask is any boolean array of as many axes that broadcasts to its value.
    """

    values: dict[str, Array]
    where: dict[str, Bool[Array, "..."]]

    def __init__(self, values: Mapping[str, Array], where: Mapping[str, Array] | None = None):
        for name in where or {}:
            if name not in values:
                raise UserError(f"replacement: a mask for site '{name}', but no values for it")
        self.values = {name: jnp.asarray(value) for name, value in values.items()}
        self.where = {name: jnp.asarray(mask) for name, mask in (where or {}).items()}
        for name, mask in self.where.items():
            if mask.ndim != self.values[name].ndim:
                raise UserError(
                    f"replacement of site '{name}': its mask has {mask.ndim} axes, expected {self.values[name].ndim}"
                )

    def __call__(self, name: str, layer: Layer, value: Array) -> Array:
        if name not in self.values:
            return value
        new, mask = self.values[name], self.where.get(name, jnp.ones((1,) * self.values[name].ndim, bool))
        if layer is not None:
            new, mask = new[layer], mask[layer if mask.shape[0] > 1 else 0]
        if new.ndim == value.ndim - 1:
            new, mask = new[None], mask[None]
        for kind, array in (("values", new), ("mask", mask)):
            if array.ndim != value.ndim or any(a not in (1, b) for a, b in zip(array.shape, value.shape, strict=True)):
                raise UserError(f"replacement of site '{name}': {kind} of shape {array.shape}, expected {value.shape}")
        if name not in self.where:
            return jnp.broadcast_to(new.astype(value.dtype), value.shape)
        return jnp.where(jnp.broadcast_to(mask, value.shape), new.astype(value.dtype), value)


class Sites:
    """What happens at the sites of one layer, or outside the layers; `seen` gathers what was captured."""

    def __init__(self, layer: Layer, capture: tuple[str, ...], freeze: tuple[str, ...], edit: Edit | None):
        self.layer, self.capture, self.freeze, self.edit = layer, capture, freeze, edit
        self.seen: dict[str, Array] = {}

    def __call__(self, name: str, value: Array) -> Array:
        # The barriers keep the compiler from fusing across a site that is in use: what was captured is then bit for
        # bit what the network went on with, and putting it back changes nothing.
        if self.edit is not None:
            held = jax.lax.optimization_barrier(value)
            edited = self.edit(name, self.layer, held)
            if edited is not held:
                value = jax.lax.optimization_barrier(edited)
        if name in self.freeze:
            value = jax.lax.stop_gradient(value)
        if name in self.capture:
            value = self.seen[name] = jax.lax.optimization_barrier(value)
        return value
