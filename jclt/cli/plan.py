"""`jclt plan`: estimates the cost of a run on a TPU pod."""

import argparse
from pathlib import Path
from typing import Any

from jclt.cli.arguments import Subcommands, check_new_file, make_int_parser, parse_amount, parse_text


def add_command(commands: Subcommands) -> None:
    command = commands.add_parser(
        "plan",
        help="what a run on a TPU pod will cost",
        description="Compiles the run's train step for a TPU slice that you do not need to have, with libtpu "
        "(pip install 'jclt[tpu]'). Prints the compiler's figures: memory by kind, operations, the time of a step by "
        "its schedule and the least possible time, communication and how much of it overlaps with computation, tokens "
        "per second, chip-hours, and what to change if the run does not fit. These are estimates, not measurements. "
        "--prompt-length also plans attribution graphs, and --active the sparse path, which takes two to three times "
        "as long; --graphs plans graphs alone: seconds of a graph at two precisions, graphs a chip-hour, and memory. "
        "Prints each part as soon as it is ready.",
        epilog="example: jclt plan tpu_configs/gpt2_small_300k_v5e_8.py; jclt plan my_run.py --topology v5p:4x4x8; "
        "jclt plan my_run.py --prompt-length 64 --active 100; jclt plan my_run.py --graphs --active 375",
    )
    command.add_argument(
        "config", metavar="CONFIG", help="a preset, or a .py file that defines `config` and `pod`; the file is executed"
    )
    command.add_argument(
        "--topology", metavar="NAME", help="such as v5e:16x16, v5p:4x4x8, v6e:8x8 (default: the file's)"
    )
    command.add_argument("--slices", type=make_int_parser(1), metavar="N", help="number of slices, joined by a network")
    other = command.add_mutually_exclusive_group()
    other.add_argument(
        "--sweep", action="store_true", help="also try other meshes, micro-batches and rematerialisation"
    )
    other.add_argument(
        "--graphs", action="store_true", help="plan attribution graphs alone, not the training of the coder"
    )
    command.add_argument(
        "--prompt-length",
        type=make_int_parser(0),
        default=0,
        metavar="T",
        help="also plan attribution graphs, for prompts of this many tokens (default 0: no; with --graphs 20)",
    )
    command.add_argument(
        "--active",
        type=parse_amount,
        default=0.0,
        metavar="K",
        help="also plan the sparse path, for this many active features per token over all layers (default 0: no; for "
        "graphs 100)",
    )
    command.add_argument(
        "--set", action="append", type=parse_text, default=[], metavar="NAME=VALUE", help="as in `jclt train`"
    )
    command.add_argument("--json", type=Path, help="also write the figures to this file")
    command.set_defaults(function=run)


def run(arguments: argparse.Namespace) -> None:
    from jclt.config import load_settings, override
    from jclt.files import write_json
    from jclt.pods import load_pod, plan_prompts, plan_run, plan_sweep
    from jclt.training.config import TrainConfig
    from jclt.training.presets import CODER_PRESETS

    config = override(load_settings(arguments.config, TrainConfig, CODER_PRESETS), arguments.set)
    pod = load_pod(arguments.config, arguments.topology, arguments.slices)
    check_new_file(arguments.json)
    if arguments.sweep:
        words, variants = plan_sweep(config, pod)
        print(words)
        figures: dict[str, Any] = {"variants": variants}
    elif arguments.graphs:
        words, figures = plan_prompts(config, pod, arguments.prompt_length or 20, arguments.active)
        print(words)
    else:
        _, figures = plan_run(config, pod, arguments.prompt_length, arguments.active, _print_part)
    if arguments.json:
        write_json(arguments.json, figures)


def _print_part(part: str) -> None:
    """Prints one part of the plan at once, because the next one may take minutes."""
    print(f"{part}\n", flush=True)
