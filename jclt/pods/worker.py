"""Separate processes for the TPU compiler. A job goes in pickled; a report of plain values comes out as JSON.

So libtpu, which slows down every start of JAX and needs its own environment, is never loaded in the calling process.
"""

import json
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping
from importlib.util import find_spec
from typing import IO, Any, NamedTuple

from jclt.errors import UserError
from jclt.interrupts import undo_on_interrupt
from jclt.pods.flags import set_flags

log = logging.getLogger(__name__)

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # libtpu compiles, nothing runs
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a lock file allows only one compilation at a time
    "TPU_SKIP_MDS_QUERY": "1",  # with the next two: libtpu does not look for a TPU
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
MOST_WORKERS = 2
"""Each process compiles on one core, and takes a few gigabytes for the largest runs."""


class Job(NamedTuple):
    title: str
    function: str  # the name of a function in `compile.py`
    arguments: tuple[Any, ...]


class Worker(NamedTuple):
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    errors: IO[bytes]


def run_jobs(jobs: Mapping[str, Job]) -> Generator[tuple[str, Any], None, None]:
    """Each job's name and report, in their order, as soon as they are ready. Several jobs run at a time."""
    if find_spec("libtpu") is None:
        raise UserError("libtpu, the TPU compiler, is missing: pip install 'jclt[tpu]' (no TPU is needed)")
    waiting, workers = list(jobs), dict[str, Worker]()
    most = min(MOST_WORKERS, os.cpu_count() or 1)
    with undo_on_interrupt():
        try:
            for name, job in jobs.items():
                while name in waiting or workers[name].process.poll() is None:
                    busy = sum(worker.process.poll() is None for worker in workers.values())
                    for other in waiting[: most - busy]:
                        log.info("compiling %s", jobs[other].title)
                        workers[other] = start_worker(jobs[other])
                        waiting.remove(other)
                    time.sleep(0.05)
                yield name, read_answer(workers[name], job)
        finally:
            for worker in workers.values():
                worker.process.kill()
                worker.process.wait()
                worker.output.close()
                worker.errors.close()


def run_job(job: Job) -> Any:
    ((_, report),) = run_jobs({job.function: job})
    return report


def start_worker(job: Job) -> Worker:
    output, errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    with tempfile.TemporaryFile() as question:
        pickle.dump((job.function, job.arguments), question)
        question.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-c", "from jclt.pods.worker import main; main()"],
            stdin=question,
            stdout=output,
            stderr=errors,
            env=os.environ | ENVIRONMENT,
        )
    return Worker(process, output, errors)


def read_answer(worker: Worker, job: Job) -> Any:
    """The report of a worker that has ended."""
    worker.output.seek(0)
    try:
        answer = json.loads(worker.output.read().splitlines()[-1])
    except (ValueError, IndexError):
        worker.errors.seek(0)
        tail = worker.errors.read().decode(errors="replace").strip()[-2000:]
        status = worker.process.returncode
        if status == -9:  # killed by the system for its memory
            raise MemoryError(f"the process that compiled {job.title} was killed") from None
        raise RuntimeError(f"the process that compiled {job.title} ended with status {status}:\n{tail}") from None
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["report"]


def main() -> None:
    set_flags()  # before libtpu reads them
    logging.disable(logging.WARNING)
    function, arguments = pickle.loads(sys.stdin.buffer.read())
    from jclt.pods import compile as functions

    try:
        answer = {"report": getattr(functions, function)(*arguments)}
    except UserError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer, default=float))
