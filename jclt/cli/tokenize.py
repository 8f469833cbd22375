"""`jclt tokenize`: turns text into token arrays."""

import argparse
from pathlib import Path

from jclt.cli.arguments import Subcommands, parse_text
from jclt.errors import UserError


def add_command(commands: Subcommands) -> None:
    command = commands.add_parser(
        "tokenize",
        help="turn text into token arrays for training",
        description="Tokenises text once, for any number of runs. Reads text files (each is one document; a file of "
        "more than 16 MiB is tokenised in pieces cut at line breaks), JSON lines (the field `text`) and Parquet (the "
        "column `text`), also compressed as .gz, .bz2, .xz or .zst. Writes tokens-00000.npy ... with one document "
        "after another, each followed by the end token, then the tokenizer and manifest.json. The tokens do not depend "
        "on the number of workers. The same command on the same folder continues after the last complete shard.",
        epilog="example: jclt tokenize 'stories/*.jsonl.gz' more.parquet --tokenizer gpt2 --out tokens; "
        "then: jclt train-lm config.py --set data=tokens",
    )
    command.add_argument("inputs", nargs="+", metavar="INPUT", help="a file, a folder, a glob, or a URL such as gs://")
    command.add_argument(
        "--tokenizer",
        required=True,
        metavar="NAME",
        help="a folder with tokenizer.json, a GGUF file, smollm2, or a hub name such as gpt2",
    )
    command.add_argument("--out", required=True, metavar="DIR", help="the folder or URL to write to")
    command.add_argument(
        "--field",
        type=parse_text,
        default="text",
        metavar="NAME",
        help="the field of JSON lines, the column of Parquet (default text)",
    )
    command.add_argument(
        "--end",
        type=parse_text,
        metavar="TOKEN",
        help="the end token, as text or number (default: eos_token of the tokenizer's "
        "tokenizer_config.json, or of the GGUF file)",
    )
    command.add_argument("--workers", type=int, metavar="N", help="number of threads (default: one per core)")
    command.add_argument(
        "--shard-tokens",
        type=int,
        default=1 << 26,
        metavar="N",
        help="a shard ends after the document with which it reaches N tokens (default 67108864)",
    )
    command.set_defaults(function=run)


def run(arguments: argparse.Namespace) -> None:
    from jclt.data.tokenize import tokenize

    manifest = tokenize(
        arguments.inputs,
        _find_tokenizer(arguments.tokenizer),
        arguments.out,
        workers=arguments.workers,
        shard_tokens=arguments.shard_tokens,
        end=arguments.end,
        field=arguments.field,
    )
    shards = f"{len(manifest['shards'])} shards in {arguments.out}"
    print(f"done: {manifest['tokens']} tokens of {manifest['documents']} documents, {shards}")


def _find_tokenizer(name: str) -> Path:
    """The folder or GGUF file of this name, or the local folder of the tokenizer with this hub name."""
    from jclt.models import find_model

    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file() and folder.suffix.lower() != ".gguf":
        raise UserError(f"tokenizer '{name}': is a file, expected the folder that holds it, a .gguf file or a hub name")
    try:
        return find_model(name, ("tokenizer*.json", "vocab.json", "merges.txt"))
    except UserError as error:
        reason = str(error).removeprefix(f"model '{name}': ")
        raise UserError(f"tokenizer '{name}': {reason}") from None
