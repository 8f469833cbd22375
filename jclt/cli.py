"""The `jclt` command: each subcommand parses, calls one function of a room, prints."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from jclt import __version__
from jclt.errors import Interrupted, UserError


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="jclt", description="Circuit tracing of language models in JAX.")
    top.add_argument("--version", action="version", version=f"jclt {__version__}")
    top.add_argument("-v", "--verbose", action="store_true", help="say more of what is done")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "demo",
        help="see what the shipped model knows",
        description="Loads the shipped model and completes one prompt of each of its tasks, none of which it was "
        "trained on; prints prompt, answer, the probability of what is right, and whether it is right.",
    )
    command.add_argument("--seed", type=int, default=0, help="draws other prompts (default 0)")
    command.set_defaults(function=demo)

    command = commands.add_parser(
        "train-lm",
        help="train a language model",
        description="Trains a transformer of any configuration on text, JSON lines or the generated small world. "
        "The run's folder gets the token rows, metrics.jsonl, loss.png, checkpoints, and at the end model/ in Hugging "
        "Face layout. The same command on the same folder resumes exactly where it stopped.",
        epilog="example: jclt train-lm small-world --out runs/world --set steps=500",
    )
    command.add_argument("config", metavar="CONFIG", help="a preset (small-world) or a .py file that defines `config`")
    command.add_argument("--out", type=Path, default=None, help="the run's folder (default runs/NAME)")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="overrides a setting, such as steps=500, learning_rate=1e-3 or model.layers=6; can be repeated",
    )
    command.set_defaults(function=train_lm)
    return top


def demo(arguments: argparse.Namespace) -> None:
    from jclt.models import load_model
    from jclt.world import TASKS
    from jclt.world.measure import answers

    examples = [task.examples("report", 1, arguments.seed)[0] for task in TASKS.values()]
    given = answers(load_model("demo"), examples)
    width = max(len(example.prompt) for example in examples)
    print(f"{'task':12}  {'prompt':{width}}  {'answer':11}  probability")
    for example, answer in zip(examples, given, strict=True):
        verdict = "right" if answer.right else f"wrong, expected {' or '.join(map(repr, example.answers[:3]))}"
        print(f"{example.task:12}  {example.prompt:{width}}  {answer.said!r:11}  {answer.probability:.3f} {verdict}")
    print(
        f"{sum(answer.right for answer in given)} of {len(given)} right; none of these prompts was in the training data"
    )


def train_lm(arguments: argparse.Namespace) -> None:
    from jclt.config import load_settings, override
    from jclt.training.config import LmConfig
    from jclt.training.lm import train_lm
    from jclt.training.presets import LM_PRESETS

    config = override(load_settings(arguments.config, LmConfig, LM_PRESETS), arguments.set)
    out = arguments.out or Path("runs") / Path(arguments.config).stem
    train_lm(config, out)
    print(f"done: model in {out / 'model'}, curve in {out / 'loss.png'}")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("jclt").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.WARNING)
    _keep_compiled_programs()
    try:
        arguments.function(arguments)
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UserError as error:
        print(f"jclt: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"jclt: {error.filename or 'file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except Interrupted as reason:
        print(f"jclt: {reason}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 0


def _keep_compiled_programs() -> None:
    """What was compiled once is read from a cache the next time."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update(
        "jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path(home) / "jclt")
    )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


if __name__ == "__main__":
    sys.exit(main())
