"""The sites: named values of the forward pass that can be captured and edited.

The transformer calls a `Sites` object with the site's name and the value, and goes on with the result. Where a site is
neither captured nor edited, the result is the value itself, and the compiled program is the one without sites.
"""
# JAX's types are partial, hence the exceptions.
# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax

from jclt.errors import UserError, suggest_name
from jclt.models.config import ModelConfig
from jclt.shapes import Array, Int, Layer

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

CODER_SITES: dict[str, str] = {
    "features": "B T F: activations of the coder's features",
    "errors": "B T D: what the MLP writes beyond the coder's output",
}
"""Values that a coder adds to a pass. `jclt.intervene` edits them; the model alone does not have them."""

SITE_AXES: dict[str, tuple[str, ...]] = {
    name: tuple(text.split(":")[0].split()) for name, text in (SITES | CODER_SITES).items()
}
"""The letters of each site's axes (`shapes.py`), without the layer axis."""

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
"""The names of TransformerLens and circuit-tracer for the same sites, relative to the block."""

PATTERNS_AND_DENOMINATORS = ("pattern", *(name for name in SITES if name.endswith("denominator")))
"""The sites that the local replacement model freezes. While they are constant, everything but the MLPs is linear."""


def list_absent_sites(config: ModelConfig) -> set[str]:
    """The sites that a model of this configuration does not have."""
    absent = set[str]() if config.qk_norm else {"query_denominator", "key_denominator"}
    absent |= set() if config.post_norms else {"attn_post_denominator", "mlp_post_denominator"}
    return absent | (set() if config.learned_positions else {"position_embedding"})


def check_sites(names: Iterable[str], config: ModelConfig) -> tuple[str, ...]:
    """The names as a tuple; an error for the first site that this model does not have. It translates peers' names."""
    names = (names,) if isinstance(names, str) else tuple(names)
    absent = list_absent_sites(config)
    for name in names:
        if name in PEER_NAMES and name not in SITES:
            raise UserError(f"site '{name}': this is called '{PEER_NAMES[name]}' here")
        if name in CODER_SITES:
            raise UserError(f"site '{name}': is a coder's, which `jclt.intervene` has")
        if name not in SITES:
            raise UserError(f"site '{name}' does not exist; {suggest_name(name, SITES)}")
        if name in absent:
            raise UserError(f"site '{name}': a {config.family} model of this configuration has none")
    return names


class Place(NamedTuple):
    """Where in a forward pass a value was computed."""

    site: str
    layer: Layer
    positions: Int[Array, "B T"] | None = None  # of the value's tokens; None: they start at 0


Edit = Callable[[Place, Array], Array]
"""`edit(place, value)` returns what the network goes on with. An edit that changes nothing returns `value` itself: then
the compiled program is the one without the edit."""


class Sites:
    """The sites of one layer, or those outside the layers: edits them, and collects the captured values in `seen`."""

    def __init__(
        self,
        layer: Layer,
        capture: tuple[str, ...] = (),
        edit: Edit | None = None,
        positions: Int[Array, "B T"] | None = None,
    ):
        self.layer, self.capture, self.edit, self.positions = layer, capture, edit, positions
        self.seen: dict[str, Array] = {}

    def __call__(self, name: str, value: Array) -> Array:
        # The compiler must not fuse across a site that is in use. Then a captured value is bit for bit the one that
        # the network goes on with, and putting it back changes nothing.
        if self.edit is not None:
            computed = jax.lax.optimization_barrier(value)
            edited = self.edit(Place(name, self.layer, self.positions), computed)
            if edited is not computed:
                value = jax.lax.optimization_barrier(edited)
        if name in self.capture:
            value = self.seen[name] = jax.lax.optimization_barrier(value)
        return value
