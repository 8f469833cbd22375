"""The default settings on a model that nobody tuned them for: every layer keeps features alive and has its share."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from more_cases import mark_others

from jclt.coders import CoderConfig
from jclt.mesh import make_mesh
from jclt.models import ModelConfig
from jclt.training.coder.harvest import Harvest
from jclt.training.coder.prepare import init_state
from jclt.training.coder.step import train_step
from jclt.training.config import TrainConfig

LAYERS, WIDTH, HIDDEN, ROWS, LENGTH, STEPS = 4, 32, 64, 8, 32, 120
MODEL = ModelConfig("llama", 8, WIDTH, LAYERS, 1, 8, LENGTH)  # never run: the batches are activations
RULES = {"jumprelu": None, "topk": 4, "batchtopk": 16}


@cache
def make_batch(number: int) -> Harvest:
    """Layers of a residual stream. What they write grows by 5 from layer to layer around a constant vector."""
    weights, rng = np.random.default_rng(0), np.random.default_rng(1000 + number)
    stream = rng.standard_normal((ROWS, LENGTH, WIDTH))
    reads, writes = [], []
    for layer in range(LAYERS):
        up, down = (weights.standard_normal(shape) / 5 for shape in ((WIDTH, HIDDEN), (HIDDEN, WIDTH)))
        hidden = np.maximum(stream @ up - 0.5, 0)
        constant = weights.standard_normal(WIDTH)
        reads.append(stream / np.sqrt(np.mean(stream**2, axis=-1, keepdims=True)))
        writes.append(5.0**layer * (hidden @ down + constant))
        stream = stream + hidden @ down + 0.3 * rng.standard_normal(stream.shape)
    return Harvest(*(jnp.asarray(np.stack(x, axis=1), jnp.float32) for x in (reads, writes)))


def train(config: TrainConfig) -> dict[str, Any]:
    """The last step's metrics."""
    mesh = make_mesh(1, 1)
    with jax.set_mesh(mesh):
        state = init_state(config, mesh, lambda i: jax.tree.map(lambda x: x.swapaxes(0, 1), make_batch(i)))
        values: dict[str, Any] = {}
        for step in range(config.steps):
            state, _, values = train_step(config, MODEL, False, state, None, {}, make_batch(step % 30))
    return jax.device_get(values)


@pytest.mark.parametrize("rule", mark_others(RULES, ["batchtopk"]))
def test_no_layer_starves_under_the_defaults(rule):
    """With a BatchTopK of one pool and the settings of Circuit Tracing (2025), half of the last layer's features are
    dead after as many steps, and the first layer's error is twice its variance."""
    coder = CoderConfig("clt", 64, rule, RULES[rule], layers=tuple(range(LAYERS)), width=WIDTH)
    dead_after = 50 * ROWS * LENGTH
    values = train(TrainConfig(coder, steps=STEPS, batch=ROWS, length=LENGTH, dead_density=1 / dead_after))
    assert np.all(values["layers_dead"] < 0.2) and np.all(values["layers_nmse"] < 0.6)
    if rule == "batchtopk":
        share = values["layers_l0"] / (RULES[rule] / LAYERS)
        assert np.all((share >= 0.5) & (share < 2.5))
