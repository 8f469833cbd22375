"""The `jclt` command: each subcommand is a module here that parses, calls one function of a package and prints.

Nothing that loads JAX is imported before a command needs it, so that help and mistakes are answered at once.
"""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from jclt.cli import attribute, convert, demo, evaluate, inspect, plan, tokenize, train, train_lm
from jclt.cli.arguments import Parser
from jclt.config import cache_folder
from jclt.errors import Interrupted, UserError, first_line, printable, reason_of, shortened
from jclt.interrupts import INTERRUPTED

COMMANDS = (demo, attribute, train_lm, train, evaluate, inspect, tokenize, plan, convert)


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="jclt", description="Circuit tracing of language models in JAX.")
    top.add_argument("--version", action="version", version="jclt " + version("jclt"))
    top.add_argument("-v", "--verbose", action="store_true", help="say more of what is done")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_command(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("jclt").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.WARNING)
    status = _run(arguments)
    if status and _joined():
        # Else this process waits at the door for others, which wait for it in a collective.
        sys.stderr.flush()
        os._exit(status)
    return status


def _run(arguments: argparse.Namespace) -> int:
    """Runs the command; what the user can mend is said in one line."""
    try:
        _keep_compiled_programs()
        status = arguments.function(arguments) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read the output has had enough
        _drop_output()
        return 0
    except UserError as error:
        return _refused(str(error))
    except OSError as error:
        where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
        return _refused(f"{where or f'{arguments.command}: output or a file'}: {reason_of(error)}")
    except Interrupted as reason:
        print(f"jclt: {reason}", file=sys.stderr)
        return os.EX_TEMPFAIL  # whatever started it can tell that it is not done
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if _is_out_of_memory(error):
            less = f"; {LESS[arguments.command]}" if arguments.command in LESS else ""
            return _refused(f"{arguments.command}: memory has ended ({first_line(error)[:200]}){less}")
        if not _joined():
            raise
        import jax

        if not isinstance(error, jax.errors.JaxRuntimeError):  # that is what the end of another process makes of this
            traceback.print_exc()
        return _refused(
            f"process {jax.process_index()} of {jax.process_count()} cannot go on: {first_line(error)}. If another "
            "process has ended, its own message says why; started again together, they go on from the newest "
            "checkpoint",
            status=3,
        )


LESS = {
    "attribute": "fewer --max-features, a smaller --batch or a shorter prompt take less",
    "train-lm": "a smaller batch or model takes less, and --set remat=true",
    "train": "a smaller batch, more micro_batches or fewer coder.features take less, and --set remat=true",
    "eval": "fewer --rows or a shorter --length take less",
    "tokenize": "fewer --workers or --shard-tokens take less",
    "convert": "--dtype bfloat16 takes less",
    "plan": "compiling a smaller run, or on fewer chips, takes less",
}
"""What a command can be asked that takes less memory."""


def _refused(message: str, status: int = 2) -> int:
    print(f"jclt: {shortened(printable(message))}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
    return status


def _drop_output() -> None:
    """What is still to be written when the process ends goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _joined() -> bool:
    """Whether there are other hosts; of a command that ended before it loaded JAX there are none."""
    jax: Any = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _is_out_of_memory(error: Exception) -> bool:
    from jclt.memory import is_out_of_memory

    return is_out_of_memory(error)


def _keep_compiled_programs() -> None:
    """What was compiled once is read from a cache the next time."""
    import jax

    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(cache_folder()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
