"""The `jclt` command.

Each subcommand is a module of this package with two functions: `add_command` defines its arguments, `run` calls one
function of another package and prints the result. To add a subcommand, write such a module and add it to `COMMANDS`.

JAX is imported only inside `run`, so that help and errors in arguments appear without delay.
"""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from jclt.cli import (
    attribute,
    circuit,
    convert,
    demo,
    evaluate,
    export_html,
    features,
    inspect,
    intervene,
    label,
    plan,
    serve,
    tokenize,
    train,
    train_lm,
    verify,
)
from jclt.cli.arguments import Parser
from jclt.config import cache_folder
from jclt.errors import Interrupted, UserError, escape_unprintable, first_line, reason_of, shorten
from jclt.interrupts import INTERRUPTED

COMMANDS = (
    demo,
    attribute,
    serve,
    export_html,
    intervene,
    circuit,
    features,
    label,
    train_lm,
    train,
    evaluate,
    verify,
    inspect,
    tokenize,
    plan,
    convert,
)


def build_parser() -> argparse.ArgumentParser:
    top = Parser(prog="jclt", description="Circuit tracing of language models in JAX.")
    top.add_argument("--version", action="version", version="jclt " + version("jclt"))
    top.add_argument("-v", "--verbose", action="store_true", help="log more")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_command(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("jclt").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.WARNING)
    status = _run_command(arguments)
    if status and _has_other_hosts():
        # A normal exit would wait for the other processes, which wait for this one in a collective.
        sys.stderr.flush()
        os._exit(status)
    return status


def _run_command(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit status. Errors that the user can correct are printed in one line."""
    try:
        _keep_compiled_programs()
        status = arguments.function(arguments) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of the output has ended
        _discard_output()
        return 0
    except UserError as error:
        return _print_error(str(error))
    except OSError as error:
        where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
        return _print_error(f"{where or f'{arguments.command}: output or a file'}: {reason_of(error)}")
    except Interrupted as reason:
        print(f"jclt: {reason}", file=sys.stderr)
        return os.EX_TEMPFAIL  # tells the scheduler to start the command again
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if _is_out_of_memory(error):
            advice = f"; {LESS_MEMORY[arguments.command]}" if arguments.command in LESS_MEMORY else ""
            return _print_error(f"{arguments.command}: memory has ended ({first_line(error)[:200]}){advice}")
        if not _has_other_hosts():
            raise
        import jax

        if not isinstance(error, jax.errors.JaxRuntimeError):  # JaxRuntimeError: another process has ended
            traceback.print_exc()
        return _print_error(
            f"process {jax.process_index()} of {jax.process_count()} cannot go on: {first_line(error)}. If another "
            "process has ended, its own message says why; started again together, they go on from the newest "
            "checkpoint",
            status=3,
        )


LESS_MEMORY = {
    "attribute": "fewer --max-features, a smaller --batch or a shorter prompt take less",
    "intervene": "a shorter prompt takes less, and --no-predict",
    "circuit": "shorter prompts take less, and --nodes heads",
    "train-lm": "a smaller batch or model takes less, and --set remat=true",
    "train": "a smaller batch, more micro_batches or fewer coder.features take less, and --set remat=true",
    "features": "a shorter --length takes less, and --keep disk",
    "label": "fewer --rows or a shorter --length take less",
    "eval": "fewer --rows or a shorter --length take less",
    "verify": "shorter prompts take less",
    "tokenize": "fewer --workers or --shard-tokens take less",
    "convert": "--dtype bfloat16 takes less",
    "plan": "compiling a smaller run, or on fewer chips, takes less",
}
"""For each command, options that need less memory."""


def _print_error(message: str, status: int = 2) -> int:
    print(f"jclt: {shorten(escape_unprintable(message))}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        _discard_output()
    return status


def _discard_output() -> None:
    """Discards the output that Python would write at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _has_other_hosts() -> bool:
    """Whether this process has joined others. A command that has not loaded JAX has joined none."""
    jax: Any = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _is_out_of_memory(error: Exception) -> bool:
    from jclt.memory import is_out_of_memory

    return is_out_of_memory(error)


def _keep_compiled_programs() -> None:
    """Turns on JAX's cache of compiled programs, so that later commands compile nothing again."""
    import jax

    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(cache_folder()))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
