"""The residual stream is pushed between two layers: what the true model does, and what the replacement model does.

For one prompt and pushes v after layers l, three passes, each with v added to the residual stream after its layer:

    true       the model
    replaced   the coder's features stand in for the MLPs and are recomputed, with the coder's errors held constant
    fixed      every MLP writes what it wrote without the push

Without a push all three are the model. What the MLPs do in answer to the push is true - fixed; what the replacement
model says of it is replaced - fixed.

A push after layer l that makes the stream that of another prompt leaves the features of the layers up to l as they are,
and so what they write to later layers, which in the other prompt is something else. `push_with_writes` adds this
difference to what is written in the pass `replaced`. What the pass gains is what the coder does in one hop: features of
the layers up to l write what the model computes from the stream after l.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jclt.attribution.attribute import check_coder
from jclt.coders import Coder
from jclt.interventions.changes import make_changes
from jclt.interventions.feature_pass import Original, decode_dense, read_original
from jclt.interventions.groups import LENGTH_MULTIPLE, center_end
from jclt.interventions.intervene import make_feature_pass, use_one_device
from jclt.interventions.settings import EditParts, Setting
from jclt.models import Compose, Edit, Freeze, Model, ModelConfig, Place, forward
from jclt.models.model import Prompt, on_mesh, token_row
from jclt.shapes import Array, Captured, Float, Int, Params, Tokens


class Push(eqx.Module):
    """Adds values to the residual stream after a layer of the model, for each row of the batch one layer."""

    layers: Int[Array, "B"]
    values: Float[Array, "B T D"]

    def __call__(self, place: Place, value: Array) -> Array:
        if place.site != "resid_post":
            return value
        assert place.layer is not None
        here = (self.layers == place.layer)[:, None, None]
        return value + jnp.where(here, self.values, jnp.zeros_like(self.values)).astype(value.dtype)


class AddWrites(eqx.Module):
    """Adds values to what the MLP of each layer writes, for each row of the batch."""

    site: str = eqx.field(static=True)
    values: Float[Array, "L B T D"]

    def __call__(self, place: Place, value: Array) -> Array:
        if place.site != self.site or not isinstance(place.layer, int):
            return value
        return value + self.values[place.layer].astype(value.dtype)


class Streams(NamedTuple):
    """The residual stream after every layer, and the logits at the end minus their mean, before any soft cap."""

    layers: Float[np.ndarray, "L B T D"]
    logits: Float[np.ndarray, "B V"]


class Prepared(NamedTuple):
    """A prompt, ready for pushes."""

    model: Model
    coder: Coder
    tokens: Int[np.ndarray, "T"]  # padded
    length: int  # without the padding
    original: Original
    seen: Captured
    streams: Streams  # without a push; B = 1


class Reactions(NamedTuple):
    true: Streams
    replaced: Streams
    fixed: Streams


def prepare_prompt(model: Model, coder: Coder, prompt: Prompt) -> Prepared:
    """Runs the model without a push."""
    check_coder(model, coder)
    model, coder = use_one_device(model, coder)
    ids = token_row(model, prompt)
    tokens = np.zeros(min(-(-len(ids) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, model.config.context), np.int32)
    tokens[: len(ids)] = ids
    sites = Setting().list_frozen_sites(model.config)
    with on_mesh(model):
        batch, end = jnp.asarray(tokens)[None], jnp.int32(len(ids) - 1)
        original, seen, streams = _read(model.config, model.params, coder, batch, end, sites)
    return Prepared(model, coder, tokens, len(ids), original, seen, Streams(*jax.device_get(streams)))


def push_prompt(
    prepared: Prepared, layers: Int[np.ndarray, "B"], values: Float[np.ndarray, "B T D"], *, local: bool = False
) -> Reactions:
    """The three passes. `local`: patterns and denominators of norms are frozen in those that are not true, as in the
    local replacement model; by default nothing is frozen in any."""
    push = Push(jnp.asarray(layers, jnp.int32), jnp.asarray(values, jnp.float32))
    frozen = Freeze(prepared.seen if local else {})
    written = {prepared.coder.config.writes: prepared.original.writes}
    replaced = Compose((frozen, replace_mlps(prepared, push)))
    edits: tuple[Edit, ...] = (push, replaced, Compose((frozen, Freeze(written), push)))
    return Reactions(*(_run_push(prepared, len(layers), edit) for edit in edits))


def push_with_writes(
    prepared: Prepared,
    layers: Int[np.ndarray, "B"],
    values: Float[np.ndarray, "B T D"],
    writes: Float[np.ndarray, "L B T D"],
) -> Streams:
    """The pass `replaced`, where `writes` are added to what the coder writes."""
    push = Push(jnp.asarray(layers, jnp.int32), jnp.asarray(values, jnp.float32))
    added = AddWrites(prepared.coder.config.writes, jnp.asarray(writes, jnp.float32))
    return _run_push(prepared, len(layers), replace_mlps(prepared, push, added))


def replace_mlps(prepared: Prepared, *edits: Edit) -> Edit:
    """The coder's features in place of the MLPs, with edits of the sites."""
    parts = EditParts(make_changes([], prepared.coder.config), (), edits)
    return make_feature_pass(prepared.coder, parts, Setting(), prepared.original, records=False)


def _run_push(prepared: Prepared, rows: int, edit: Edit) -> Streams:
    model = prepared.model
    tokens, end = jnp.asarray(np.tile(prepared.tokens, (rows, 1))), jnp.int32(prepared.length - 1)
    with on_mesh(model):
        return Streams(*jax.device_get(_push(model.config, model.params, tokens, end, edit)))


def compare_writes(prepared: Prepared, other: Prepared) -> Float[np.ndarray, "L L T D"]:
    """For each layer l and each later one, what the features of the layers up to l write to it in the other prompt,
    minus what they write to it in this one."""
    coder, layers = prepared.coder, prepared.model.config.layers
    changes = other.original.activations - prepared.original.activations
    start = coder.config.first_position
    found = np.zeros((layers, layers, *prepared.streams.layers.shape[2:]), np.float32)
    for index, written in enumerate(jax.device_get(_decode_changes(coder, changes))):
        source = coder.config.covered[index]
        for step in range(1, coder.config.reach(index)):
            target = coder.config.covered[index + step]
            found[source:target, target, start : prepared.length] += written[0, start : prepared.length, step]
    return found


@eqx.filter_jit
def _decode_changes(coder: Coder, changes: Float[Array, "C B T F"]) -> list[Float[Array, "B T _ D"]]:
    return [decode_dense(coder, index, changes[index]) for index in range(len(coder.config.covered))]


@eqx.filter_jit
def _read(
    config: ModelConfig, params: Params, coder: Coder, tokens: Tokens, end: Int[Array, ""], sites: tuple[str, ...]
) -> tuple[Original, Captured, tuple[Array, Array]]:
    c = coder.config
    capture = tuple(dict.fromkeys((*sites, c.reads, c.writes, "resid_post", "resid_final")))
    _, seen, _ = forward(config, params, tokens, capture=capture)
    original = read_original(coder, seen[c.reads], seen[c.writes])
    streams = seen["resid_post"], center_end(config, params, seen, end)
    return original, {site: seen[site] for site in sites}, streams


@eqx.filter_jit
def _push(
    config: ModelConfig, params: Params, tokens: Tokens, end: Int[Array, ""], edit: Edit
) -> tuple[Float[Array, "L B T D"], Float[Array, "B V"]]:
    capture = ("resid_post", "resid_final")
    _, seen, _ = forward(config, params, tokens, capture=capture, edit=edit, unroll=True)
    return seen["resid_post"], center_end(config, params, seen, end)


def draw_like(values: Float[np.ndarray, "B T D"], generator: np.random.Generator) -> Float[np.ndarray, "B T D"]:
    """Random directions with the norms of these values at each position."""
    drawn = generator.standard_normal(values.shape)
    norms = np.linalg.norm(values, axis=-1, keepdims=True)
    return (drawn * norms / np.linalg.norm(drawn, axis=-1, keepdims=True)).astype(np.float32)


def list_writes(prepared: Prepared, layer: int, count: int) -> list[tuple[int, Float[np.ndarray, "D"], float]]:
    """Of the features that read this layer, the `count` that write most to it: position, what each writes, and its
    share of the norms of all."""
    coder, index = prepared.coder, prepared.coder.config.index(layer)
    if index is None:
        return []
    active = np.asarray(prepared.original.activations[index, 0, : prepared.length])
    position, feature = np.nonzero(active)
    if not len(feature):
        return []
    padded = np.resize(feature, -(-len(feature) // 64) * 64)  # few shapes, few programs
    rows = np.asarray(coder.take_decoder_rows(index, padded))[: len(feature), 0]
    writes = (rows * active[position, feature][:, None]).astype(np.float32)
    norms = np.linalg.norm(writes, axis=1)
    strongest = np.argsort(-norms, kind="stable")[:count]
    return [(int(position[i]), writes[i], float(norms[i] / norms.sum())) for i in strongest]
