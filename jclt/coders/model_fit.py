"""Does a coder belong to a model: what it reconstructs of a short text."""

import logging
from contextlib import nullcontext
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jclt.coders.coder import Coder
from jclt.errors import UserError
from jclt.kernels.matmuls import einsum, exact
from jclt.mesh import fetched, mesh_of
from jclt.models import Model, run
from jclt.shapes import Array, ArrayLike, Float, Int
from jclt.world import TASKS

log = logging.getLogger(__name__)

PROBE_TOKENS = 128


class Fit(NamedTuple):
    """For each covered layer the normalised error, 1 where the mean would do as well, and active features a token."""

    error: np.ndarray
    active: np.ndarray


def measure_fit(coder: Coder, model: Model) -> Fit:
    """On text that ships, or random tokens where the model has no tokenizer; a layer at a time, so that beside the
    coder there is room for little more."""
    config = coder.config
    _, seen = run(model, _probe_tokens(model), capture=(config.reads, config.writes))
    # Models treat the first position as no other: it is a place to rest attention on.
    x, y = (fetched(seen[site]).astype(np.float32)[list(config.covered), 1:] for site in (config.reads, config.writes))
    mesh = mesh_of(jax.tree.leaves(coder)[0])
    written, active = np.zeros_like(y), np.zeros(len(y))
    with jax.set_mesh(mesh) if mesh else nullcontext():
        for layer, own in enumerate(map(jnp.asarray, x)):
            a = coder.encode(layer, own)
            active[layer] = np.asarray(jnp.sum(a != 0, axis=-1)).mean()
            rows = coder.rows(layer)
            for row in range(rows.shape[1]):
                written[layer + row] += np.asarray(_added(a, rows, np.int32(row)), np.float32)
            written[layer] += np.asarray(coder.constant(layer), np.float32)
            if (skip := coder.skip(layer)) is not None:
                written[layer] += x[layer] @ np.asarray(skip, np.float32).T
    left = np.square(y - written).sum((1, 2))
    spread = np.square(y - y.mean(1, keepdims=True)).sum((1, 2))
    return Fit(left / np.maximum(spread, np.finfo(np.float32).tiny), active)


@jax.jit
def _added(a: Float[Array, "N F"], rows: Float[Array, "F R D"], row: Int[ArrayLike, ""]) -> Float[Array, "N D"]:
    """What features write to one of the layers that they reach."""
    own = jax.lax.dynamic_index_in_dim(rows, row, axis=1, keepdims=False)
    return einsum("nf,fd->nd", exact(a, own), own)


def check_fit(coder: Coder, model: Model, name: str) -> None:
    """An error saying plainly that the coder is not this model's; a warning where its files name this very model, and
    it has not learnt enough yet."""
    error, active = measure_fit(coder, model)
    c = coder.config
    fires = 0 < active.mean() < c.features or c.kind == "neurons"
    if error.mean() < 1 and fires:
        return
    found = (
        f"on a short text it misses {error.mean():.3g} of the variance with {active.mean():.3g} of {c.features} "
        "features active a token and layer, expected less than 1 and some but not all"
    )
    if c.model_fingerprint and c.model_fingerprint == model.fingerprint and np.isfinite(error).all():
        log.warning("coder '%s' fits model '%s' badly, which it was trained on: %s", name, model.name, found)
        return
    other = ""
    if c.model_fingerprint and c.model_fingerprint != model.fingerprint:
        other = (
            f"it was trained on model '{c.model}' (fingerprint {c.model_fingerprint}), not on this one "
            f"({model.fingerprint}); "
        )
    elif c.model not in ("", model.name):
        other = f"its files name model '{c.model}'; "
    raise UserError(
        f"coder '{name}' does not fit model '{model.name}': {other}{found} (check=False loads it all the same)"
    )


def _probe_tokens(model: Model) -> np.ndarray:
    length = min(model.config.context, PROBE_TOKENS)
    if model.tokenizer is None:
        return np.random.default_rng(0).integers(0, model.config.vocabulary, length)
    text = " ".join(example.prompt for task in TASKS.values() for example in task.examples("report", 3, seed=0))
    return np.asarray(model.encode(text)[:length])
