"""`jclt label`: short texts that say what features mean, with scores."""

import argparse
from pathlib import Path

from jclt.cli.arguments import (
    Subcommands,
    add_coder_arguments,
    check_new_file,
    load_coder_and_model,
    make_int_parser,
    parse_text,
)
from jclt.cli.features import parse_place
from jclt.errors import UserError


def add_command(commands: Subcommands) -> None:
    command = commands.add_parser(
        "label",
        help="label the features of a coder, and score the labels",
        description="Labels features in a file: by rules about tokens and positions and by what the weights say, or "
        "by a language model behind an endpoint that speaks the protocol of OpenAI's chats. Each label is scored on "
        "windows that it was not made from, beside labels of other features (shuffled) and of random directions. "
        "Labels that the file has stay, so that the same command goes on where it was interrupted.",
        epilog="example: jclt label demo --only 0/191 --rows 256; jclt label runs/gpt2/coder --data tokens/ --out "
        "labels.json --endpoint http://localhost:8000/v1 --explainer qwen3",
    )
    add_coder_arguments(command)
    command.add_argument(
        "--data", type=parse_text, default="world", help="world (default), a folder of tokens, or a text file"
    )
    command.add_argument("--rows", type=make_int_parser(2), help="rows of the data that are read (default 1024)")
    command.add_argument(
        "--length", type=make_int_parser(2), help="tokens per row (default 128, or the model's context)"
    )
    command.add_argument("--share", type=float, help="a feature fires at this share of the tokens, as in jclt features")
    command.add_argument(
        "--only", type=parse_place, action="append", metavar="LAYER/FEATURE", help="label this one; can be repeated"
    )
    command.add_argument("--out", type=Path, default=Path("labels.json"), help="the file (default labels.json)")
    command.add_argument(
        "--concepts",
        action="store_true",
        help="of a model of the small world: first by its known concepts, on held-out prompts; the rest by rules",
    )
    command.add_argument("--endpoint", metavar="URL", help="such as http://localhost:8000/v1")
    command.add_argument(
        "--explainer",
        metavar="NAME",
        help="the model's name there; its key is read from JCLT_API_KEY or OPENAI_API_KEY",
    )
    command.add_argument("--no-judge", action="store_true", help="do not ask the endpoint to judge its labels")
    command.set_defaults(function=run)


def run(arguments: argparse.Namespace) -> int:
    from jclt.features.endpoint import find_endpoint
    from jclt.features.label import add_concepts, label_features, summarize_labels

    if arguments.concepts and arguments.endpoint:
        raise UserError("--concepts: not with --endpoint, expected one of the two")
    if bool(arguments.endpoint) != bool(arguments.explainer):
        raise UserError("--endpoint and --explainer: expected both or none")
    endpoint = find_endpoint(arguments.endpoint, arguments.explainer) if arguments.endpoint else None
    check_new_file(arguments.out)
    model, coder = load_coder_and_model(arguments)
    if arguments.concepts:
        print(f"{add_concepts(model, coder, arguments.out, arguments.only)} features with a new label by concepts")
    found = label_features(
        model,
        coder,
        arguments.data,
        out=arguments.out,
        places=arguments.only,
        rows=arguments.rows,
        length=arguments.length,
        share=arguments.share,
        endpoint=endpoint,
        judge=not arguments.no_judge,
    )
    for (layer, feature), label in found.labels.items() if arguments.only else ():
        scores = ", ".join(f"{name} {score:.2f}" for name, score in label.scores.items())
        print(f"{layer}/{feature}  {label.text}  ({label.source}{': ' + scores if scores else ''})")
    print(summarize_labels(found))
    return 0
