"""`change_groups`: many changes of one prompt's features, each of any number of features at once, and what each does to
the next token and to the prompt's other features.

The activations change by amounts that are known before the pass, so one compiled program serves single features and
groups, and every range of clamped layers:

    before a row's first changed layer  nothing has changed
    in its clamped layers, if any       out(l) = out0(l) + sum of change(s) W(s, l) + skip
    without clamped layers              out(l) = MLP(l) + sum of change(s) W(s, l), in every layer
    after the clamped layers            out(l) = MLP(l)

`ablate` is faster for single features of long prompts, and tells nothing of other features.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jclt.attribution.attribute import check_coder
from jclt.attribution.true_pass import stack_skips, widen
from jclt.coders import Coder
from jclt.errors import UserError
from jclt.interventions.ablate import check_features, check_tokens, encode_layers
from jclt.interventions.intervene import use_one_device
from jclt.interventions.settings import Setting, Treatment
from jclt.mesh import fetch_to_host
from jclt.models import Compose, Freeze, Model, ModelConfig, Place, forward
from jclt.models.model import Prompt, token_row
from jclt.numerics import einsum, kl_divergence
from jclt.shapes import Array, Captured, Float, Int, Params, Tokens

LENGTH_MULTIPLE = 8
"""Prompts are padded to a multiple of this, so that a few programs serve all lengths."""
BATCH_BYTES = 1 << 28
"""The most bytes of the activations of a batch's rows."""
MOST_ROWS = 64


class GroupEffects(NamedTuple):
    """What each change does, one row each, beside what was there before. Logits are those of the chosen tokens at the
    last position minus the mean logit, before any soft cap; probabilities are those after it."""

    original_logits: Float[np.ndarray, "k"]
    original_log_probabilities: Float[np.ndarray, "k"]
    original_activations: Float[np.ndarray, "n"]
    logits: Float[np.ndarray, "g k"]
    log_probabilities: Float[np.ndarray, "g k"]
    kl: Float[np.ndarray, "g"]  # of the next token's distribution after from that before, in nats
    activations: Float[np.ndarray, "g n"]  # that the coder computes in the changed pass, before changes of its own

    @property
    def effects(self) -> Float[np.ndarray, "g k"]:
        return self.logits - self.original_logits


class GroupSettings(NamedTuple):
    """What programs are compiled for."""

    model: ModelConfig
    reads: str
    writes: str
    frozen: tuple[str, ...]


def change_groups(
    model: Model,
    coder: Coder,
    prompt: Prompt,
    features: Int[np.ndarray, "n 3"],
    changes: Float[np.ndarray, "g n"],
    *,
    tokens: Int[np.ndarray, "k"],
    clamped: int = 0,
    attention: Treatment = "frozen",
    norms: Treatment = "frozen",
) -> GroupEffects:
    """Runs the model once for each row of `changes`: by what share of itself each feature's activation changes; -1
    takes it away.

    features    layer, position and feature of each
    tokens      whose logits to report
    clamped     the number of layers, from the first changed one on, that are clamped (constrained patching): features
                are written there alone. 0: the model's own MLPs react everywhere, and features are written everywhere
    """
    local = check_coder(model, coder)
    model, coder = use_one_device(model, coder)
    ids, tokens = token_row(model, prompt), check_tokens(tokens, model.config.vocabulary)
    features = check_features(features, len(ids), coder)
    if changes.shape[1:] != (len(features),) or clamped < 0:
        shape = f"changes of shape {changes.shape}, clamped={clamped}"
        raise UserError(f"{shape}: expected [g, {len(features)}], a column for each feature, and at least 0 layers")
    frozen = Setting(attention=attention, norms=norms).list_frozen_sites(model.config)
    settings = GroupSettings(model.config, local.reads, local.writes, frozen)
    padded = np.zeros(min(-(-len(ids) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, model.config.context), np.int32)
    padded[: len(ids)], end = ids, np.int32(len(ids) - 1)
    params, skips = widen(model.params), stack_skips(coder, model.config.layers)
    seen, logits, centred, active = read_unchanged(settings, params, coder, jnp.asarray(padded)[None], end)
    places = np.stack([np.searchsorted(coder.config.covered, features[:, 0]), *features.T[1:]]).astype(np.int32)
    before = np.asarray(active)[tuple(places)]
    listed = np.zeros((3, -(-len(features) // 64) * 64), np.int32)
    listed[:, : len(features)] = places
    window = np.int32(clamped)
    rows = min(choose_rows(settings, coder, len(padded)), 1 << max(len(changes) - 1, 0).bit_length())
    columns: list[tuple[np.ndarray, ...]] = []
    for start in range(0, len(changes), rows):
        part = np.zeros((rows, len(features)), np.float32)
        part[: len(changes) - start] = changes[start : start + rows]
        first = np.where(part != 0, features[:, 0], model.config.layers).min(axis=1, initial=model.config.layers)
        writes = write_changes(coder, model.config.layers, len(padded), places, part * before)
        clamping = (first.astype(np.int32), window)
        arguments = (jnp.asarray(padded), end, skips, seen, logits, clamping, writes, listed, tokens)
        columns.append(jax.device_get(run_groups(settings, params, coder, *arguments)))
    joined = [np.concatenate(column)[: len(changes)] for column in zip(*columns, strict=True)]
    joined[3] = joined[3][:, : len(features)]
    log_probabilities = np.asarray(jax.nn.log_softmax(logits))[tokens]
    return GroupEffects(np.asarray(centred)[tokens], log_probabilities, before, *joined)


def choose_rows(settings: GroupSettings, coder: Coder, length: int) -> int:
    config, model = coder.config, settings.model
    row_bytes = 4 * length * (len(config.covered) * config.features + 4 * model.layers * model.width)
    return int(np.clip(BATCH_BYTES // row_bytes, 1, MOST_ROWS))


def write_changes(
    coder: Coder, layers: int, length: int, places: Int[np.ndarray, "3 n"], changes: Float[np.ndarray, "B n"]
) -> Float[np.ndarray, "L B T D"]:
    """What changes of activations write to each layer of the model. `places` have covered layer, position, feature."""
    covered = coder.config.covered
    writes = np.zeros((layers, len(changes), length, coder.config.size), np.float32)
    for index, position in np.unique(places[:2, (changes != 0).any(axis=0)], axis=1).T:
        nodes = np.flatnonzero((places[0] == index) & (places[1] == position))
        numbers = np.resize(places[2, nodes], -(-len(nodes) // 32) * 32)  # few shapes, few programs
        rows = fetch_to_host(coder.take_decoder_rows(int(index), numbers))[: len(nodes)]
        for step in range(rows.shape[1]):
            writes[covered[index + step], :, position] += changes[:, nodes] @ rows[:, step].astype(np.float32)
    return writes


@partial(jax.jit, static_argnames=("settings",))
def read_unchanged(
    settings: GroupSettings, params: Params, coder: Coder, tokens: Tokens, end: Int[Array, ""]
) -> tuple[Captured, Float[Array, "V"], Float[Array, "V"], Float[Array, "C T F"]]:
    """What the coder reads and writes, and the frozen sites; the logits at the end, and centred; the activations."""
    sites = dict.fromkeys((settings.reads, settings.writes, *settings.frozen, "resid_final"))
    logits, seen, _ = forward(settings.model, params, tokens, capture=tuple(sites))
    encoded = encode_layers(coder, seen[settings.reads])
    return seen, logits[0, end], center_end(settings.model, params, seen, end)[0], encoded[:, 0]


def center_end(config: ModelConfig, params: Params, seen: Captured, end: Int[Array, ""]) -> Float[Array, "B V"]:
    """Logits at the end, before any soft cap, minus their mean."""
    table = params["token_embedding" if config.tied else "unembedding"]
    logits = einsum("bd,vd->bv", seen["resid_final"][:, end], table)
    return logits - logits.mean(axis=-1, keepdims=True)


@partial(jax.jit, static_argnames=("settings",))
@jax.named_scope("change_groups")
def run_groups(
    settings: GroupSettings,
    params: Params,
    coder: Coder,
    tokens: Int[Array, "T"],
    end: Int[Array, ""],
    skips: Float[Array, "L D D"] | None,
    seen: Captured,
    original_logits: Float[Array, "V"],
    clamping: tuple[Int[Array, "B"], Int[Array, ""]],
    writes: Float[Array, "L B T D"],
    places: Int[Array, "3 n"],
    chosen: Int[Array, "k"],
) -> tuple[Float[Array, "B k"], Float[Array, "B k"], Float[Array, "B"], Float[Array, "B n"]]:
    """Of each row the chosen tokens' centred logits and log-probabilities, the divergence, and the activations."""
    read = None
    first, window = clamping  # each row's first clamped layer, and the number of clamped layers

    def edit(place: Place, value: Array) -> Array:
        nonlocal read
        layer = place.layer
        if place.site == settings.reads:
            read = value
        if place.site != settings.writes:
            return value
        assert read is not None and layer is not None
        write = writes[layer].astype(value.dtype)
        clamped = seen[settings.writes][layer] + write
        if skips is not None:
            clamped = clamped + einsum("btd,ed->bte", read - seen[settings.reads][layer], skips[layer])
        is_clamped = (layer >= first) & (layer < first + window)
        reacting = value + jnp.where(window == 0, write, jnp.zeros_like(write))
        return jnp.where(is_clamped[:, None, None], clamped.astype(value.dtype), reacting)

    frozen = Freeze({site: seen[site] for site in settings.frozen})
    batch = jnp.broadcast_to(tokens, (writes.shape[1], len(tokens)))
    capture = (settings.reads, "resid_final")
    logits, after, _ = forward(settings.model, params, batch, capture=capture, edit=Compose((frozen, edit)))
    logits = logits[:, end]
    index, position, feature = places
    activations = encode_layers(coder, after[settings.reads])[index, :, position, feature].T
    kl = kl_divergence(jnp.broadcast_to(original_logits, logits.shape), logits)
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)[:, chosen]
    return center_end(settings.model, params, after, end)[:, chosen], log_probabilities, kl, activations
