"""`jclt verify`: whether a coder's replacement model does what the model does."""

import argparse
from pathlib import Path

from jclt.cli.arguments import Subcommands, add_coder_arguments, check_new_file, load_coder_and_model, make_int_parser


def add_command(commands: Subcommands) -> None:
    command = commands.add_parser(
        "verify",
        help="accept or reject a coder",
        description="Changes the true model's residual stream between two layers, to that of a prompt that differs in "
        "one concept, by one feature, and at random, and compares what the model's later MLPs do with what the coder's "
        "features do in their place. A coder is accepted if after every layer its features follow at least half of the "
        "reaction to the changes of concepts. Exit status 1: rejected. Reconstruction cannot show this: a coder that "
        "does in one step what the model does in two may have no error. Of a cross-layer transcoder it also says how "
        "much of the reaction earlier features have written in one hop; --beside compares with per-layer transcoders.",
        epilog="example: jclt verify demo --beside demo-transcoders; jclt verify runs/gpt2/coder --prompts pairs.jsonl "
        "--count 50 --json v.json",
    )
    add_coder_arguments(command)
    command.add_argument(
        "--prompts",
        default="world",
        metavar="FILE",
        help="pairs of prompts that share all but one concept: world (default), or a file with the fields clean, "
        "corrupted and answer in each row, in text or token ids, or in a published layout (jclt/interventions)",
    )
    command.add_argument(
        "--count", type=make_int_parser(1), default=10, help="pairs of each task, or of the file (default 10)"
    )
    command.add_argument(
        "--seed", type=make_int_parser(0), default=0, help="of the pairs and the random directions (default 0)"
    )
    command.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="CODER",
        help="also measure this coder of the same model, on the same pairs; can be repeated",
    )
    command.add_argument("--json", type=Path, help="also write the figures to this file")
    command.set_defaults(function=run)


def run(arguments: argparse.Namespace) -> int:
    from jclt.coders import load_coder
    from jclt.evaluation.verdict import find_pairs, tabulate_verdicts, verify
    from jclt.files import check_file, write_json

    check_new_file(arguments.json)
    if arguments.prompts != "world":
        check_file(Path(arguments.prompts), "world, or a file of pairs of prompts")
    model, coder = load_coder_and_model(arguments)
    others = {name: load_coder(name, model=model, keep="device") for name in arguments.beside}
    pairs = find_pairs(model, arguments.prompts, arguments.count, arguments.seed)
    verdict = verify(model, coder, pairs, arguments.seed)
    print(f"{len(pairs)} pairs of prompts\n{verdict.table()}\n{verdict}")
    beside = {name: verify(model, other, pairs, arguments.seed) for name, other in others.items()}
    for name, other in beside.items():
        print(f"\n{name}\n{other.table()}\n{other}")
    if beside:
        print(f"\n{tabulate_verdicts({arguments.coder: verdict} | beside)}")
    if arguments.json:
        figures = {name: other.summary() for name, other in beside.items()}
        write_json(arguments.json, verdict.summary() | ({"beside": figures} if figures else {}))
    return int(not verdict.accepted)
