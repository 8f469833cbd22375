"""`jclt convert`: writes a coder in another layout."""

import argparse
from pathlib import Path

from jclt.cli.arguments import Subcommands, add_fit_arguments


def add_command(commands: Subcommands) -> None:
    command = commands.add_parser(
        "convert",
        help="write a sparse coder in another layout",
        description="Reads a coder in any layout and writes it in another. The layout jclt keeps everything, and "
        "circuit-tracer loads it too. The other layouts hold what their own tools read; a coder that a layout cannot "
        "represent is refused. With --model, first checks that the coder fits this model.",
        epilog="example: jclt convert gemma-scope-2b-pt-transcoders/layer_12/width_16k/average_l0_6 layer_12 --to "
        "jclt; jclt convert runs/mine/coder mine --to saelens --model gpt2 --no-check",
    )
    command.add_argument("source", metavar="SOURCE", help="the folder of a coder, or demo")
    command.add_argument("dest", type=Path, metavar="DEST", help="the new folder")
    command.add_argument(
        "--to",
        required=True,
        metavar="LAYOUT",
        help="jclt, circuit-tracer, gemma-scope, gemma-scope-2 or saelens",
    )
    command.add_argument("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
    command.add_argument(
        "--model",
        metavar="NAME",
        help="the model that the coder must fit: demo, smollm2, a folder, a GGUF file or a hub name",
    )
    add_fit_arguments(command)
    command.set_defaults(function=run)


def run(arguments: argparse.Namespace) -> None:
    from jclt.coders import load_coder, save_coder
    from jclt.files import check_new_folder
    from jclt.models import load_model

    model = load_model(arguments.model) if arguments.model else None
    sites = {"reads": arguments.reads, "writes": arguments.writes}
    check_new_folder(arguments.dest)
    coder = load_coder(
        arguments.source, keep="device", model=model, dtype=arguments.dtype, check=not arguments.no_check, **sites
    )
    save_coder(coder, arguments.dest, arguments.to, arguments.dtype)
    config = coder.config
    print(
        f"done: {config.kind} of {len(config.covered)} layers with {config.features} {config.rule} features each, "
        f"{config.reads} to {config.writes}, in {arguments.dest}"
    )
