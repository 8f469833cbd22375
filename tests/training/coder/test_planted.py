"""The training code recovers a planted dictionary; a better reconstruction without sparsity does not."""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jclt.coders import CoderConfig
from jclt.mesh import make_mesh
from jclt.models import ModelConfig
from jclt.training.coder.harvest import Harvest
from jclt.training.coder.prepare import init_state
from jclt.training.coder.step import train_step
from jclt.training.coder.train import finish_coder
from jclt.training.config import TrainConfig

LAYERS, WIDTH, PLANTED, FEATURES, ROWS, LENGTH = 3, 48, 36, 64, 16, 24
MODEL = ModelConfig("llama", 8, WIDTH, LAYERS, 1, 8, LENGTH)  # never run: the batches are activations
SPARSE = TrainConfig(
    CoderConfig("clt", FEATURES, layers=(0, 1, 2), width=WIDTH),
    steps=450,
    batch=ROWS,
    length=LENGTH,
    sparsity_weight=1.5,
    initial_density=0.3,
    learning_rate=6e-3,
    warmup=20,
)
DENSE = replace(SPARSE, sparsity_weight=1e-4)
NOISE = 0.1


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Truth(NamedTuple):
    """Features that read one direction of their layer and write to some of the layers from it on. Every layer also
    writes a small dense part, which many features reconstruct better than few."""

    reads: np.ndarray  # [L, G, D]
    targets: np.ndarray  # [L, G, L], whether a feature of the first layer writes to the last
    writes: np.ndarray  # [L, G, L, D]
    dense: np.ndarray  # [L, D, D]


def plant(seed: int) -> Truth:
    rng = np.random.default_rng(seed)
    targets = np.zeros((LAYERS, PLANTED, LAYERS), bool)
    for source in range(LAYERS):
        for feature in range(PLANTED):
            later = np.arange(source, LAYERS)
            targets[source, feature, rng.choice(later, rng.integers(1, len(later) + 1), replace=False)] = True
    writes = unit(rng.standard_normal((LAYERS, PLANTED, LAYERS, WIDTH))) * targets[..., None]
    reads = unit(rng.standard_normal((LAYERS, PLANTED, WIDTH)))
    dense = np.linalg.qr(rng.standard_normal((LAYERS, WIDTH, WIDTH)))[0]
    return Truth(np.float32(reads), targets, np.float32(writes), np.float32(dense))


def activations(truth: Truth, number: int) -> Harvest:
    """What the layers read and write in the batch with this number, each `[B, L, T, D]`."""
    rng, shape = np.random.default_rng(number), (LAYERS, ROWS, LENGTH)
    active = (0.5 + rng.random((*shape, PLANTED), np.float32)) * (rng.random((*shape, PLANTED), np.float32) < 0.04)
    return compute_activations(truth, active, NOISE * rng.standard_normal((*shape, WIDTH), np.float32))


@jax.jit  # numpy draws: to compile jax.random takes longer than all of it
def compute_activations(truth: Truth, active: jax.Array, dense: jax.Array) -> Harvest:
    reads = jnp.einsum("lbtf,lfd->bltd", active, truth.reads) + jnp.moveaxis(dense, 0, 1)
    writes = jnp.einsum("sbtf,sfld->bltd", active, truth.writes) + jnp.einsum("lbtd,lde->blte", dense, truth.dense)
    return Harvest(reads, writes)


class Trained(NamedTuple):
    error: float  # mean over layers of the squared error over the variance, at the end
    dictionary: np.ndarray  # [L, F, L, D], every feature's decoders to all layers, zero where it does not reach


def train(config: TrainConfig, truth: Truth) -> Trained:
    mesh = make_mesh(1, 1)
    with jax.set_mesh(mesh):
        state = init_state(config, mesh, lambda i: jax.tree.map(lambda x: x.swapaxes(0, 1), activations(truth, i)))
        errors = []
        for step in range(config.steps):
            state, _, values = train_step(config, MODEL, False, state, None, {}, activations(truth, step))
            errors.append(values["nmse"])
        coder = finish_coder(state)
    rows = [np.pad(layer.decoder_rows, ((0, 0), (source, 0), (0, 0))) for source, layer in enumerate(coder.layers)]
    return Trained(float(np.mean(errors[-50:])), np.stack(rows))


class Recovery(NamedTuple):
    cosine: float  # mean over planted features of the largest cosine with any learned one, all decoders as one vector
    source: float  # share of planted features whose nearest learned one reads the same layer
    energy: float  # share of these features' decoders, squared, that lies on planted (source, target) pairs

    @property
    def passes(self) -> bool:
        return self.cosine >= 0.95 and self.source == 1 and self.energy >= 0.98


def recovery(truth: Truth, dictionary: np.ndarray) -> Recovery:
    planted, learned = truth.writes.reshape(-1, LAYERS, WIDTH), dictionary.reshape(-1, LAYERS, WIDTH)
    cosines = unit(planted.reshape(len(planted), -1)) @ unit(learned.reshape(len(learned), -1)).T
    nearest = cosines.argmax(1)
    energy = np.square(learned[nearest]).sum(-1)
    on_pairs = (energy * truth.targets.reshape(-1, LAYERS)).sum() / energy.sum()
    same = nearest // FEATURES == np.arange(len(planted)) // PLANTED
    return Recovery(float(cosines.max(1).mean()), float(same.mean()), float(on_pairs))


@pytest.fixture(scope="module")
def truth() -> Truth:
    return plant(0)


@pytest.fixture(scope="module")
def trained(truth) -> dict[str, Trained]:
    return {"sparse": train(SPARSE, truth), "dense": train(DENSE, truth)}


@pytest.mark.exhaustive  # slow, as it trains two coders
def test_a_planted_dictionary_is_recovered_with_its_layer_pairs(truth, trained):
    score = recovery(truth, trained["sparse"].dictionary)
    assert score.passes, score


@pytest.mark.exhaustive  # the control of the test above
def test_the_best_reconstruction_without_sparsity_fails_the_recovery(truth, trained):
    """It reconstructs better than the sparse run, and better than the planted features."""
    score = recovery(truth, trained["dense"].dictionary)
    assert not score.passes and score.cosine < 0.92, score
    assert trained["dense"].error < 0.8 * trained["sparse"].error
    assert trained["dense"].error < 0.9 * error_of_the_truth(truth)


def error_of_the_truth(truth: Truth) -> float:
    """The error of the planted features themselves: the dense part."""
    writes = np.concatenate([activations(truth, number).writes for number in range(20)])
    variance = writes.var(axis=(0, 2)).sum(-1)
    return float(np.mean(WIDTH * NOISE**2 / variance))


def test_a_random_dictionary_scores_low(truth):
    random = np.random.default_rng(1).standard_normal((LAYERS, FEATURES, LAYERS, WIDTH))
    reached = np.triu(np.ones((LAYERS, LAYERS)))
    score = recovery(truth, random * reached[:, None, :, None])
    assert score.cosine < 0.35 and not score.passes, score
