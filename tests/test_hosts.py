"""The other hosts of a run are found, or the error says which one is missing; what fails on one is raised on all."""

import socket
import threading
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest
from run_processes import find_free_port

from jclt import hosts
from jclt.errors import UserError
from jclt.hosts import join_hosts, read_place_in_run, run_on_every_host

ERRORS = {
    ("nonsense", "2", "0"): "JCLT_COORDINATOR: 'nonsense', expected host:port, a port from 1 to 65535",
    ("localhost:99999", "2", "0"): "JCLT_COORDINATOR: 'localhost:99999', expected host:port, a port from 1 to 65535",
    ("localhost:0", "1", "0"): "JCLT_COORDINATOR: 'localhost:0', expected host:port, a port from 1 to 65535",
    ("localhost:1", "0", "0"): "JCLT_PROCESSES: 0, expected at least 1",
    ("localhost:1", "2", "7"): "JCLT_PROCESS: 7, expected 0 to 1, of 2 processes",
    ("localhost:1", "2", "-1"): "JCLT_COORDINATOR, JCLT_PROCESSES, JCLT_PROCESS: expected all three",
}


@pytest.mark.parametrize("values", ERRORS)
def test_wrong_variables_are_refused(values, monkeypatch):
    for name, value in zip(("JCLT_COORDINATOR", "JCLT_PROCESSES", "JCLT_PROCESS"), values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        read_place_in_run()
    assert str(error.value).startswith(ERRORS[values])


def test_a_port_in_use_is_reported_before_jax_uses_it(monkeypatch):
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        for name, value in {"COORDINATOR": f"localhost:{port}", "PROCESSES": "2", "PROCESS": "0"}.items():
            monkeypatch.setenv(f"JCLT_{name}", value)
        with pytest.raises(UserError) as error:
            join_hosts()
    line = f"JCLT_COORDINATOR: port {port} cannot be used here (Address already in use), expected a free one"
    assert str(error.value) == line


def test_processes_meet_or_report_who_is_missing(monkeypatch):
    monkeypatch.setattr(hosts, "MEETING_SECONDS", 2)

    def meet(count: int, *numbers: int) -> list[str]:
        """The errors of the processes; empty for a process that met all others."""
        port, errors = find_free_port(), dict.fromkeys(numbers, "")

        def run_process(number: int) -> None:
            deadline = time.monotonic() + (60 if count == len(numbers) else 2)
            try:
                if number == 0:
                    hosts._wait_for_others(port, count, deadline)
                else:
                    hosts._wait_for_first("localhost", port, number, deadline)
            except UserError as error:
                errors[number] = str(error).replace(str(port), "PORT")

        threads = [threading.Thread(target=run_process, args=(number,)) for number in numbers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return list(errors.values())

    assert meet(3, 0, 1, 2) == ["", "", ""] and meet(1, 0) == [""]
    first, second = meet(3, 0, 1)
    assert first == "JCLT_PROCESSES: of 3 processes 2 did not come to port PORT within 2 s, expected all to be started"
    assert second.startswith("JCLT_COORDINATOR: process 1 did not meet all others at localhost:PORT within 2 s (")
    (of_first,) = meet(2, 1)
    assert "within 2 s (Connection refused), expected every process to be started" in of_first


def test_what_fails_on_one_host_is_raised_on_all(monkeypatch):
    """Two threads are the two hosts here."""
    messages: dict[str, np.ndarray] = {}
    both_have_sent = threading.Barrier(2)

    def gather(message: np.ndarray) -> np.ndarray:
        messages[threading.current_thread().name] = message
        both_have_sent.wait(timeout=60)
        return np.stack([messages["0"], messages["1"]])

    def fail() -> str:
        raise UserError("run: the folder is full")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "process_allgather", gather)

    def run_both(*works: Callable[[], str]) -> list[str]:
        results = ["", ""]

        def run(number: int) -> None:
            try:
                results[number] = run_on_every_host(works[number])
            except UserError as error:
                results[number] = f"error: {error}"

        threads = [threading.Thread(target=run, args=(number,), name=str(number)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    assert run_both(lambda: "first", lambda: "second") == ["first", "second"]
    error = "error: run: the folder is full"
    assert run_both(lambda: "first", fail) == ["error: process 1 of 2: run: the folder is full", error]
    assert run_both(fail, lambda: "second") == [error, "error: process 0 of 2: run: the folder is full"]
