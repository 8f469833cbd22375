"""`jclt inspect`: prints the contents of a run's folder."""

import argparse
from pathlib import Path

from jclt.cli.arguments import Subcommands


def add_command(commands: Subcommands) -> None:
    command = commands.add_parser(
        "inspect",
        help="see what a run's folder holds",
        description="Prints a run's settings, its last metrics, the contents of its newest checkpoint, and a hash of "
        "the parameters, which is the same for two runs only if all bits are. Draws the curves as curves.png in the "
        "folder.",
        epilog="example: jclt inspect runs/tiny",
    )
    command.add_argument("run", type=Path, metavar="RUN", help="the folder of `jclt train` or `jclt train-lm`")
    command.set_defaults(function=run)


def run(arguments: argparse.Namespace) -> None:
    from jclt.training.inspect import inspect_run

    print(inspect_run(arguments.run))
