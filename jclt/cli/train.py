"""`jclt train`: trains a sparse coder."""

import argparse

from jclt.cli.arguments import Subcommands, add_run_arguments, make_int_parser, start_run


def add_command(commands: Subcommands) -> None:
    command = commands.add_parser(
        "train",
        help="train a sparse coder on a language model",
        description="Trains a cross-layer transcoder, a per-layer transcoder or an SAE on any model that jclt loads, "
        "on all devices. Writes metrics.jsonl, curves.png and checkpoints to the run's folder, and at the end coder/, "
        "which load_coder and circuit-tracer read. The same command on the same folder resumes exactly where it "
        "stopped.",
        epilog="example: jclt train tiny --out runs/tiny --set steps=300 --set coder.features=256",
    )
    add_run_arguments(
        command,
        "tiny, small-world, small-world-transcoders, smollm2-transcoders, smollm2-clt",
        "steps=500, model=gpt2 or coder.features=4096",
    )
    command.add_argument(
        "--profile",
        type=make_int_parser(0),
        default=0,
        metavar="STEPS",
        help="records this many steps for XProf, in OUT/profile",
    )
    command.set_defaults(function=run)


def run(arguments: argparse.Namespace) -> None:
    from jclt.training.coder.train import train_coder
    from jclt.training.config import TrainConfig
    from jclt.training.presets import CODER_PRESETS

    config, out = start_run(arguments, TrainConfig, CODER_PRESETS)
    train_coder(config, out, profile=arguments.profile)
    print(f"done: coder in {out}/coder, curves in {out}/curves.png")
