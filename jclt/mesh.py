"""Meshes of devices, and the one table from logical axes (what an axis of an array means) to mesh axes.

An array is sharded by the names of its axes, so the same program runs on one CPU, on a GPU, on a pod and across hosts.
Sharding is explicit: it is part of an array's type (`jax.typeof(x).sharding`), and a program that would move data
without a call that asks for it does not trace.
"""
# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from jclt.errors import UserError
from jclt.shapes import Array, ArrayLike

log = logging.getLogger(__name__)

DATA_AXIS, FEATURES_AXIS = "data", "features"
MESH_AXES = (DATA_AXIS, FEATURES_AXIS)


AnyMesh = Mesh | AbstractMesh
"""A mesh of devices, or the shape of a mesh whose devices need not be present."""


LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    # Tokens of the language model: split over all devices. If every feature shard held all tokens, each of them would
    # pay for the whole forward pass.
    "batch": (DATA_AXIS, FEATURES_AXIS),
    # One axis of each weight of the language model: split over all devices. Weights are gathered one layer at a time
    # where they are used; gathering costs least along the first axis.
    "stored": (DATA_AXIS, FEATURES_AXIS),
    # Features of a coder, and all arrays with one row per feature: split over the feature shards.
    "features": (FEATURES_AXIS,),
    # Tokens of a coder: split over `data` alone, since every feature reads every token.
    "tokens": (DATA_AXIS,),
    # Lists that each device keeps for itself, such as its active pairs (token, feature).
    "per_device": (DATA_AXIS, FEATURES_AXIS),
}
"""The mesh axes over which each logical axis is split."""


def make_mesh(data: int = 1, features: int | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `data` x `features` devices; by default all devices are on the `features` axis.

    With several TPU slices, the data axis is split over the slices: it carries little traffic, and the network between
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
        device_grid = create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif data % slices or data * features != count:
        raise UserError(f"mesh: data={data}, expected a multiple of {slices}, the number of slices")
    else:
        within_slice, between_slices = (data // slices, features), (slices, 1)
        device_grid = create_hybrid_device_mesh(within_slice, between_slices, devices, allow_split_physical_axes=True)
    return Mesh(device_grid, MESH_AXES, axis_types=(AxisType.Explicit,) * 2)


def mesh_of(x: Array) -> Mesh | None:
    """The mesh that an array is sharded over, if any."""
    return x.sharding.mesh if isinstance(x.sharding, NamedSharding) and isinstance(x.sharding.mesh, Mesh) else None


def use_mesh(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """A context in which programs run on the mesh, if there is one."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def find_place(weights: Any) -> tuple[Mesh | None, Sharding]:
    """The mesh over which weights are split, if any; and the sharding of arrays that all their devices have whole."""
    leaf: Any = jax.tree.leaves(weights)[0]
    mesh = mesh_of(leaf)
    return mesh, leaf.sharding if mesh is None else NamedSharding(mesh, P())


def count_feature_shards(mesh: Mesh | None, features: int) -> int:
    """Over how many devices so many features are split on this mesh."""
    shards = 1 if mesh is None else mesh.shape.get(FEATURES_AXIS, 1)
    return 1 if features % shards else shards


def device_kind() -> str:
    """The kind of device that the program is traced for: of the current mesh, or of the default devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind


# From logical axes to shardings.


def make_spec(mesh: AnyMesh, shape: Sequence[int], axes: Sequence[str | None]) -> P:
    """The partition spec of an array of this shape, by the logical name of each axis (None: not split).

    An axis whose size the number of shards does not divide is not split. Of several axes that would be split over the
    same mesh axes, only the first is.
    """
    parts: list[tuple[str, ...] | None] = []
    for size, axis in zip(shape, axes, strict=True):
        mesh_axes = LOGICAL_AXES[axis] if axis else ()
        shards = math.prod(mesh.shape[name] for name in mesh_axes)
        if size % shards:
            log.debug("axis '%s' of shape %s is not split: %d does not divide by %d", axis, [*shape], size, shards)
        parts.append(mesh_axes if shards > 1 and size % shards == 0 and mesh_axes not in parts else None)
    return P(*parts)


def make_sharding(mesh: AnyMesh, shape: Sequence[int], axes: Sequence[str | None]) -> NamedSharding:
    """The sharding of an array of this shape, by the logical name of each axis, as in `make_spec`."""
    return NamedSharding(mesh, make_spec(mesh, shape, axes))


def einsum_spec(equation: str, *operands: Array) -> P | None:
    """The spec of an einsum's result when each axis stays split as in its operand; None without a mesh.

    If an axis that is summed over is split, the sum over its shards is the einsum's only collective.
    """
    inputs, output = equation.split("->")
    part_of: dict[str, Any] = {}
    for letters, x in zip(inputs.split(","), operands, strict=True):
        parts = jax.typeof(x).sharding.spec.partitions
        part_of |= {letter: part for letter, part in zip(letters, parts, strict=True) if part is not None}
    return P(*(part_of.get(letter) for letter in output)) if part_of else None


def is_summed_over_features(equation: str, *operands: Array) -> bool:
    """Whether an einsum sums over an axis that is split over the feature shards, so that each has a part of the sum."""
    inputs, output = equation.split("->")
    return any(
        letter not in output and part in (FEATURES_AXIS, (FEATURES_AXIS,))
        for letters, x in zip(inputs.split(","), operands, strict=True)
        for letter, part in zip(letters, jax.typeof(x).sharding.spec.partitions, strict=True)
    )


def shard_shape(x: Array) -> tuple[int, ...]:
    """The shape of the shard on one device."""
    return jax.typeof(x).sharding.shard_shape(x.shape)


def is_split(x: Array) -> bool:
    """Whether any axis of the array is split over devices, by its type."""
    return any(part is not None for part in jax.typeof(x).sharding.spec)


# Moving arrays between shardings.


def replicate(x: Array) -> Array:
    """All of the array on every device: gathers the shards of a stored weight where it is used."""
    return jax.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, P())) if is_split(x) else x


def shard_by_axes(x: Array, axes: Sequence[str | None]) -> Array:
    """The array resharded over the current mesh by the logical name of each axis; unchanged without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.reshard(x, make_spec(mesh, x.shape, axes))


def shard_like(x: Array, like: Array) -> Array:
    """The array resharded as another array of its shape; unchanged without a mesh. Sums still unreduced are reduced."""
    sharding = jax.typeof(like).sharding
    return x if sharding.mesh.empty or jax.typeof(x).sharding == sharding else jax.reshard(x, sharding.spec)


def defer_gradient_sum(x: Array) -> Array:
    """The same weight, with a type for which the sum of its gradients over devices is deferred.

    Each device that holds the same values adds up the gradients of many micro-batches by itself. They are reduced over
    the devices once, when the result is resharded (`shard_like`).
    """
    sharding = jax.typeof(x).sharding
    split_over = {name for part in sharding.spec for name in ((part,) if isinstance(part, str) else part or ())}
    deferred = frozenset(name for name in MESH_AXES if sharding.mesh.shape.get(name, 1) > 1) - split_over
    return jax.reshard(x, P(*sharding.spec, reduced=deferred)) if deferred else x


def fetch_to_host(x: ArrayLike) -> np.ndarray:
    """All of the array as numpy on this host. With several hosts, every host must call it."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = process_allgather(x, tiled=True)
    return np.asarray(x)


# Programs for one device's shards, with the collectives written out.


def _full_spec(*axes: str) -> P:
    """The spec of an array whose first axes have these logical names, whatever its shape and the mesh."""
    return P(*(LOGICAL_AXES[axis] for axis in axes))


TOKENS_SPEC, FEATURES_SPEC = _full_spec("tokens"), _full_spec("features")
TOKENS_FEATURES_SPEC, PER_DEVICE_SPEC = _full_spec("tokens", "features"), _full_spec("per_device")


def map_over_devices(function: Callable[..., Any], outputs: Any) -> Callable[..., Any]:
    """A function that every device runs on its shards of the arguments; the results have the specs `outputs`.

    This is `jax.shard_map` over the current mesh. Without a mesh it is the function itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function

    def drop_axes_of_one_device(spec: P) -> P:
        """Array types never name such mesh axes."""
        parts = [(part,) if isinstance(part, str) else part or () for part in spec.partitions]
        kept = [tuple(name for name in part if mesh.shape[name] > 1) for part in parts]
        return P(*(part or None for part in kept), unreduced=spec.unreduced)

    return jax.shard_map(function, out_specs=jax.tree.map(drop_axes_of_one_device, outputs), check_vma=False)


def sum_over_feature_shards(x: Array) -> Array:
    """The sum over the devices that hold the other features of the same tokens.

    Of a coder's reconstructions this is the trainer's one large collective: each feature shard has computed what its
    features write. Within `map_over_devices` it adds up the devices' arrays. Elsewhere it adds up an array whose
    type says that its parts on the feature shards are not added up yet (`unreduced`).
    """
    spec = jax.typeof(x).sharding.spec
    if FEATURES_AXIS in spec.unreduced:
        return jax.reshard(x, P(*spec.partitions, unreduced=spec.unreduced - {FEATURES_AXIS}))
    return _sum_over(FEATURES_AXIS, x)


def sum_over_data_shards(x: Array) -> Array:
    """Within `map_over_devices`: the sum over the devices that hold other tokens and the same features."""
    return _sum_over(DATA_AXIS, x)


def _sum_over(mesh_axis: str, x: Array) -> Array:
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.psum(x, mesh_axis)


def gather_shards(x: Array, shape: Sequence[int]) -> Array:
    """Within a program for one device's shards: all of a stored weight of this shape, of which each device has a part
    or all."""
    split = [axis for axis, size in enumerate(shape) if x.shape[axis] < size]
    return jax.lax.all_gather(x, LOGICAL_AXES["stored"], axis=split[0], tiled=True) if split else x
