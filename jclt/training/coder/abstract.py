"""The train step on shapes alone: what it takes and compiles to on a mesh that need not be at hand."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jclt.coders import SparseCoder, abstract_coder
from jclt.mesh import AnyMesh, sharding
from jclt.models import ModelConfig, abstract_params
from jclt.training.coder.harvest import Scaling
from jclt.training.coder.state import CoderState, fresh_state
from jclt.training.coder.step import train_step
from jclt.training.config import TrainConfig, settings_of_step


class StepInputs(NamedTuple):
    """Shapes, types and placements of what `train_step` takes."""

    state: CoderState
    params: dict[str, jax.ShapeDtypeStruct]
    tokens: jax.ShapeDtypeStruct


def step_inputs(config: TrainConfig, model: ModelConfig, mesh: AnyMesh) -> StepInputs:
    shape = (config.batch, config.length)
    return StepInputs(
        abstract_state(config, mesh),
        abstract_params(model, mesh, jnp.dtype(config.compute)),
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding(mesh, shape, ("batch", None))),
    )


def abstract_state(config: TrainConfig, mesh: AnyMesh) -> CoderState:
    shape = (len(config.coder.covered), config.coder.size)

    def made(coder: SparseCoder) -> CoderState:
        return fresh_state(config, coder, Scaling(*(jnp.zeros(shape),) * 4))

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        where = P() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, where))

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.tree.map(placed, jax.eval_shape(made, abstract_coder(config.coder, mesh)))


def lower_step(config: TrainConfig, model: ModelConfig, mesh: Mesh, room: float | None = None) -> jax.stages.Lowered:
    """The step traced for a mesh, ready to be compiled for its devices; with `room` on the sparse path."""
    inputs = step_inputs(config, model, mesh)
    with jax.set_mesh(mesh):
        settings = settings_of_step(config)
        return train_step.lower(settings, model, False, inputs.state, None, inputs.params, inputs.tokens, room)
