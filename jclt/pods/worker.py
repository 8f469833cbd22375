"""Processes of their own for the TPU compiler: what to do comes in pickled, a report of plain values goes out as JSON.

So libtpu, which slows every start of JAX and wants its own environment, never meets the process that asks.
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
from jclt.interrupts import undone
from jclt.pods.flags import set_flags

log = logging.getLogger(__name__)

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # libtpu compiles, nothing runs
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else two compilations at a time meet at a lock file
    "TPU_SKIP_MDS_QUERY": "1",  # these three: it does not look for a TPU
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
AT_ONCE = 2
"""Processes at a time: each compiles on one core, and takes a few gigabytes for the largest runs."""


class Job(NamedTuple):
    title: str
    what: str  # a function of this room's `plan`
    arguments: tuple[Any, ...]


class Worker(NamedTuple):
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    errors: IO[bytes]


def ask_each(jobs: Mapping[str, Job]) -> Generator[tuple[str, Any], None, None]:
    """Each job's name and report, in their order, as they are ready; some are worked on at a time."""
    if find_spec("libtpu") is None:
        raise UserError("libtpu, the TPU compiler, is missing: pip install 'jclt[tpu]' (no TPU is needed)")
    waiting, workers = list(jobs), dict[str, Worker]()
    most = min(AT_ONCE, os.cpu_count() or 1)
    with undone():
        try:
            for name, job in jobs.items():
                while name in waiting or workers[name].process.poll() is None:
                    busy = sum(worker.process.poll() is None for worker in workers.values())
                    for other in waiting[: most - busy]:
                        log.info("compiling %s", jobs[other].title)
                        workers[other] = start(jobs[other])
                        waiting.remove(other)
                    time.sleep(0.05)
                yield name, answer_of(workers[name], job)
        finally:
            for worker in workers.values():
                worker.process.kill()
                worker.process.wait()
                worker.output.close()
                worker.errors.close()


def ask(job: Job) -> Any:
    ((_, report),) = ask_each({job.what: job})
    return report


def start(job: Job) -> Worker:
    output, errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    with tempfile.TemporaryFile() as question:
        pickle.dump((job.what, job.arguments), question)
        question.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-c", "from jclt.pods.worker import main; main()"],
            stdin=question,
            stdout=output,
            stderr=errors,
            env=os.environ | ENVIRONMENT,
        )
    return Worker(process, output, errors)


def answer_of(worker: Worker, job: Job) -> Any:
    """What a worker that has ended found."""
    worker.output.seek(0)
    try:
        answer = json.loads(worker.output.read().splitlines()[-1])
    except (ValueError, IndexError):
        worker.errors.seek(0)
        tail = worker.errors.read().decode(errors="replace").strip()[-2000:]
        status = worker.process.returncode
        if status == -9:  # nothing else kills it so
            raise MemoryError(f"the process that compiled {job.title} was killed") from None
        raise RuntimeError(f"the process that compiled {job.title} ended with status {status}:\n{tail}") from None
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["report"]


def main() -> None:
    set_flags()  # before libtpu reads them
    logging.disable(logging.WARNING)
    what, arguments = pickle.loads(sys.stdin.buffer.read())
    from jclt.pods import compile as plan

    try:
        answer = {"report": getattr(plan, what)(*arguments)}
    except UserError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer, default=float))
