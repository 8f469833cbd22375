"""Meshes, and the one table that says on which mesh axes each named axis of an array lies.

Every array is placed by the names of its axes, so that the same program runs on one CPU, on a GPU, on a pod and across
hosts. Sharding is explicit: it is part of an array's type (`jax.typeof(x).sharding`), and a program that would move
data without saying so does not trace.
"""
# JAX's own types are partial, hence the exceptions.
# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jclt.errors import UserError, reason_of
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


HEARTBEAT = 30
"""Seconds after which a host that no longer answers is taken for dead, and the others end."""
MEETING = 50
"""Seconds that processes which are told where to meet wait there for one another."""

Result = TypeVar("Result")

PLACE_IN_RUN = ("JCLT_COORDINATOR", "JCLT_PROCESSES", "JCLT_PROCESS")


def said_place() -> tuple[str, int, int] | None:
    """Where processes meet, how many they are and which this is, if the environment says so."""
    given = [os.environ[name] for name in PLACE_IN_RUN if name in os.environ]
    if not given:
        return None
    if len(given) < len(PLACE_IN_RUN) or not all(number.isascii() and number.isdigit() for number in given[1:]):
        raise UserError(f"{', '.join(PLACE_IN_RUN)}: expected all three, host:port and two whole numbers")
    meeting, count, own = given[0], int(given[1]), int(given[2])
    host, _, port = meeting.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise UserError(f"JCLT_COORDINATOR: '{meeting}', expected host:port, a port from 1 to 65535")
    if count < 1:
        raise UserError(f"JCLT_PROCESSES: {count}, expected at least 1")
    if own >= count:
        raise UserError(f"JCLT_PROCESS: {own}, expected 0 to {count - 1}, of {count} processes")
    return meeting, count, own


def join_hosts() -> None:
    """Joins the other hosts of this run, where there are any, before the first array is made.

    TPU pods, Slurm, Open MPI and Kubernetes are recognised; elsewhere JCLT_COORDINATOR (host:port of the first
    process), JCLT_PROCESSES (how many) and JCLT_PROCESS (which this is, from 0) say it.
    """
    place = said_place()
    if place is not None:
        _meet(*place)
        return
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
    except ValueError:
        pass  # no cluster is recognised: the run is this one process
    except RuntimeError as error:
        if "must be called before" not in str(error):  # a program that has computed already is alone as well
            raise


def _meet(meeting: str, count: int, own: int) -> None:
    """Joins the others once all are there: JAX, which aborts where one stays away, need not wait for any."""
    host, _, port = meeting.rpartition(":")
    deadline = time.monotonic() + MEETING
    if own == 0:
        _wait_for_guests(int(port), count, deadline)
    else:
        _wait_at(host.strip("[]"), int(port), own, deadline)
    jax.distributed.initialize(meeting, count, own, heartbeat_timeout_seconds=HEARTBEAT)


def _wait_for_guests(port: int, count: int, deadline: float) -> None:
    """Until all other processes have come to this port, each saying its number; then they are told to go on."""
    here: dict[int, socket.socket] = {}
    try:
        with _listening(port) as door:
            while missing := sorted({*range(1, count)} - here.keys()):
                door.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    guest, _ = door.accept()
                except TimeoutError:
                    absent = ", ".join(map(str, missing))
                    raise UserError(
                        f"JCLT_PROCESSES: of {count} processes {absent} did not come to port {port} within {MEETING} "
                        "s, expected all to be started"
                    ) from None
                guest.settimeout(5)
                try:
                    number = int.from_bytes(guest.recv(4))
                except OSError:
                    number = 0
                if 0 < number < count:
                    here[number] = guest
                else:  # whoever else may knock
                    guest.close()
        for guest in here.values():  # the port is free again for JAX
            with suppress(OSError):
                guest.sendall(b"!")
    finally:
        for guest in here.values():
            guest.close()


def _wait_at(host: str, port: int, own: int, deadline: float) -> None:
    """Until the first process, which waits for all others there, says that they have come."""
    why = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as door:
                door.sendall(own.to_bytes(4))
                door.settimeout(max(deadline - time.monotonic(), 0.001))
                if door.recv(1) == b"!":
                    return
        except OSError as error:
            why = reason_of(error)
        time.sleep(min(0.2, max(left, 0)))
    raise UserError(
        f"JCLT_COORDINATOR: process {own} did not meet all others at {host}:{port} within {MEETING} s ({why}), "
        "expected every process to be started"
    )


def _listening(port: int) -> socket.socket:
    """The door that the first process opens; JAX itself may crash where it cannot."""
    both = socket.has_dualstack_ipv6()
    door = socket.socket(socket.AF_INET6 if both else socket.AF_INET, socket.SOCK_STREAM)
    try:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as one who was here a moment ago
        if both:
            door.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        door.bind(("::" if both else "", port))
        door.listen(1000)
    except OSError as error:
        door.close()
        why = reason_of(error)
        raise UserError(f"JCLT_COORDINATOR: port {port} cannot be used here ({why}), expected a free one") from None
    return door


def agreed(said: bool) -> bool:
    """What the first host says, on all of them."""
    return bool(broadcast_one_to_all(np.asarray(said))) if jax.process_count() > 1 else said


SAID = 1000
"""Bytes of its error that a host tells the others."""


def together(work: Callable[[], Result]) -> Result:
    """What the work gives on this host, once every host is done with it. Where one of them fails all do, so that none
    waits for another that has ended: all hosts must ask."""
    if jax.process_count() == 1:
        return work()
    made: list[Result] = []
    failed: Exception | None = None
    try:
        made.append(work())
    except Exception as error:
        failed = error
    own = np.zeros(SAID, np.uint8)
    if failed is not None:
        text = np.frombuffer((str(failed) or type(failed).__name__).encode(errors="replace")[:SAID], np.uint8)
        own[: len(text)] = text
    heard = process_allgather(own)
    if failed is not None:
        raise failed
    for process, said in enumerate(heard):
        if said.any():
            text = said.tobytes().rstrip(b"\0").decode(errors="ignore")
            raise UserError(f"process {process} of {len(heard)}: {text}")
    return made[0]


def on_first_host(work: Callable[[], None]) -> None:
    """Done by the first host; the others wait until it is done."""
    together(lambda: work() if jax.process_index() == 0 else None)


def own_share() -> tuple[int, int]:
    """Which of how many processes this is, for work that needs no word between them: where the environment says so
    none is waited for, so that each goes on when another one ends."""
    place = said_place()
    if place is not None:
        return place[2], place[1]
    join_hosts()
    return jax.process_index(), jax.process_count()


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
