"""The `jclt` command: each subcommand parses, calls one function of a room, prints.

Nothing that loads JAX is imported before a command needs it, so that help and mistakes are answered at once.
"""

import argparse
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from jclt import __version__
from jclt.config import cache_folder
from jclt.errors import Interrupted, UserError, first_line, printable, reason_of, shortened
from jclt.interrupts import INTERRUPTED

if TYPE_CHECKING:
    from jclt.attribution import Graph
    from jclt.coders import SparseCoder
    from jclt.models import Model

Config = TypeVar("Config")
log = logging.getLogger(__name__)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line after the usage: what was typed may hold colours and line breaks."""
        super().error(shortened(printable(message)))

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Older Pythons take the value of `--flag=--` for none."""
        if arg_strings == ["--"] and action.nargs is None and action.option_strings:
            raise argparse.ArgumentError(action, "expected one argument")
        return super()._get_values(action, arg_strings)


def text(typed: str) -> str:
    """What was typed as text, whatever the locale takes its bytes for: UTF-8 if they are that."""
    try:
        return os.fsencode(typed).decode()
    except UnicodeError:
        pass
    try:
        typed.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("not UTF-8 text") from None
    return typed


def at_least(least: int) -> Callable[[str], int]:
    """The type of a whole number that is not below."""

    def whole(typed: str) -> int:
        try:
            number = int(typed)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{typed[:40]!r}, expected a whole number") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"{number}, expected at least {least}")
        return number

    return whole


def amount(typed: str) -> float:
    """The type of a number from 0 on."""
    try:
        number = float(typed)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{typed[:40]!r}, expected a number") from None
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{number}, expected a number from 0 on")
    return number


def target(typed: str) -> str | tuple[str, str]:
    """A token, or two with ~ between them."""
    parts = text(typed).split("~") if typed.strip() != "~" else [typed]
    if len(parts) > 2 or not all(parts):
        raise argparse.ArgumentTypeError(f"{typed!r}, expected TOKEN, or FIRST~SECOND for their difference")
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="jclt", description="Circuit tracing of language models in JAX.")
    top.add_argument("--version", action="version", version=f"jclt {__version__}")
    top.add_argument("-v", "--verbose", action="store_true", help="say more of what is done")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "demo",
        help="see how the shipped model finds its answers",
        description="For one prompt of each task of the small world, none of which the shipped model was trained on: "
        "its answer, its attribution graph by the shipped transcoder, how much of it that explains, and the strongest "
        "paths from the prompt to the answer. The graphs are written as .npz, as a viewer's .json and as a picture.",
    )
    command.add_argument("--out", type=Path, default=Path("demo"), help="the folder for the graphs (default demo)")
    command.add_argument("--seed", type=at_least(0), default=0, help="draws other prompts (default 0)")
    command.set_defaults(function=demo)

    command = commands.add_parser(
        "attribute",
        help="compute attribution graphs",
        description="Computes the attribution graph of a prompt, prints what it explains and its strongest paths, and "
        "with --out writes it: NAME.npz, NAME.json for viewers and NAME.png, where NAME is made of the prompt. The "
        "same prompt with the same settings takes the place of its older graph; any other gets a name of its own "
        "(NAME-2 ...). graph-metadata.json lists the folder's graphs for viewers. With --prompts it computes a graph "
        "for every line of a file, many at once; the same command goes on where it stopped. The exit status is 1 where "
        "every prompt failed.",
        epilog="example: jclt attribute 'calc: 36+59=' --out sum; jclt attribute 'calc: 36+59=' --target 95~94; jclt "
        "attribute 'Once upon a' --coder runs/mine/coder --no-check; jclt attribute --prompts prompts.txt --out graphs "
        "--json",
    )
    command.add_argument("prompt", nargs="?", type=text, metavar="PROMPT", help="text")
    command.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt a line, or JSON lines with `prompt`")
    command.add_argument("--out", type=Path, metavar="DIR", help="the folder to write to; needed with --prompts")
    command.add_argument(
        "--json", action="store_true", help="with --prompts: each graph also as NUMBER.json, pruned, for viewers"
    )
    _add_model(command)
    command.add_argument("--coder", help="demo, or a folder in any layout that is read (default demo, for model demo)")
    _add_fit(command)
    command.add_argument(
        "--target",
        action="append",
        type=target,
        metavar="TOKEN",
        help="a token to explain, such as ' Denver', or two as ' Denver~ Austin', the first one's logit less the "
        "second's; can be repeated (default: the likeliest next tokens)",
    )
    command.add_argument(
        "--max-features", type=int, default=7500, metavar="N", help="features to trace at most (default 7500)"
    )
    command.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="M",
        help="trace only until every influence is known to this much (default 0: all up to --max-features)",
    )
    command.add_argument(
        "--conventions", default="jclt", metavar="WHOSE", help="jclt (default), or circuit-tracer for its very graphs"
    )
    command.add_argument("--batch", type=at_least(1), default=8, metavar="N", help="prompts at once (default 8)")
    command.set_defaults(function=attribute)

    command = commands.add_parser(
        "train-lm",
        help="train a language model",
        description="Trains a transformer of any configuration on text, JSON lines or the generated small world. "
        "The run's folder gets the token rows, metrics.jsonl, loss.png, checkpoints, and at the end model/ in Hugging "
        "Face layout. The same command on the same folder resumes exactly where it stopped.",
        epilog="example: jclt train-lm small-world --out runs/world --set steps=500",
    )
    _add_run(command, "small-world", "steps=500, learning_rate=1e-3 or model.layers=6")
    command.set_defaults(function=train_lm)

    command = commands.add_parser(
        "train",
        help="train a sparse coder on a language model",
        description="Trains a cross-layer transcoder, a per-layer transcoder or an SAE on any model that jclt loads, "
        "on all devices at hand. The run's folder gets metrics.jsonl, curves.png, checkpoints, and at the end coder/, "
        "which load_coder and circuit-tracer read. The same command on the same folder resumes exactly where it "
        "stopped.",
        epilog="example: jclt train tiny --out runs/tiny --set steps=300 --set coder.features=256",
    )
    _add_run(command, "tiny, small-world", "steps=500, model=gpt2 or coder.features=4096")
    command.add_argument(
        "--profile",
        type=at_least(0),
        default=0,
        metavar="STEPS",
        help="traces so many steps for XProf, into OUT/profile",
    )
    command.set_defaults(function=train)

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
    _add_model(command)
    _add_fit(command)
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
    command.set_defaults(function=evaluate)

    command = commands.add_parser(
        "inspect",
        help="see what a run's folder holds",
        description="Prints a run's settings, its last metrics, what its newest checkpoint holds, and a digest of the "
        "parameters, equal for two runs only where every bit is; draws the curves as curves.png in the folder.",
        epilog="example: jclt inspect runs/tiny",
    )
    command.add_argument("run", type=Path, metavar="RUN", help="the folder of `jclt train` or `jclt train-lm`")
    command.set_defaults(function=inspect)

    command = commands.add_parser(
        "tokenize",
        help="turn text into token arrays for training",
        description="Tokenises text once, for any number of runs: text files (each one document; one of more than "
        "16 MiB is tokenised in pieces cut at line breaks), JSON lines (the field `text`) and Parquet (the column "
        "`text`), packed as .gz, .bz2, .xz or .zst or not. The folder gets tokens-00000.npy ..., in which documents "
        "follow one another, each with its end token, the tokenizer, and at last manifest.json. The tokens do not "
        "depend on the number of workers. The same command on the same folder goes on after the last whole shard.",
        epilog="example: jclt tokenize 'stories/*.jsonl.gz' more.parquet --tokenizer gpt2 --out tokens; "
        "then: jclt train-lm config.py --set data=tokens",
    )
    command.add_argument("inputs", nargs="+", metavar="INPUT", help="a file, a folder, a glob, or a URL such as gs://")
    command.add_argument(
        "--tokenizer",
        required=True,
        metavar="NAME",
        help="a folder with tokenizer.json, or a hub name such as gpt2",
    )
    command.add_argument("--out", required=True, metavar="DIR", help="the folder or URL to write to")
    command.add_argument(
        "--field", type=text, default="text", metavar="NAME", help="of JSON lines and Parquet (default text)"
    )
    command.add_argument(
        "--end",
        type=text,
        metavar="TOKEN",
        help="what ends a document, as text or number (default: eos_token of the tokenizer's tokenizer_config.json)",
    )
    command.add_argument("--workers", type=int, metavar="N", help="threads that tokenise (default: one per core)")
    command.add_argument(
        "--shard-tokens",
        type=int,
        default=1 << 26,
        metavar="N",
        help="a file ends with the first document that brings it to this many tokens (default 67108864)",
    )
    command.set_defaults(function=tokenize)

    command = commands.add_parser(
        "plan",
        help="what a run on a TPU pod will cost",
        description="Compiles the run's own train step for a TPU slice that need not be at hand, with libtpu "
        "(pip install 'jclt[tpu]'), and prints what the compiler says of it: memory by kind, operations, the time of a "
        "step by its schedule beside what it can be no less than, traffic and how much of it work hides, tokens a "
        "second, chip-hours, and what to change where it does not fit. An estimate, not a measurement. --prompt-length "
        "also plans the program that attribution graphs are made with, and --active the sparse path beside the dense "
        "one, which takes two to three times as long. Each part is printed as soon as it is ready.",
        epilog="example: jclt plan tpu_configs/gpt2_small_300k_v5e_8.py; jclt plan my_run.py --topology v5p:4x4x8; "
        "jclt plan my_run.py --prompt-length 64 --active 100",
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
        default=0,
        metavar="T",
        help="also plan the program that makes graphs, for prompts of so many tokens (default 0: not)",
    )
    command.add_argument(
        "--active",
        type=amount,
        default=0.0,
        metavar="K",
        help="also plan the sparse path, for so many features active at a token, of all layers (default 0: not)",
    )
    command.add_argument(
        "--set", action="append", type=text, default=[], metavar="NAME=VALUE", help="as in `jclt train`"
    )
    command.add_argument("--json", type=Path, help="also write the figures to this file")
    command.set_defaults(function=plan)

    command = commands.add_parser(
        "convert",
        help="write a sparse coder in another layout",
        description="Reads a coder in any layout and writes it in another. jclt keeps all of a coder, and "
        "circuit-tracer loads its folders too; the other layouts hold what their own tools read, and what one of them "
        "cannot say is refused in one line. With --model, the coder is first seen to fit that model.",
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
    command.add_argument("--model", metavar="NAME", help="the model that it must fit: demo, a folder or a hub name")
    _add_fit(command)
    command.set_defaults(function=convert)
    return top


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model", help="demo, a folder or a hub name (default: the model that the coder's own files name)"
    )


def _add_fit(command: argparse.ArgumentParser) -> None:
    """How a coder stands in its model."""
    command.add_argument("--reads", metavar="SITE", help="where it reads, if its files do not say (such as mlp_in)")
    command.add_argument("--writes", metavar="SITE", help="where it writes, likewise (such as mlp_out)")
    command.add_argument(
        "--no-check",
        action="store_true",
        help="takes the coder even if what it makes of a short text does not fit the model",
    )


def _add_run(command: argparse.ArgumentParser, presets: str, settings: str) -> None:
    """The arguments of everything that trains."""
    command.add_argument(
        "config", metavar="CONFIG", help=f"a preset ({presets}), or a .py file, which is run, that defines `config`"
    )
    command.add_argument("--out", help="the run's folder, or a URL such as gs://bucket/run (default runs/NAME)")
    command.add_argument(
        "--set",
        action="append",
        type=text,
        default=[],
        metavar="NAME=VALUE",
        help=f"overrides a setting, such as {settings}; can be repeated",
    )


def _start_run(
    arguments: argparse.Namespace, kind: type[Config], presets: Mapping[str, Callable[[], Config]]
) -> tuple[Config, str]:
    """What `_add_run` asked for: the run's settings and its folder."""
    from jclt.config import load_settings, override
    from jclt.pods.flags import set_flags
    from jclt.sharding import join_hosts

    set_flags()  # read when the first TPU is used
    join_hosts()
    config = override(load_settings(arguments.config, kind, presets), arguments.set)
    out = arguments.out or f"runs/{Path(arguments.config).stem}"
    if out.startswith("file:"):
        raise UserError(f"--out '{out}': expected the folder's path, or a URL of a bucket such as gs://bucket/run")
    try:
        out.encode()
    except UnicodeEncodeError:
        raise UserError(f"--out '{out}': not UTF-8, expected a name that checkpoints can have") from None
    return config, out


def demo(arguments: argparse.Namespace) -> None:
    from jclt.files import check_writable
    from jclt.viewer.demo import demo

    check_writable(arguments.out)
    print(demo(arguments.out, arguments.seed))


def _load(arguments: argparse.Namespace) -> "tuple[Model, SparseCoder]":
    """The coder that was asked for and its model: by default the one that its own files name."""
    from jclt.coders import load_coder
    from jclt.models import load_model

    name, coder = arguments.model, arguments.coder
    if coder is None and name not in (None, "demo"):
        raise UserError(f"model '{name}': expected --coder too, a coder of this model (demo is the demo model's)")
    coder = coder or "demo"
    if name is None and coder != "demo":
        name = _own_model(coder)
        log.info("model %s, as the coder's files say", name)
        try:
            model = load_model(name)
        except UserError as error:
            raise UserError(f"{error}; the files of coder '{coder}' name it, --model says another") from None
    else:
        model = load_model(name or "demo")
    return model, load_coder(
        coder, model=model, reads=arguments.reads, writes=arguments.writes, check=not arguments.no_check
    )


def _own_model(coder: str) -> str:
    """The name of the model that a coder's files say it is of."""
    from jclt.coders import coder_model

    name = coder_model(coder)
    if not name:
        raise UserError(f"coder '{coder}': its files name no model, expected --model")
    return name


def attribute(arguments: argparse.Namespace) -> int:
    from jclt.attribution import Options, attribute, attribute_file, prune
    from jclt.files import check_file, check_writable
    from jclt.sharding import own_share
    from jclt.viewer import MEANING, summary, write_graph, write_index, write_viewer_json

    if (arguments.prompt is None) == (arguments.prompts is None):
        raise UserError("attribute: expected either a prompt or --prompts FILE")
    if arguments.prompts is not None and arguments.out is None:
        raise UserError("attribute: --prompts needs --out DIR, the folder for the graphs")
    if arguments.prompt == "":
        raise UserError("prompt: empty, expected at least one token")
    options = Options(arguments.target, arguments.max_features, arguments.tolerance, arguments.conventions)
    options.check()
    if arguments.prompts is not None:
        check_file(arguments.prompts, "a file with a prompt on each line")
    out: Path | None = arguments.out
    if out is not None:
        check_writable(out)
    share = own_share() if arguments.prompts is not None else (0, 1)
    model, coder = _load(arguments)
    if arguments.prompts is not None and out is not None:

        def write_json(graph: "Graph", name: str) -> None:
            write_viewer_json(graph, out, name)

        also = write_json if arguments.json else None
        written, failed = attribute_file(
            model, coder, arguments.prompts, out, options, arguments.batch, share, also=also
        )
        if arguments.json:
            write_index(out)
        if failed and not written:
            print(f"jclt: all of {failed} prompts failed; {out / 'failed.jsonl'} says why", file=sys.stderr)
            return 1
        print(f"done: {written} graphs in {out}, listed in graphs.jsonl; {failed} prompts failed")
        return 0
    graph = attribute(model, coder, arguments.prompt, **options._asdict())
    small = prune(graph)
    print(f"{summary(graph, small)}\n{MEANING}")
    if out is not None:
        name = write_graph(graph, small, out)
        print(f"written: {name}.npz, {name}.json and {name}.png in {out}")
    return 0


def train_lm(arguments: argparse.Namespace) -> None:
    from jclt.training.config import LmConfig
    from jclt.training.lm import train_lm
    from jclt.training.presets import LM_PRESETS

    config, out = _start_run(arguments, LmConfig, LM_PRESETS)
    train_lm(config, out)
    print(f"done: model in {out}/model, curve in {out}/loss.png")


def train(arguments: argparse.Namespace) -> None:
    from jclt.training.coder import train_coder
    from jclt.training.config import TrainConfig
    from jclt.training.presets import CODER_PRESETS

    config, out = _start_run(arguments, TrainConfig, CODER_PRESETS)
    train_coder(config, out, profile=arguments.profile)
    print(f"done: coder in {out}/coder, curves in {out}/curves.png")


def plan(arguments: argparse.Namespace) -> None:
    from jclt.config import load_settings, override
    from jclt.files import write_json
    from jclt.pods import load_pod, plan_run, plan_sweep
    from jclt.training.config import TrainConfig
    from jclt.training.presets import CODER_PRESETS

    config = override(load_settings(arguments.config, TrainConfig, CODER_PRESETS), arguments.set)
    pod = load_pod(arguments.config, arguments.topology, arguments.slices)
    _check_new_json(arguments.json)
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


def evaluate(arguments: argparse.Namespace) -> None:
    from jclt.coders import check_fit
    from jclt.files import write_json
    from jclt.training.evaluate import evaluate

    _check_new_json(arguments.json)
    no_check, arguments.no_check = arguments.no_check, True
    model, coder = _load(arguments)
    if not no_check:
        try:
            check_fit(coder, model, arguments.coder)
        except UserError as error:  # the figures will say how badly
            log.warning("%s", error)
    words, figures = evaluate(model, coder, arguments.data, arguments.rows, arguments.length, arguments.seed)
    print(words)
    if arguments.json:
        write_json(arguments.json, figures)


def _check_new_json(path: Path | None) -> None:
    """Before the work: the file can be written once there is something to write."""
    from jclt.files import check_writable

    if path is not None:
        if path.is_dir():
            raise UserError(f"{path}: is a folder, expected a file to write to")
        check_writable(path.parent)


def inspect(arguments: argparse.Namespace) -> None:
    from jclt.training.inspect import inspect_run

    print(inspect_run(arguments.run))


def tokenize(arguments: argparse.Namespace) -> None:
    from jclt.training.tokenize import tokenize

    made = tokenize(
        arguments.inputs,
        _find_tokenizer(arguments.tokenizer),
        arguments.out,
        workers=arguments.workers,
        shard_tokens=arguments.shard_tokens,
        end=arguments.end,
        field=arguments.field,
    )
    shards = f"{len(made['shards'])} shards in {arguments.out}"
    print(f"done: {made['tokens']} tokens of {made['documents']} documents, {shards}")


def _find_tokenizer(name: str) -> Path:
    """The folder of this name, or where the tokenizer's files of this hub name are kept."""
    from jclt.models import find_model

    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise UserError(f"tokenizer '{name}': is a file, expected the folder that holds it, or a hub name")
    try:
        return find_model(name, ("tokenizer*.json", "vocab.json", "merges.txt"))
    except UserError as error:
        reason = str(error).removeprefix(f"model '{name}': ")
        raise UserError(f"tokenizer '{name}': {reason}") from None


def convert(arguments: argparse.Namespace) -> None:
    from jclt.coders import load_coder, save_coder
    from jclt.files import check_new_folder
    from jclt.models import load_model

    model = load_model(arguments.model) if arguments.model else None
    sites = {"reads": arguments.reads, "writes": arguments.writes}
    check_new_folder(arguments.dest)
    coder = load_coder(arguments.source, model=model, dtype=arguments.dtype, check=not arguments.no_check, **sites)
    save_coder(coder, arguments.dest, arguments.to, arguments.dtype)
    config = coder.config
    print(
        f"done: {config.kind} of {len(config.covered)} layers with {config.features} {config.rule} features each, "
        f"{config.reads} to {config.writes}, in {arguments.dest}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("jclt").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.WARNING)
    status = _run(arguments)
    if status and _joined():
        # Else this process waits at the door for others, which wait for it in a collective.
        sys.stderr.flush()
        os._exit(status)
    return status


def _run(arguments: argparse.Namespace) -> int:
    """Runs the command; what the user can mend is said in one line."""
    try:
        _keep_compiled_programs()
        status = arguments.function(arguments) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read the output has had enough
        _drop_output()
        return 0
    except UserError as error:
        return _refused(str(error))
    except OSError as error:
        where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
        return _refused(f"{where or f'{arguments.command}: output or a file'}: {reason_of(error)}")
    except Interrupted as reason:
        print(f"jclt: {reason}", file=sys.stderr)
        return os.EX_TEMPFAIL  # whatever started it can tell that it is not done
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if _is_out_of_memory(error):
            less = f"; {LESS[arguments.command]}" if arguments.command in LESS else ""
            return _refused(f"{arguments.command}: memory has ended ({first_line(error)[:200]}){less}")
        if not _joined():
            raise
        import jax

        if not isinstance(error, jax.errors.JaxRuntimeError):  # that is what the end of another process makes of this
            traceback.print_exc()
        return _refused(
            f"process {jax.process_index()} of {jax.process_count()} cannot go on: {first_line(error)}. If another "
            "process has ended, its own message says why; started again together, they go on from the newest "
            "checkpoint",
            status=3,
        )


LESS = {
    "attribute": "fewer --max-features, a smaller --batch or a shorter prompt take less",
    "train-lm": "a smaller batch or model takes less, and --set remat=true",
    "train": "a smaller batch, more micro_batches or fewer coder.features take less, and --set remat=true",
    "eval": "fewer --rows or a shorter --length take less",
    "tokenize": "fewer --workers or --shard-tokens take less",
    "convert": "--dtype bfloat16 takes less",
    "plan": "compiling a smaller run, or on fewer chips, takes less",
}
"""What a command can be asked that takes less memory."""


def _refused(message: str, status: int = 2) -> int:
    print(f"jclt: {shortened(printable(message))}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
    return status


def _drop_output() -> None:
    """What is still to be written when the process ends goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _joined() -> bool:
    """Whether there are other hosts; of a command that ended before it loaded JAX there are none."""
    jax: Any = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _is_out_of_memory(error: Exception) -> bool:
    from jclt.memory import is_out_of_memory

    return is_out_of_memory(error)


def _keep_compiled_programs() -> None:
    """What was compiled once is read from a cache the next time."""
    import jax

    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(cache_folder()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


if __name__ == "__main__":
    sys.exit(main())
