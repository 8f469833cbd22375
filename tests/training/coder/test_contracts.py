"""The compiled train step: what it sends between devices, updates in place, and traces.

Without most optimizations the compiler makes the same program of it, and only worse code of that.
"""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import check_step
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from more_cases import mark_others

import jclt.training.coder.step as step_module
from jclt.coders import CoderConfig
from jclt.mesh import MESH_AXES, make_mesh, make_sharding
from jclt.models import ModelConfig, known_config
from jclt.pods.collectives import Collective, find_collectives
from jclt.training.coder.abstract import lower_step, make_step_inputs
from jclt.training.coder.forms import activate_dense
from jclt.training.coder.harvest import Harvest
from jclt.training.coder.objective import encode_dense, prepare_weights
from jclt.training.coder.prepare import init_state
from jclt.training.coder.step import train_step
from jclt.training.config import TrainConfig

# Sizes that meet in no other role, so that a shape says what its axes are.
MODEL = ModelConfig("llama", 96, 16, 2, 2, 40, 32)
FEATURES, BATCH, LENGTH, MICRO = 1024, 8, 12, 2
LAYERS, WIDTH = MODEL.layers, MODEL.width


def config(**settings) -> TrainConfig:
    coder = {"features": FEATURES} | settings.pop("coder", {})
    fitted = CoderConfig(**coder).fit_to_model(MODEL, "tiny")
    return TrainConfig(fitted, **{"batch": BATCH, "length": LENGTH, "micro_batches": MICRO} | settings)


@pytest.fixture(scope="module", params=[pytest.param((1, 4), marks=pytest.mark.exhaustive), (2, 2)], ids=["1x4", "2x2"])
def program(request):
    """The mesh's shape and the step compiled for it."""
    return request.param, lower_step(config(), MODEL, make_mesh(*request.param)).compile()


def test_the_step_sends_the_expected_few_things(program):
    shape, compiled = program
    check_step(compiled.as_text(), config(), *shape)


def test_the_state_is_updated_in_place(program):
    shape, compiled = program
    state = jax.tree.leaves(make_step_inputs(config(), MODEL, make_mesh(*shape)).state)
    state_bytes = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in state)
    assert compiled.memory_analysis().alias_size_in_bytes == state_bytes


def list_collectives(settings: TrainConfig, with_penalties: bool) -> list[Collective]:
    """The collectives of encoding one micro-batch on 4 feature shards."""
    mesh = make_mesh(1, 4)
    x = jax.ShapeDtypeStruct((48, WIDTH), jnp.float32, sharding=NamedSharding(mesh, P()))

    def run(state, x):
        weights, xs = prepare_weights(state.coder), (x,) * LAYERS
        if with_penalties:
            return encode_dense(settings, weights, xs, state.silent, jnp.ones(()))
        h = tuple(weights.coder.compute_preactivation(layer, x_) for layer, x_ in enumerate(xs))
        return activate_dense(weights.coder, h, weights.norms)

    with jax.set_mesh(mesh):
        text = jax.jit(run).lower(make_step_inputs(settings, MODEL, mesh).state, x).compile().as_text()
    return find_collectives(text)


@pytest.mark.parametrize("coder", [{}, {"activation": "relu"}, {"kind": "transcoder", "skip": True}])
def test_encoding_has_no_collective(coder):
    assert list_collectives(config(coder=coder), with_penalties=False) == []


def test_penalties_add_scalars_alone():
    collectives = list_collectives(config(), with_penalties=True)
    assert {op.kind for op in collectives} == {"all-reduce"} and len(collectives) <= 2
    assert all(op.largest == 1 for op in collectives)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_of_the_largest_activations_only_counts_travel(activation):
    collectives = list_collectives(
        config(coder={"activation": activation, "k": 24}, sparsity="none"), with_penalties=False
    )
    assert {op.kind for op in collectives} == {"all-reduce"} and len(collectives) <= LAYERS
    assert all(op.largest <= 48 for op in collectives), collectives  # op number for each token


def test_the_step_is_traced_once_and_starts_from_what_it_returns(monkeypatch):
    mesh, settings = make_mesh(2, 2), config(seed=17)
    traced, gradients = [], step_module.compute_gradients
    monkeypatch.setattr(step_module, "compute_gradients", lambda *args: traced.append(1) or gradients(*args))
    random = np.random.default_rng(0)
    inputs = make_step_inputs(settings, MODEL, mesh)

    def numbers(x: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(random.normal(size=x.shape).astype(x.dtype), x.sharding)

    with jax.set_mesh(mesh):
        where = make_sharding(mesh, (LAYERS, BATCH, LENGTH, WIDTH), (None, "batch", None, None))
        values = jax.ShapeDtypeStruct((LAYERS, BATCH, LENGTH, WIDTH), jnp.float32, sharding=where)
        harvest = Harvest(numbers(values), numbers(values))
        state = init_state(settings, mesh, lambda _: harvest)
        params = jax.tree.map(numbers, inputs.params)
        for x, y in zip(jax.tree.leaves(inputs.state), jax.tree.leaves(state), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype) and x.sharding.is_equivalent_to(y.sharding, x.ndim)
        losses = []
        for _ in range(3):
            tokens = random.integers(0, MODEL.vocabulary, (BATCH, LENGTH)).astype(np.int32)
            tokens = jax.device_put(tokens, inputs.tokens.sharding)
            state, _, report = train_step(settings, MODEL, False, state, None, params, tokens)
            losses.append(float(report["loss"]))
    assert len(traced) == 1
    assert np.isfinite(losses).all() and len(set(losses)) == 3


GPT2, GEMMA2 = known_config("gpt2"), known_config("google/gemma-2-2b")


@pytest.mark.parametrize(
    ("model", "layers", "features", "data", "shards"),
    mark_others(
        [
            (GPT2, 2, 16_384, 1, 256),
            (GPT2, GPT2.layers, 16_384, 1, 256),
            (GEMMA2, GEMMA2.layers, 98_304, 1, 256),
            (GEMMA2, 3, 98_304, 16, 64),
            (GEMMA2, GEMMA2.layers, 98_304, 16, 64),
        ],
        [(GPT2, 2, 16_384, 1, 256), (GEMMA2, 3, 98_304, 16, 64)],
    ),
    ids=lambda x: x.family if isinstance(x, ModelConfig) else str(x),
)
def test_the_step_type_checks_for_pods_that_are_not_here(model, layers, features, data, shards):
    model = replace(model, layers=layers)
    mesh = AbstractMesh((data, shards), MESH_AXES, axis_types=(AxisType.Explicit,) * 2)
    coder = CoderConfig(features=features).fit_to_model(model, "large")
    settings = TrainConfig(coder, batch=mesh.size, length=128, micro_batches=4, compute="bfloat16", remat=True)
    inputs = make_step_inputs(settings, model, mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        new, _, report = train_step.eval_shape(settings, model, False, inputs.state, None, inputs.params, inputs.tokens)
    assert jax.tree.map(placement, new) == jax.tree.map(placement, inputs.state)
    split = [layer.decoder.sharding.shard_shape(layer.decoder.shape)[0] for layer in new.coder.layers]
    assert set(split) == {features // shards}
    assert report["layers_nmse"].shape == (model.layers,)


def placement(x: jax.ShapeDtypeStruct) -> tuple:
    where = P() if x.sharding is None else x.sharding.spec
    return x.shape, x.dtype, tuple(where.partitions) + (None,) * (x.ndim - len(where.partitions)), where.unreduced


def test_an_end_to_end_step_type_checks_too():
    """The replacement model runs with its tokens split over all chips, as the model does."""
    mesh = AbstractMesh((2, 16), MESH_AXES, axis_types=(AxisType.Explicit,) * 2)
    settings = config(batch=32, micro_batches=1, end_to_end_steps=10)
    inputs = make_step_inputs(settings, MODEL, mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        new, *_ = train_step.eval_shape(settings, MODEL, True, inputs.state, None, inputs.params, inputs.tokens)
    assert jax.tree.map(placement, new) == jax.tree.map(placement, inputs.state)
