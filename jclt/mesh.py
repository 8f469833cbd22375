"""Meshes, and the one table that says on which mesh axes each named axis of an array lies.

Every array is placed by the names of its axes, so that the same program runs on one CPU, on a GPU, on a pod and across
hosts. Sharding is explicit: it is part of an array's type (`jax.typeof(x).sharding`), and a program that would move
data without saying so does not trace.
"""
# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jclt.errors import UserError
from jclt.shapes import Array, ArrayLike

MESH_AXES = ("data", "features")


AnyMesh = Mesh | AbstractMesh
"""Of devices, or of the shape of devices that need not be at hand."""


RULES: dict[str, tuple[str, ...]] = {
    # The language model's tokens are split over every chip: replicated over the feature shards, its forward pass would
    # cost as much again on each of them.
    "batch": ("data", "features"),
    # Each of the language model's weights is stored in as many pieces as there are chips, along one axis; they are
    # gathered a layer at a time where they are used, which costs least along the first axis.
    "stored": ("data", "features"),
    # A coder's features, and all that belongs to one, lie in as many pieces as the mesh has feature shards; its tokens
    # are split over `data` alone, since every feature reads every token.
    "features": ("features",),
    "tokens": ("data",),
}


def make_mesh(data: int = 1, features: int | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `data` x `features` devices; by default all devices lie on `features`.

    Of several TPU slices each is a part of the data axis: what that axis carries is little, and the network between
    slices is slow.
    """
    devices = jax.devices() if devices is None else list(devices)
    count, slices = len(devices), len({getattr(device, "slice_index", 0) for device in devices})
    if data < 1 or (features is None and len(devices) % data):
        raise UserError(f"mesh: data={data}, expected a divisor of {len(devices)}, the number of devices")
    features = features or len(devices) // data
    if data * features > len(devices):
        raise UserError(f"mesh {data}x{features}: expected at most {len(devices)} devices, as many as there are")
    shape, devices = (data, features), devices[: data * features]
    if slices == 1:
        placed = create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif data % slices or data * features != count:
        raise UserError(f"mesh: data={data}, expected a multiple of {slices}, the number of slices")
    else:
        within, between = (data // slices, features), (slices, 1)
        placed = create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Explicit,) * 2)


def spec(mesh: AnyMesh, shape: Sequence[int], axes: Sequence[str | None]) -> P:
    """Where an array of this shape lies, axis by axis. An axis that does not divide evenly is kept whole; of several of
    one name the first that does is split."""
    placed: list[tuple[str, ...] | None] = []
    for size, axis in zip(shape, axes, strict=True):
        names = RULES[axis] if axis else ()
        pieces = math.prod(mesh.shape[name] for name in names)
        placed.append(names if pieces > 1 and size % pieces == 0 and names not in placed else None)
    return P(*placed)


def sharding(mesh: AnyMesh, shape: Sequence[int], axes: Sequence[str | None]) -> NamedSharding:
    return NamedSharding(mesh, spec(mesh, shape, axes))


def device_kind() -> str:
    """What the program is traced for: the devices of the mesh that is set, or those at hand."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind


def einsum_spec(equation: str, *operands: Array) -> P | None:
    """Where the result of an einsum lies when each of its axes stays where its operand has it; None on no mesh.

    An axis that is summed over may lie in pieces: the sum over the pieces is then the one collective.
    """
    inputs, output = equation.split("->")
    where: dict[str, Any] = {}
    for letters, x in zip(inputs.split(","), operands, strict=True):
        parts = jax.typeof(x).sharding.spec.partitions
        where |= {letter: part for letter, part in zip(letters, parts, strict=True) if part is not None}
    return P(*(where.get(letter) for letter in output)) if where else None


def shard_shape(x: Array) -> tuple[int, ...]:
    """Of the piece that lies on one device."""
    return jax.typeof(x).sharding.shard_shape(x.shape)


def is_split(x: Array) -> bool:
    """Whether the array's type says that it lies in pieces on several devices."""
    return any(part is not None for part in jax.typeof(x).sharding.spec)


def gathered(x: Array) -> Array:
    """The whole array on every device: what a stored piece of a weight becomes where it is used."""
    return jax.reshard(x, P(*(None,) * x.ndim)) if is_split(x) else x


def placed(x: Array, axes: Sequence[str | None]) -> Array:
    """The array moved to where its axes belong on the mesh that is set; itself where none is."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.reshard(x, spec(mesh, x.shape, axes))


def reduced_later(x: Array) -> Array:
    """A weight whose gradients stay, by its type, pieces of a sum over the devices that it is the same on until they
    are moved.

    So those of many micro-batches are added up where they are made, and travel once.
    """
    where = jax.typeof(x).sharding
    taken = {name for part in where.spec for name in ((part,) if isinstance(part, str) else part or ())}
    axes = frozenset(name for name in RULES["batch"] if where.mesh.shape.get(name, 1) > 1) - taken
    return jax.reshard(x, P(*where.spec, reduced=axes)) if axes else x


def as_placed(x: Array, like: Array) -> Array:
    """The array moved to where another one of its shape lies; what was left as pieces of a sum is added up."""
    where = jax.typeof(like).sharding
    return x if jax.typeof(x).sharding == where else jax.reshard(x, where.spec)


TOKENS, FEATURES, TOKENS_AND_FEATURES = P("data"), P("features"), P("data", "features")


ENTRIES = P(MESH_AXES)
"""Where each device has its own list."""


def on_each_device(function: Callable[..., Any], outputs: Any) -> Callable[..., Any]:
    """The function run by every device on its own pieces of the arguments, with results that lie as these specs say;
    itself where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function

    def present(where: P) -> P:
        """Without the mesh axes of one device, which types leave out."""
        parts = [(part,) if isinstance(part, str) else part or () for part in where.partitions]
        kept = [tuple(name for name in part if mesh.shape[name] > 1) for part in parts]
        return P(*(part or None for part in kept), unreduced=where.unreduced)

    return jax.shard_map(function, out_specs=jax.tree.map(present, outputs), check_vma=False)


def sum_over(axis: str, x: Array) -> Array:
    """Within `on_each_device`, the sum over the devices along a mesh axis."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.psum(x, axis)


def fetched(x: ArrayLike) -> np.ndarray:
    """The whole array on this host, wherever its pieces lie; of several hosts all must ask for it."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = process_allgather(x, tiled=True)
    return np.asarray(x)


def mesh_of(x: Array) -> Mesh | None:
    """The mesh that an array was placed on, if any."""
    return x.sharding.mesh if isinstance(x.sharding, NamedSharding) and isinstance(x.sharding.mesh, Mesh) else None
