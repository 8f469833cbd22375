"""Finding the other hosts of a run, and doing things in step with them."""
# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather

from jclt.errors import UserError, reason_of

HEARTBEAT_SECONDS = 30
"""A host that has not answered for so long counts as dead, and the other hosts end."""


MEETING_SECONDS = 50
"""How long processes wait for one another at the address that the environment gives."""


MESSAGE_BYTES = 1000
"""How much of its error message a host sends to the others."""


Result = TypeVar("Result")


PROCESS_VARIABLES = ("JCLT_COORDINATOR", "JCLT_PROCESSES", "JCLT_PROCESS")


class PlaceInRun(NamedTuple):
    """One process among all those of a run."""

    address: str  # host:port at which the processes meet
    processes: int  # how many there are
    process: int  # number of this process, from 0


def read_place_in_run() -> PlaceInRun | None:
    """The place of this process by the environment's `PROCESS_VARIABLES`; None where none of them is set."""
    values = [os.environ[name] for name in PROCESS_VARIABLES if name in os.environ]
    if not values:
        return None
    if len(values) < len(PROCESS_VARIABLES) or not all(number.isascii() and number.isdigit() for number in values[1:]):
        raise UserError(f"{', '.join(PROCESS_VARIABLES)}: expected all three, host:port and two whole numbers")
    address, count, process = values[0], int(values[1]), int(values[2])
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise UserError(f"JCLT_COORDINATOR: '{address}', expected host:port, a port from 1 to 65535")
    if count < 1:
        raise UserError(f"JCLT_PROCESSES: {count}, expected at least 1")
    if process >= count:
        raise UserError(f"JCLT_PROCESS: {process}, expected 0 to {count - 1}, of {count} processes")
    return PlaceInRun(address, count, process)


def join_hosts() -> None:
    """Joins the other hosts of this run, if there are any. Must be called before the first array is made.

    TPU pods, Slurm, Open MPI and Kubernetes are recognised. Elsewhere set three environment variables:
    JCLT_COORDINATOR (host:port of the first process), JCLT_PROCESSES (their count) and JCLT_PROCESS (the number of this
    one, from 0).
    """
    place = read_place_in_run()
    if place is not None:
        _meet_other_processes(place)
        return
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError:
        pass  # no cluster is recognised: the run is this one process
    except RuntimeError as error:
        if "must be called before" not in str(error):  # a program that has already computed something is alone as well
            raise


def find_process_and_count() -> tuple[int, int]:
    """The number of this process and the count of all, for work that is shared without communication.

    If the environment tells both, the processes do not join: each can go on when another one ends.
    """
    place = read_place_in_run()
    if place is not None:
        return place.process, place.processes
    join_hosts()
    return jax.process_index(), jax.process_count()


def broadcast_from_first_host(decision: bool) -> bool:
    """The first host's decision, on all hosts. Every host must call it."""
    return bool(broadcast_one_to_all(np.asarray(decision))) if jax.process_count() > 1 else decision


def run_on_every_host(work: Callable[[], Result]) -> Result:
    """Does the work on this host, waits until every host has done it, and returns this host's result.

    If it fails on one host, an error is raised on all of them, so that no host waits for one that has ended. Every host
    must call it.
    """
    if jax.process_count() == 1:
        return work()
    results: list[Result] = []
    failure: Exception | None = None
    try:
        results.append(work())
    except Exception as error:
        failure = error
    message = np.zeros(MESSAGE_BYTES, np.uint8)  # zeros: no failure
    if failure is not None:
        text = (str(failure) or type(failure).__name__).encode(errors="replace")[:MESSAGE_BYTES]
        message[: len(text)] = np.frombuffer(text, np.uint8)
    messages = process_allgather(message)
    if failure is not None:
        raise failure
    for process, message in enumerate(messages):
        if message.any():
            text = message.tobytes().rstrip(b"\0").decode(errors="ignore")
            raise UserError(f"process {process} of {len(messages)}: {text}")
    return results[0]


def run_on_first_host(work: Callable[[], None]) -> None:
    """Does the work on the first host; the other hosts wait until it is done."""
    run_on_every_host(lambda: work() if jax.process_index() == 0 else None)


# Processes that meet at an address: the first one listens there, and all others connect to it.


def _meet_other_processes(place: PlaceInRun) -> None:
    """Waits until all processes have come, then joins them: JAX aborts if one is missing, so it need not wait."""
    host, _, port = place.address.rpartition(":")
    deadline = time.monotonic() + MEETING_SECONDS
    if place.process == 0:
        _wait_for_others(int(port), place.processes, deadline)
    else:
        _wait_for_first(host.strip("[]"), int(port), place.process, deadline)
    jax.distributed.initialize(
        place.address, place.processes, place.process, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
    )


def _wait_for_others(port: int, count: int, deadline: float) -> None:
    """The first process waits until each other one has connected and sent its number, then tells them to go on."""
    connections: dict[int, socket.socket] = {}
    try:
        with _listen(port) as listener:
            while missing := sorted({*range(1, count)} - connections.keys()):
                listener.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    absent = ", ".join(map(str, missing))
                    raise UserError(
                        f"JCLT_PROCESSES: of {count} processes {absent} did not come to port {port} within "
                        f"{MEETING_SECONDS} s, expected all to be started"
                    ) from None
                connection.settimeout(5)
                try:
                    number = int.from_bytes(connection.recv(4))
                except OSError:
                    number = 0
                if 0 < number < count:
                    connections[number] = connection
                else:  # not a process of this run
                    connection.close()
        # The listener is closed first, so that JAX can listen at the same port.
        for connection in connections.values():
            with suppress(OSError):
                connection.sendall(b"!")
    finally:
        for connection in connections.values():
            connection.close()


def _wait_for_first(host: str, port: int, process: int, deadline: float) -> None:
    """Another process waits until the first one, which waits for all others, tells it to go on."""
    why = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                connection.sendall(process.to_bytes(4))
                connection.settimeout(max(deadline - time.monotonic(), 0.001))
                if connection.recv(1) == b"!":
                    return
        except OSError as error:
            why = reason_of(error)
        time.sleep(min(0.2, max(left, 0)))
    raise UserError(
        f"JCLT_COORDINATOR: process {process} did not meet all others at {host}:{port} within {MEETING_SECONDS} s "
        f"({why}), expected every process to be started"
    )


def _listen(port: int) -> socket.socket:
    """The first process listens at the port. An error here is one line, while JAX itself may crash."""
    both = socket.has_dualstack_ipv6()
    listener = socket.socket(socket.AF_INET6 if both else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the port of a run that has just ended is free
        if both:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("::" if both else "", port))
        listener.listen(1000)
    except OSError as error:
        listener.close()
        why = reason_of(error)
        raise UserError(f"JCLT_COORDINATOR: port {port} cannot be used here ({why}), expected a free one") from None
    return listener
