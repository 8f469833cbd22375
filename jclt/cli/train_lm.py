"""`jclt train-lm`: trains a language model."""

import argparse

from jclt.cli.arguments import Subcommands, add_run_arguments, start_run


def add_command(commands: Subcommands) -> None:
    command = commands.add_parser(
        "train-lm",
        help="train a language model",
        description="Trains a transformer of any configuration on text, JSON lines or the generated small world. "
        "Writes the token rows, metrics.jsonl, loss.png and checkpoints to the run's folder, and at the end model/ in "
        "Hugging Face layout. The same command on the same folder resumes exactly where it stopped.",
        epilog="example: jclt train-lm small-world --out runs/world --set steps=500",
    )
    add_run_arguments(command, "small-world", "steps=500, learning_rate=1e-3 or model.layers=6")
    command.set_defaults(function=run)


def run(arguments: argparse.Namespace) -> None:
    from jclt.training.config import LmConfig
    from jclt.training.lm import train_lm
    from jclt.training.presets import LM_PRESETS

    config, out = start_run(arguments, LmConfig, LM_PRESETS)
    train_lm(config, out)
    print(f"done: model in {out}/model, curve in {out}/loss.png")
