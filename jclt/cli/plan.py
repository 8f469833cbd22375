"""`jclt plan`: what a run on a TPU pod will cost."""

import argparse
from pathlib import Path
from typing import Any

from jclt.cli.arguments import Subcommands, amount, at_least, check_new_json, text


def add_command(commands: Subcommands) -> None:
    command = commands.add_parser(
        "plan",
        help="what a run on a TPU pod will cost",
        description="Compiles the run's own train step for a TPU slice that need not be at hand, with libtpu "
        "(pip install 'jclt[tpu]'), and prints what the compiler says of it: memory by kind, operations, the time of a "
        "step by its schedule beside what it can be no less than, traffic and how much of it work hides, tokens a "
        "second, chip-hours, and what to change where it does not fit. An estimate, not a measurement. The program "
        "that attribution graphs are made with is compiled too, for prompts of --prompt-length tokens. The sparse path "
        "is planned beside the dense one, for --active features. Each part is printed as soon as it is ready.",
        epilog="example: jclt plan tpu_configs/gpt2_small_300k_v5e_8.py; jclt plan my_run.py --topology v5p:4x4x8; "
        "jclt plan my_run.py --prompt-length 0 --active 0, the dense step alone",
    )
    command.add_argument(
        "config", metavar="CONFIG", help="a preset, or a .py file, which is run, that defines `config` and `pod`"
    )
    command.add_argument(
        "--topology", metavar="NAME", help="such as v5e:16x16, v5p:4x4x8, v6e:8x8 (default: the file's)"
    )
    command.add_argument("--slices", type=at_least(1), metavar="N", help="that many of them, joined by a network")
    command.add_argument("--sweep", action="store_true", help="other meshes, micro-batches and rematerialisation too")
    command.add_argument(
        "--prompt-length",
        type=at_least(0),
        default=64,
        metavar="T",
        help="of the attribution program (default 64; 0: none)",
    )
    command.add_argument(
        "--active",
        type=amount,
        default=100.0,
        metavar="K",
        help="features active at a token, of all layers, for which the sparse path is planned (default 100; 0: not)",
    )
    command.add_argument(
        "--set", action="append", type=text, default=[], metavar="NAME=VALUE", help="as in `jclt train`"
    )
    command.add_argument("--json", type=Path, help="also write the figures to this file")
    command.set_defaults(function=run)


def run(arguments: argparse.Namespace) -> None:
    from jclt.config import load_settings, override
    from jclt.files import write_json
    from jclt.pods import load_pod, plan_run, plan_sweep
    from jclt.training.config import TrainConfig
    from jclt.training.presets import CODER_PRESETS

    config = override(load_settings(arguments.config, TrainConfig, CODER_PRESETS), arguments.set)
    pod = load_pod(arguments.config, arguments.topology, arguments.slices)
    check_new_json(arguments.json)
    if arguments.sweep:
        words, variants = plan_sweep(config, pod)
        print(words)
        figures: dict[str, Any] = {"variants": variants}
    else:
        _, figures = plan_run(config, pod, arguments.prompt_length, arguments.active, _say)
    if arguments.json:
        write_json(arguments.json, figures)


def _say(part: str) -> None:
    """One part of several that come minutes apart."""
    print(f"{part}\n", flush=True)
