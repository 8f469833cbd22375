"""The `jclt` command: each subcommand parses, calls one function of a room, prints."""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import jax

from jclt import __version__
from jclt.config import cache_folder
from jclt.errors import Interrupted, UserError

Config = TypeVar("Config")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="jclt", description="Circuit tracing of language models in JAX.")
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
    command.add_argument("--seed", type=int, default=0, help="draws other prompts (default 0)")
    command.set_defaults(function=demo)

    command = commands.add_parser(
        "attribute",
        help="compute attribution graphs",
        description="Computes the attribution graph of a prompt, prints what it explains and its strongest paths, and "
        "with --out writes it as graph.npz, graph.json for viewers and graph.png. With --prompts it computes a graph "
        "for every line of a file, many at once; the same command goes on where it stopped.",
        epilog="example: jclt attribute 'calc: 36+59=' --out sum; jclt attribute --prompts prompts.txt --out graphs",
    )
    command.add_argument("prompt", nargs="?", metavar="PROMPT", help="text")
    command.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt a line, or JSON lines with `prompt`")
    command.add_argument("--out", type=Path, metavar="DIR", help="the folder to write to; needed with --prompts")
    command.add_argument("--model", default="demo", help="demo (default), a folder or a hub name")
    command.add_argument("--coder", default="demo", help="demo (default), or a folder in any layout that is read")
    command.add_argument(
        "--target",
        action="append",
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
    command.add_argument("--batch", type=int, default=8, metavar="N", help="prompts at once (default 8)")
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
        "--profile", type=int, default=0, metavar="STEPS", help="traces so many steps for XProf, into OUT/profile"
    )
    command.set_defaults(function=train)

    command = commands.add_parser(
        "eval",
        help="measure a coder",
        description="Measures a coder on data it was not trained on: reconstruction, sparsity and dead features by "
        "layer; the replacement model, in which every MLP is replaced at every position, beside the model and beside "
        "one whose MLPs say only their mean; on the small world also how often the answers to each task stay.",
        epilog="example: jclt eval runs/tiny/coder",
    )
    command.add_argument("coder", metavar="CODER", help="demo, or a folder in any layout that load_coder reads")
    command.add_argument("--model", default="demo", help="the model it was trained on (default demo)")
    command.add_argument("--data", default="world", help="world (default), a folder of tokens, or a text file")
    command.add_argument("--rows", type=int, default=128, help="token rows to measure on (default 128)")
    command.add_argument("--length", type=int, default=64, help="tokens a row (default 64)")
    command.add_argument("--seed", type=int, default=1, help="draws other rows (default 1; training takes 0)")
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
        epilog="example: jclt tokenize 'stories/*.jsonl.gz' more.parquet --tokenizer runs/world/model --out tokens; "
        "then: jclt train-lm config.py --set data=tokens",
    )
    command.add_argument("inputs", nargs="+", metavar="INPUT", help="a file, a folder, a glob, or a URL such as gs://")
    command.add_argument("--tokenizer", type=Path, required=True, metavar="FOLDER", help="holds tokenizer.json")
    command.add_argument("--out", required=True, metavar="DIR", help="the folder or URL to write to")
    command.add_argument("--field", default="text", metavar="NAME", help="of JSON lines and Parquet (default text)")
    command.add_argument(
        "--end",
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
        "second, chip-hours, and what to change where it does not fit. An estimate, not a measurement. The program "
        "that attribution graphs are made with is compiled too, for prompts of --prompt-length tokens. The sparse path "
        "is planned beside the dense one, for --active features.",
        epilog="example: jclt plan tpu_configs/gpt2_small_300k_v5e_8.py; jclt plan my_run.py --topology v5p:4x4x4",
    )
    command.add_argument("config", metavar="CONFIG", help="a preset or a .py file that defines `config` and `pod`")
    command.add_argument(
        "--topology", metavar="NAME", help="such as v5e:16x16, v5p:4x4x8, v6e:8x8 (default: the file's)"
    )
    command.add_argument("--slices", type=int, metavar="N", help="that many of them, joined by a network")
    command.add_argument("--sweep", action="store_true", help="other meshes, micro-batches and rematerialisation too")
    command.add_argument(
        "--prompt-length", type=int, default=64, metavar="T", help="of the attribution program (default 64; 0: none)"
    )
    command.add_argument(
        "--active",
        type=float,
        default=100.0,
        metavar="K",
        help="features active at a token, of all layers, for which the sparse path is planned (default 100; 0: not)",
    )
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="as in `jclt train`")
    command.add_argument("--json", type=Path, help="also write the figures to this file")
    command.set_defaults(function=plan)

    command = commands.add_parser(
        "convert",
        help="write a sparse coder in another layout",
        description="Reads a coder in any layout and writes it in another. jclt keeps all of a coder, and "
        "circuit-tracer loads its folders too; the other layouts hold what their own tools read, and what one of them "
        "cannot say is refused in one line. With --model, the coder is first seen to fit that model.",
        epilog="example: jclt convert gemma-scope-2b-pt-transcoders/layer_12/width_16k/average_l0_6 layer_12 --to jclt",
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
    command.add_argument("--reads", metavar="SITE", help="where it reads, if its files do not say (such as mlp_in)")
    command.add_argument("--writes", metavar="SITE", help="where it writes, likewise (such as mlp_out)")
    command.set_defaults(function=convert)
    return top


def _add_run(command: argparse.ArgumentParser, presets: str, settings: str) -> None:
    """The arguments of everything that trains."""
    command.add_argument("config", metavar="CONFIG", help=f"a preset ({presets}) or a .py file that defines `config`")
    command.add_argument("--out", help="the run's folder, or a URL such as gs://bucket/run (default runs/NAME)")
    command.add_argument(
        "--set",
        action="append",
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
    return config, arguments.out or f"runs/{Path(arguments.config).stem}"


def demo(arguments: argparse.Namespace) -> None:
    from jclt.viewer.demo import demo

    print(demo(arguments.out, arguments.seed))


def attribute(arguments: argparse.Namespace) -> None:
    from jclt.attribution import Options, attribute, attribute_file, prune
    from jclt.coders import load_coder
    from jclt.models import load_model
    from jclt.sharding import own_share
    from jclt.viewer import summary, write_graph

    if (arguments.prompt is None) == (arguments.prompts is None):
        raise UserError("attribute: expected either a prompt or --prompts FILE")
    if arguments.prompts is not None and arguments.out is None:
        raise UserError("attribute: --prompts needs --out DIR, the folder for the graphs")
    targets = [tuple(t.split("~")) if "~" in t else t for t in arguments.target] if arguments.target else None
    options = Options(targets, arguments.max_features, arguments.tolerance, arguments.conventions)
    options.check()
    share = own_share() if arguments.prompts is not None else (0, 1)
    model = load_model(arguments.model)
    coder = load_coder(arguments.coder, model=model)
    if arguments.prompts is not None:
        written, failed = attribute_file(
            model, coder, arguments.prompts, arguments.out, options, arguments.batch, share
        )
        print(f"done: {written} graphs in {arguments.out}, listed in graphs.jsonl; {failed} prompts failed")
        return
    graph = attribute(model, coder, arguments.prompt, **options._asdict())
    small = prune(graph)
    print(summary(graph, small))
    if arguments.out:
        write_graph(graph, small, arguments.out, "graph")
        print(f"written: graph.npz, graph.json and graph.png in {arguments.out}")


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
    if arguments.sweep:
        text, variants = plan_sweep(config, pod)
        figures = {"variants": variants}
    else:
        text, figures = plan_run(config, pod, arguments.prompt_length, arguments.active)
    print(text)
    if arguments.json:
        write_json(arguments.json, figures)


def evaluate(arguments: argparse.Namespace) -> None:
    from jclt.coders import load_coder
    from jclt.files import write_json
    from jclt.models import load_model
    from jclt.training.evaluate import evaluate

    model = load_model(arguments.model)
    coder = load_coder(arguments.coder, model=model, check=False)
    text, figures = evaluate(model, coder, arguments.data, arguments.rows, arguments.length, arguments.seed)
    print(text)
    if arguments.json:
        write_json(arguments.json, figures)


def inspect(arguments: argparse.Namespace) -> None:
    from jclt.training.inspect import inspect_run

    print(inspect_run(arguments.run))


def tokenize(arguments: argparse.Namespace) -> None:
    from jclt.training.tokenize import tokenize

    made = tokenize(
        arguments.inputs,
        arguments.tokenizer,
        arguments.out,
        workers=arguments.workers,
        shard_tokens=arguments.shard_tokens,
        end=arguments.end,
        field=arguments.field,
    )
    shards = f"{len(made['shards'])} shards in {arguments.out}"
    print(f"done: {made['tokens']} tokens of {made['documents']} documents, {shards}")


def convert(arguments: argparse.Namespace) -> None:
    from jclt.coders import load_coder, save_coder
    from jclt.models import load_model

    model = load_model(arguments.model) if arguments.model else None
    sites = {"reads": arguments.reads, "writes": arguments.writes}
    coder = load_coder(arguments.source, model=model, dtype=arguments.dtype, **sites)
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
    _keep_compiled_programs()
    status = _run(arguments)
    if status and jax.distributed.is_initialized():
        # Else this process waits at the door for others, which wait for it in a collective.
        sys.stderr.flush()
        os._exit(status)
    return status


def _run(arguments: argparse.Namespace) -> int:
    """Runs the command; what the user can mend is said in one line."""
    try:
        arguments.function(arguments)
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UserError as error:
        print(f"jclt: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"jclt: {error.filename or 'file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except Interrupted as reason:
        print(f"jclt: {reason}", file=sys.stderr)
        return os.EX_TEMPFAIL  # whatever started it can tell that it is not done
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        which = f"process {jax.process_index()} of {jax.process_count()}"
        print(
            f"jclt: {which} cannot go on: {str(error).splitlines()[0]}. If another process has ended, its own message "
            "says why; started again together, they go on from the newest checkpoint",
            file=sys.stderr,
        )
        return 3
    return 0


def _keep_compiled_programs() -> None:
    """What was compiled once is read from a cache the next time."""
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(cache_folder()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


if __name__ == "__main__":
    sys.exit(main())
