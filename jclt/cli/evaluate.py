"""`jclt eval`: measures a coder."""

import argparse
import logging
from pathlib import Path

from jclt.cli.arguments import Subcommands, add_fit, add_model, at_least, check_new_json, load_coder_and_model
from jclt.errors import UserError

log = logging.getLogger(__name__)


def add_command(commands: Subcommands) -> None:
    command = commands.add_parser(
        "eval",
        help="measure a coder",
        description="Measures a coder on data it was not trained on: reconstruction, sparsity and dead features by "
        "layer; the replacement model, in which every MLP is replaced at every position, beside the model and beside "
        "one whose MLPs say only their mean; on the small world also how often the answers to each task stay.",
        epilog="example: jclt eval runs/tiny/coder; jclt eval runs/gpt2/coder --data stories.txt --rows 32 --json "
        "figures.json; jclt eval scope/layer_12 --model google/gemma-2-2b --reads mlp_in --writes mlp_out",
    )
    command.add_argument("coder", metavar="CODER", help="demo, or a folder in any layout that load_coder reads")
    add_model(command)
    add_fit(command)
    command.add_argument(
        "--data",
        default="world",
        help="world (default), a folder of tokens, or a text file; of the last two only the last sixteenth is measured "
        "on (at most 262,144 tokens), which training leaves out",
    )
    command.add_argument("--rows", type=at_least(1), default=128, help="token rows to measure on (default 128)")
    command.add_argument("--length", type=at_least(2), default=64, help="tokens a row (default 64)")
    command.add_argument("--seed", type=at_least(0), default=1, help="draws other rows (default 1), never training's")
    command.add_argument("--json", type=Path, help="also write the figures to this file")
    command.set_defaults(function=run)


def run(arguments: argparse.Namespace) -> None:
    from jclt.coders import check_fit
    from jclt.evaluation.evaluate import evaluate
    from jclt.files import write_json

    check_new_json(arguments.json)
    no_check, arguments.no_check = arguments.no_check, True
    model, coder = load_coder_and_model(arguments)
    if not no_check:
        try:
            check_fit(coder, model, arguments.coder)
        except UserError as error:  # the figures will say how badly
            log.warning("%s", error)
    words, figures = evaluate(model, coder, arguments.data, arguments.rows, arguments.length, arguments.seed)
    print(words)
    if arguments.json:
        write_json(arguments.json, figures)
