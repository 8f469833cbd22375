"""A process of its own for the TPU compiler: what to do comes in pickled, a report of plain values goes out as JSON.

So libtpu, which slows every start of JAX and wants its own environment, never meets the process that asks.
"""

import json
import logging
import os
import pickle
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

from jclt.errors import UserError
from jclt.pods.flags import set_flags

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # libtpu compiles, nothing runs
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else two compilations at a time meet at a lock file
    "TPU_SKIP_MDS_QUERY": "1",  # these three: it does not look for a TPU
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def ask(what: str, *arguments: Any) -> Any:
    """`what(*arguments)` of this room's `plan`, computed in a process of its own."""
    if find_spec("libtpu") is None:
        raise UserError("libtpu, the TPU compiler, is missing: pip install 'jclt[tpu]' (no TPU is needed)")
    done = subprocess.run(
        [sys.executable, "-c", "from jclt.pods.worker import main; main()"],
        input=pickle.dumps((what, arguments)),
        env=os.environ | ENVIRONMENT,
        capture_output=True,
    )
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        tail = done.stderr.decode(errors="replace").strip()[-2000:]
        raise RuntimeError(f"the TPU compiler's process ended with status {done.returncode}:\n{tail}") from None
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["report"]


def main() -> None:
    set_flags()  # before libtpu reads them
    logging.disable(logging.WARNING)
    what, arguments = pickle.loads(sys.stdin.buffer.read())
    from jclt.pods import plan

    try:
        answer = {"report": getattr(plan, what)(*arguments)}
    except UserError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer, default=float))
