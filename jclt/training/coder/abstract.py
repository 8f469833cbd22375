"""The train step for abstract arrays: its inputs, and its lowering for devices that need not be present."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jclt.coders import SparseCoder, abstract_coder
from jclt.mesh import AnyMesh, make_sharding
from jclt.models import ModelConfig, abstract_params
from jclt.training.coder.harvest import Scaling
from jclt.training.coder.state import CoderState, make_state
from jclt.training.coder.step import train_step
from jclt.training.config import TrainConfig, select_step_settings


class StepInputs(NamedTuple):
    """Shapes, dtypes and shardings of the arrays that `train_step` takes."""

    state: CoderState
    params: dict[str, jax.ShapeDtypeStruct]
    tokens: jax.ShapeDtypeStruct


def make_step_inputs(config: TrainConfig, model: ModelConfig, mesh: AnyMesh) -> StepInputs:
    shape = (config.batch, config.length)
    return StepInputs(
        abstract_state(config, mesh),
        abstract_params(model, mesh, jnp.dtype(config.compute)),
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=make_sharding(mesh, shape, ("batch", None))),
    )


def abstract_state(config: TrainConfig, mesh: AnyMesh) -> CoderState:
    shape = (len(config.coder.covered), config.coder.size)

    def make(coder: SparseCoder) -> CoderState:
        return make_state(config, coder, Scaling(*(jnp.zeros(shape),) * 4))

    def shard(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = P() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.tree.map(shard, jax.eval_shape(make, abstract_coder(config.coder, mesh)))


def lower_step(
    config: TrainConfig, model: ModelConfig, mesh: Mesh, capacity: float | None = None
) -> jax.stages.Lowered:
    """The step lowered for a mesh, ready to be compiled for its devices; with a `capacity` on the sparse path."""
    inputs = make_step_inputs(config, model, mesh)
    with jax.set_mesh(mesh):
        settings = select_step_settings(config)
        return train_step.lower(settings, model, False, inputs.state, None, inputs.params, inputs.tokens, capacity)
