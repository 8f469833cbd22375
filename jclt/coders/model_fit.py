"""Checks that a coder belongs to a model, by its reconstruction error on a short text."""

import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jclt.coders.coder import Coder
from jclt.errors import UserError
from jclt.mesh import fetch_to_host, mesh_of, use_mesh
from jclt.models import Model, run
from jclt.numerics import einsum
from jclt.shapes import Array, ArrayLike, Float

log = logging.getLogger(__name__)

PROBE_TOKENS = 128
ROWS_AT_ONCE = 512
"""Decoder rows in memory at once."""

PROBE_TEXT = (
    "She works at the General Society Station Central (G The Civic General Nuclear Aviation (C The Academy "
    "Chemical Digital Northern (A Fact: Lionel Williams is a star of The athlete Pete Gordon plays the sport of "
    "The athlete Babe Hill plays the sport of calc: 21+54= calc: 24+42= calc: 62+77= Question: in the state of "
    "South Creek, what is the capital? Answer: The city of Mount Haven lies in a state with the capital Question: "
    "in the state of Mount Haven, what is the capital? Answer: Often the gardens near the pictures Yesterday the "
    "pictures behind the lamps Often the keys under the windows When Julia and Laura went to the beach, Laura gave "
    "a flower to After Grace and Daniel left the station, Daniel brought a flower to When Peter and Henry went to "
    "the school, Henry gave a letter to From 1323 a journey went on until 13 From 1912 a famine went on until 19 "
    "The drought lasted from 1138 to 11 English: poor or El contrario de mojado es The contrary of big is List: "
    "first third fifth Step: 1 after neon is List: novembre janvier mars Nest: « needle Nest: [ « anchor Nest: [ "
    "feather Copy: bell cup wagon hammer anchor carpet pillow barrel stone apple wagon Copy: carpet helmet apple "
    "ladder lantern stone spoon cup lantern stone Copy: shoe rope feather hammer mirror apple coin lantern candle "
    "spoon anchor brick apple"
)
"""The first prompts of each task of the small world (`jclt.world.TASKS`), so that the shipped model knows them."""


class Fit(NamedTuple):
    """How well a coder reconstructs, for each covered layer."""

    error: np.ndarray  # squared error over variance: 1 for a constant output, the mean
    active: np.ndarray  # active features per token


def measure_fit(coder: Coder, model: Model) -> Fit:
    """Measured on `PROBE_TEXT`, or on random tokens if the model has no tokenizer.

    It computes one layer at a time, with the decoder rows of active features, since the coder may leave little memory.
    """
    config = coder.config
    _, seen = run(model, _get_probe_tokens(model), capture=(config.reads, config.writes))
    # Without the first position: many models use it as an attention sink, and its activations are like no others.
    covered, start = list(config.covered), max(1, config.first_position)
    x, y = (fetch_to_host(seen[site]).astype(np.float32)[covered, start:] for site in (config.reads, config.writes))
    reconstruction, active = np.zeros_like(y), np.zeros(len(y))
    for layer, layer_input in enumerate(x):
        a = _encode(coder, layer, layer_input)
        active[layer] = (a != 0).sum(axis=-1).mean()
        ever_active = np.flatnonzero((a != 0).any(axis=0))
        for start in range(0, len(ever_active), ROWS_AT_ONCE):
            features = np.resize(ever_active[start : start + ROWS_AT_ONCE], ROWS_AT_ONCE)
            is_new = np.arange(ROWS_AT_ONCE) < len(ever_active) - start
            rows = coder.take_decoder_rows(layer, features)
            written = np.asarray(_decode_rows(np.where(is_new, a[:, features], 0), rows))
            reconstruction[layer : layer + written.shape[0]] += written
        reconstruction[layer] += np.asarray(coder.decoder_bias(layer), np.float32)
        if (skip := coder.skip(layer)) is not None:
            reconstruction[layer] += x[layer] @ np.asarray(skip, np.float32).T
    squared_error = np.square(y - reconstruction).sum((1, 2))
    variance = np.square(y - y.mean(1, keepdims=True)).sum((1, 2))
    return Fit(squared_error / np.maximum(variance, np.finfo(np.float32).tiny), active)


def _encode(coder: Coder, layer: int, x: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N F"]:
    encoder = coder.load_encoder(layer)
    mesh = mesh_of(jax.tree.leaves(encoder)[0])
    with use_mesh(mesh):
        return fetch_to_host(_encode_layer(encoder, jnp.asarray(x))).astype(np.float32)


@jax.jit
def _encode_layer(encoder: Coder, x: Float[Array, "N D"]) -> Float[Array, "N F"]:
    return encoder.encode(0, x)


@jax.jit
def _decode_rows(a: Float[ArrayLike, "N n"], rows: Float[Array, "n R D"]) -> Float[Array, "R N D"]:
    """What features write to each layer of their reach."""
    return einsum("nf,frd->rnd", jnp.asarray(a), rows.astype(jnp.float32))


def check_fit(coder: Coder, model: Model, name: str) -> None:
    """Raises an error if the coder is not this model's. Layers, width and sites have been compared before, when the
    coder's settings were read (`CoderConfig.fit_to_model`).

    If the coder's files name this very model, it logs a warning instead: the coder was then trained too little.
    """
    error, active = measure_fit(coder, model)
    c = coder.config
    some_active = 0 < active.mean() < c.features or c.kind == "neurons"
    if error.mean() < 1 and some_active:
        return
    figures = (
        f"on a short text it misses {error.mean():.3g} of the variance with {active.mean():.3g} of {c.features} "
        "features active a token and layer, expected less than 1 and some but not all"
    )
    if c.model_fingerprint and c.model_fingerprint == model.fingerprint and np.isfinite(error).all():
        log.warning("coder '%s' fits model '%s' badly, which it was trained on: %s", name, model.name, figures)
        return
    reason = ""
    if c.model_fingerprint and c.model_fingerprint != model.fingerprint:
        reason = (
            f"it was trained on model '{c.model}' (fingerprint {c.model_fingerprint}), not on this one "
            f"({model.fingerprint}); "
        )
    elif c.model not in ("", model.name):
        reason = f"its files name model '{c.model}'; "
    raise UserError(
        f"coder '{name}' does not fit model '{model.name}': {reason}{figures} (check=False loads it all the same)"
    )


def _get_probe_tokens(model: Model) -> np.ndarray:
    length = min(model.config.context, PROBE_TOKENS)
    if model.tokenizer is None:
        return np.random.default_rng(0).integers(0, model.config.vocabulary, length)
    return np.asarray(model.encode(PROBE_TEXT)[:length])
