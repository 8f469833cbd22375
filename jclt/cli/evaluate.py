"""`jclt eval`: measures a coder."""

import argparse
import logging
from pathlib import Path

from jclt.cli.arguments import (
    Subcommands,
    add_coder_arguments,
    check_new_file,
    load_coder_and_model,
    make_int_parser,
)
from jclt.errors import UserError

log = logging.getLogger(__name__)


def add_command(commands: Subcommands) -> None:
    command = commands.add_parser(
        "eval",
        help="measure a coder",
        description="Measures a coder on data on which it was not trained: reconstruction, sparsity and dead features "
        "of each layer; the replacement model, in which the coder replaces every MLP, compared with the model and with "
        "a model whose MLPs return their mean; on the small world also how often the answers to each task stay the "
        "same. With --graphs, --faithfulness and the like, what graphs of a set of prompts say; each figure with its "
        "interval over prompts and its control.",
        epilog="example: jclt eval runs/tiny/coder; jclt eval runs/gpt2/coder --data stories.txt --rows 32 --json "
        "figures.json; jclt eval scope/layer_12 --model google/gemma-2-2b --reads mlp_in --writes mlp_out; "
        "jclt eval demo --graphs --beside neurons",
    )
    add_coder_arguments(command)
    command.add_argument(
        "--data",
        default="world",
        help="world (default), a folder of tokens, or a text file; of a folder or file only the last sixteenth is used "
        "(at most 262,144 tokens), which training leaves out",
    )
    command.add_argument("--rows", type=make_int_parser(1), default=128, help="number of token rows (default 128)")
    command.add_argument("--length", type=make_int_parser(2), default=64, help="tokens per row (default 64)")
    command.add_argument(
        "--seed", type=make_int_parser(0), default=1, help="seed of the rows (default 1); they are never training rows"
    )
    command.add_argument(
        "--tasks", type=make_int_parser(1), default=200, help="prompts of each task of the small world (default 200)"
    )
    for name, what in (
        ("graphs", "scores, lengths of paths, and sizes after pruning"),
        ("faithfulness", "each feature's influence beside what its ablation does, in the true model"),
        ("circuits", "the claims that interventions confirm, and whether the pruned graph is necessary and sufficient"),
        (
            "distances",
            "the local replacement model beside the model, by the number of layers after a perturbation",
        ),
    ):
        command.add_argument(
            f"--{name}", dest="questions", action="append_const", const=name, help=f"instead, on graphs: {what}"
        )
    command.add_argument(
        "--prompts",
        default="world",
        metavar="FILE",
        help="of which graphs are made: world (default), or a file as `jclt attribute --prompts` reads it",
    )
    command.add_argument(
        "--count", type=make_int_parser(1), default=3, help="prompts of each task, or of the file (default 3)"
    )
    command.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="CODER",
        help="also measure the graphs of this coder; neurons and thresholded-neurons are the model's own, all or as "
        "many as the coder has active features; can be repeated",
    )
    command.add_argument("--json", type=Path, help="also write the figures to this file")
    command.set_defaults(function=run)


def run(arguments: argparse.Namespace) -> None:
    from jclt.coders import check_fit, load_coder
    from jclt.evaluation.evaluate import evaluate
    from jclt.evaluation.prompts import find_prompts
    from jclt.evaluation.questions import THRESHOLDED, answer_questions
    from jclt.files import check_file, write_json

    check_new_file(arguments.json)
    if arguments.questions and arguments.prompts != "world":
        check_file(Path(arguments.prompts), "world, or a file with a prompt on each line")
    no_check, arguments.no_check = arguments.no_check, True
    model, coder = load_coder_and_model(arguments)
    if not no_check:
        try:
            check_fit(coder, model, arguments.coder)
        except UserError as error:  # the figures show how well it fits
            log.warning("%s", error)
    if arguments.questions:
        prompts = find_prompts(model, arguments.prompts, arguments.count, arguments.seed)
        names = list(dict.fromkeys(arguments.questions))
        others = {name: None if name == THRESHOLDED else load_coder(name, model=model) for name in arguments.beside}
        words, figures = answer_questions(model, {arguments.coder: coder} | others, names, prompts, arguments.seed)
    else:
        sizes = arguments.rows, arguments.length, arguments.seed, arguments.tasks
        words, figures = evaluate(model, coder, arguments.data, *sizes)
    print(words)
    if arguments.json:
        write_json(arguments.json, figures)
