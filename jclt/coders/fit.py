"""Does a coder belong to a model: what it reconstructs of a short text."""

from contextlib import nullcontext
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jclt.coders.coder import Coder
from jclt.errors import UserError
from jclt.models import Model, run
from jclt.sharding import mesh_of
from jclt.world import TASKS

PROBE_TOKENS = 128


class Fit(NamedTuple):
    """For each covered layer the normalised error, 1 where the mean would do as well, and active features a token."""

    error: np.ndarray
    active: np.ndarray


def measure_fit(coder: Coder, model: Model) -> Fit:
    """On text that ships, or random tokens where the model has no tokenizer."""
    config = coder.config
    _, seen = run(model, _probe_tokens(model), capture=(config.reads, config.writes))
    # Models treat the first position as no other: it is a place to rest attention on.
    x, y = (np.asarray(seen[site], np.float32)[list(config.covered), 1:] for site in (config.reads, config.writes))
    mesh = mesh_of(jax.tree.leaves(coder)[0])
    with jax.set_mesh(mesh) if mesh else nullcontext():
        inputs = [jnp.asarray(own) for own in x]
        activations = [coder.encode(layer, own) for layer, own in enumerate(inputs)]
        written = [coder.write(layer, activations, own) for layer, own in enumerate(inputs)]
    left = np.square(y - np.stack([np.asarray(own, np.float32) for own in written])).sum((1, 2))
    spread = np.square(y - y.mean(1, keepdims=True)).sum((1, 2))
    return Fit(
        left / np.maximum(spread, np.finfo(np.float32).tiny),
        np.array([(np.asarray(a) != 0).sum(-1).mean() for a in activations]),
    )


def check_fit(coder: Coder, model: Model, name: str) -> None:
    """An error saying plainly that the coder is not this model's."""
    error, active = measure_fit(coder, model)
    fires = 0 < active.mean() < coder.config.features or coder.config.kind == "neurons"
    if not (error.mean() < 1 and fires):
        raise UserError(
            f"coder '{name}' does not fit model '{model.name}': on a short text it misses {error.mean():.3g} of the "
            f"variance with {active.mean():.3g} of {coder.config.features} features active a token and layer, "
            "expected less than 1 and some but not all (check=False loads it all the same)"
        )


def _probe_tokens(model: Model) -> np.ndarray:
    length = min(model.config.context, PROBE_TOKENS)
    if model.tokenizer is None:
        return np.random.default_rng(0).integers(0, model.config.vocabulary, length)
    text = " ".join(example.prompt for task in TASKS.values() for example in task.examples("report", 3, seed=0))
    return np.asarray(model.encode(text)[:length])
