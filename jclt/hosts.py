"""Finding the other hosts of a run, and agreeing with them."""
# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather

from jclt.errors import UserError, reason_of

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
