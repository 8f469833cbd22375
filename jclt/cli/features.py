"""`jclt features`: what each feature of a coder is."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from jclt.cli.arguments import (
    Subcommands,
    add_coder_arguments,
    load_coder_and_model,
    make_int_parser,
    parse_text,
)
from jclt.errors import UserError

if TYPE_CHECKING:
    from jclt.coders import CoderConfig


def parse_place(typed: str) -> tuple[int, int]:
    """LAYER/FEATURE."""
    layer, slash, feature = typed.partition("/")
    if not (slash and layer.isdecimal() and feature.isdecimal()):
        raise argparse.ArgumentTypeError(f"{typed[:40]!r}, expected LAYER/FEATURE such as 0/191")
    return int(layer), int(feature)


def add_command(commands: Subcommands) -> None:
    command = commands.add_parser(
        "features",
        help="see what each feature of a coder is",
        description="Describes every feature of a coder, in one pass over data: the examples with the highest "
        "activations and examples drawn at random, how often it fires and how strongly, the tokens it fires on and "
        "those that follow, the features that fire with it. From the weights: the tokens whose logits it raises and "
        "lowers, the layers it writes to, the features most like it. Interrupted, the same command goes on where the "
        "counts were last saved, and ends in the same files.",
        epilog="example: jclt features demo --show 0/191; jclt features runs/gpt2/coder --data tokens/ --out features; "
        "jclt features neurons --model smollm2 --data stories.txt --rows 200 --show 3/17",
    )
    add_coder_arguments(command)
    command.add_argument(
        "--keep",
        choices=("device", "host", "disk", "mesh"),
        help="where the coder's weights are kept; mesh: split over all devices (default: the first of the others that "
        "has room)",
    )
    command.add_argument(
        "--data", type=parse_text, default="world", help="world (default), a folder of tokens, or a text file"
    )
    command.add_argument(
        "--rows", type=make_int_parser(1), help="rows of the data, spread evenly (default: all; of the world 4096)"
    )
    command.add_argument(
        "--length", type=make_int_parser(2), help="tokens per row (default 128, or the model's context if it is less)"
    )
    command.add_argument(
        "--share",
        type=float,
        help="a feature fires at this share of the tokens, those with its highest activations (default for neurons: "
        "0.01; for sparse coders it fires where its activation is above 0)",
    )
    command.add_argument("--out", type=Path, default=Path("features"), help="the folder to write (default features)")
    command.add_argument(
        "--show", type=parse_place, action="append", metavar="LAYER/FEATURE", help="print one; can be repeated"
    )
    command.add_argument(
        "--viewer",
        type=Path,
        metavar="FOLDER",
        help="also write what published viewers read: a JSON file for each feature of --show, or without --show a "
        "bundle of all features",
    )
    command.set_defaults(function=run)


def check_place(config: "CoderConfig", layer: int, feature: int) -> None:
    """An error of one line, before the pass over the data, if the coder has no such feature."""
    if config.index(layer) is None:
        raise UserError(f"--show {layer}/{feature}: expected a layer of {', '.join(map(str, config.covered))}")
    if feature >= config.features:
        raise UserError(f"--show {layer}/{feature}: expected a feature from 0 to {config.features - 1}")


def run(arguments: argparse.Namespace) -> None:
    from jclt.features import describe_features, export_bundle, export_features, summarize
    from jclt.files import check_writable

    for folder in (arguments.out, *([arguments.viewer] if arguments.viewer else [])):
        check_writable(folder)
    model, coder = load_coder_and_model(arguments)
    places = arguments.show or []
    for layer, feature in places:
        check_place(coder.config, layer, feature)
    features = describe_features(
        model,
        coder,
        arguments.data,
        out=arguments.out,
        rows=arguments.rows,
        length=arguments.length,
        share=arguments.share,
    )
    print(summarize(features))
    for place in places:
        print(f"\n{features[place].describe()}")
    if arguments.viewer and places:
        export_features(features, places, arguments.viewer)
    elif arguments.viewer:
        export_bundle(features, arguments.viewer)
    if not places:
        print(f"\nin {arguments.out}: jclt.load_features; --show LAYER/FEATURE prints one of them")
