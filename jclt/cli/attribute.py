"""`jclt attribute`: attribution graphs of one prompt, or of every line of a file."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jclt.cli.arguments import (
    Subcommands,
    add_fit_arguments,
    add_keep_argument,
    add_model_argument,
    add_prompt_arguments,
    find_prompt,
    load_coder_and_model,
    make_int_parser,
    parse_cuts,
    parse_nodes,
    parse_target,
)
from jclt.cli.label_arguments import add_labels_argument, find_described_features, find_label_texts
from jclt.cli.page import add_page_arguments, serve_graphs
from jclt.errors import UserError

if TYPE_CHECKING:
    from jclt.attribution import Options
    from jclt.graphs import Graph
    from jclt.models.chat import Messages


def add_command(commands: Subcommands) -> None:
    command = commands.add_parser(
        "attribute",
        help="compute attribution graphs",
        description="Computes the attribution graph of a prompt and prints what it explains and its strongest paths. "
        "With --out it also writes NAME.npz, NAME.json for viewers and NAME.png, where NAME is made from the prompt. A "
        "new graph of the same prompt with the same settings replaces the older one; other graphs get other names "
        "(NAME-2 ...). graph-metadata.json lists the folder's graphs for viewers. With --prompts it computes a graph "
        "for every line of a file, many at a time; the same command continues where it stopped. The exit status is 1 "
        "if every prompt failed.",
        epilog="example: jclt attribute 'calc: 36+59=' --out sum; jclt attribute 'calc: 36+59=' --target 95~94; jclt "
        "attribute 'Once upon a' --coder runs/mine/coder --no-check; jclt attribute --prompts prompts.txt --out graphs "
        "--json",
    )
    add_prompt_arguments(command)
    command.add_argument(
        "--prompts", type=Path, metavar="FILE", help="one prompt per line, or JSON lines with `prompt`"
    )
    command.add_argument("--out", type=Path, metavar="DIR", help="the folder to write to; required with --prompts")
    command.add_argument(
        "--json", action="store_true", help="with --prompts: also write each pruned graph as NUMBER.json for viewers"
    )
    add_model_argument(command)
    command.add_argument(
        "--coder",
        help="demo, a folder in any known layout, or neurons: those of the model (default demo, for model demo)",
    )
    add_fit_arguments(command)
    add_keep_argument(command)
    command.add_argument(
        "--target",
        action="append",
        type=parse_target,
        metavar="TOKEN",
        help="a token to explain, such as ' Denver', or the difference of two tokens' logits, such as "
        "' Denver~ Austin'; can be repeated (default: the likeliest next tokens)",
    )
    add_trace_arguments(command)
    add_labels_argument(command)
    command.add_argument(
        "--features",
        type=Path,
        metavar="FOLDER",
        help="what `jclt features` wrote about the coder: viewers then show the examples of each feature (default: the "
        "folder features beside the coder's files, if there)",
    )
    command.add_argument(
        "--supernodes",
        action="store_true",
        help="also group features that are fed alike and do alike, for viewers too; of one prompt, also set each group "
        "to zero and see what it does",
    )
    command.add_argument("--open", action="store_true", help="show the graph on a page, where it can be worked in")
    add_page_arguments(command)
    command.set_defaults(function=run)


def add_trace_arguments(command: argparse.ArgumentParser) -> None:
    """The arguments that say how much of a graph is computed, and how."""
    command.add_argument(
        "--max-features", type=int, default=7500, metavar="N", help="trace at most N features (default 7500)"
    )
    command.add_argument(
        "--nodes",
        type=parse_nodes,
        metavar="N",
        help="take the N features with the most influence to first order as nodes, or with 0.9 as many as have 90%% of "
        "it; the others are errors (default: all active features, 2000 of neurons)",
    )
    command.add_argument(
        "--heads",
        type=make_int_parser(1),
        nargs="?",
        const=True,
        metavar="N",
        help="make the N attention heads with the highest values nodes, each at one position; without N up to 2000 "
        "(default: none)",
    )
    command.add_argument(
        "--cuts",
        type=parse_cuts,
        default=(),
        metavar="LAYERS",
        help="make the residual stream that enters these layers nodes, such as 6,12 (default: none)",
    )
    command.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="M",
        help="stop tracing when the error of every influence is at most M (default 0: trace up to --max-features)",
    )
    command.add_argument(
        "--conventions",
        default="jclt",
        metavar="WHOSE",
        help="jclt (default), or circuit-tracer to get the graphs of that tool",
    )
    command.add_argument(
        "--precision",
        default="float32",
        metavar="NAME",
        help="of the products that edges are summed up from: float32 (default), tf32_3x, tf32, bfloat16_3x or bfloat16",
    )
    command.add_argument(
        "--batch", type=make_int_parser(1), default=8, metavar="N", help="prompts per batch (default 8)"
    )


def run(arguments: argparse.Namespace) -> int:
    from jclt.attribution import Options
    from jclt.files import check_file, check_writable
    from jclt.hosts import find_process_and_count

    prompt = find_prompt(arguments)
    if (prompt is None) == (arguments.prompts is None):
        raise UserError("attribute: expected a prompt, --chat TEXT or --prompts FILE")
    if arguments.prompts is not None and arguments.out is None:
        raise UserError("attribute: --prompts needs --out DIR, the folder for the graphs")
    if arguments.open and (arguments.out is None or arguments.prompts is not None):
        raise UserError("attribute: --open shows one graph, expected a prompt and --out DIR, the folder for it")
    check_shown(arguments)
    options = Options(
        targets=arguments.target,
        max_features=arguments.max_features,
        tolerance=arguments.tolerance,
        conventions=arguments.conventions,
        nodes=arguments.nodes,
        precision=arguments.precision,
        heads=arguments.heads,
        cuts=arguments.cuts,
    )
    options.check()
    if arguments.prompts is not None:
        check_file(arguments.prompts, "a file with a prompt on each line")
    if arguments.out is not None:
        check_writable(arguments.out)
    share = find_process_and_count() if arguments.prompts is not None else (0, 1)
    return explain_file(arguments, options, share) if prompt is None else explain_prompt(arguments, options, prompt)


def check_shown(arguments: argparse.Namespace) -> None:
    """An error if something is asked for that would be shown nowhere."""
    if arguments.prompts is not None and not arguments.json:
        for name in ("labels", "features", "supernodes"):
            if getattr(arguments, name):
                raise UserError(f"attribute: --{name} with --prompts is for viewers' files, expected --json too")
    if arguments.json and arguments.prompts is None:
        raise UserError("attribute: --json goes with --prompts; of one prompt --out DIR writes the viewers' file, too")
    if arguments.features is not None and arguments.out is None:
        raise UserError("attribute: --features is for viewers' files, expected --out DIR too")
    if arguments.supernodes and arguments.prompts is None:
        check_kept(arguments.keep)


def check_kept(kept: str | None) -> None:
    if kept in ("host", "disk"):
        raise UserError(f"attribute: --supernodes sets groups to zero, expected --keep device, not {kept}")


def explain_prompt(arguments: argparse.Namespace, options: "Options", prompt: "str | Messages") -> int:
    from jclt.attribution import attribute
    from jclt.coders import StreamedCoder
    from jclt.graphs import add_supernodes, label_nodes, suggest_supernodes
    from jclt.interventions import measure_supernodes
    from jclt.viewer import SCORES_EXPLAINED, summarize_graph, write_graph

    model, coder = load_coder_and_model(arguments)
    if arguments.supernodes and isinstance(coder, StreamedCoder):
        check_kept(coder.kept)
    features = find_described_features(arguments, coder) if arguments.out is not None else None
    labels = find_label_texts(arguments, coder)
    graph = label_nodes(attribute(model, coder, prompt, **options._asdict()), labels)
    pruned = graph.prune()
    print(f"{summarize_graph(graph, pruned)}\n{SCORES_EXPLAINED}")
    suggested = suggest_supernodes(pruned) if arguments.supernodes else []
    if suggested:
        graph, pruned = add_supernodes(graph, suggested), add_supernodes(pruned, suggested)
    name = None
    if arguments.out is not None:
        name = write_graph(graph, pruned, arguments.out, features=features)
        print(f"written: {name}.npz, {name}.json and {name}.png in {arguments.out}")
    if arguments.supernodes:
        print(f"supernodes: {len(suggested)} groups of features that are fed alike and do alike")
        for effect in measure_supernodes(model, coder, graph.tokens, graph, suggested):
            print(f"  {effect}")
    if arguments.open and arguments.out is not None:
        folder, loaded = arguments.out, (model, coder)
        described = None if features is None else features.folder
        serve_graphs(
            [folder],
            arguments,
            load=lambda: loaded,
            find_labels=lambda _: labels,
            features=described,
            first=name,
        )
    return 0


def explain_file(arguments: argparse.Namespace, options: "Options", share: tuple[int, int]) -> int:
    from jclt.attribution import attribute_file
    from jclt.graphs import label_nodes, write_index
    from jclt.viewer import write_viewer_json

    out: Path = arguments.out
    model, coder = load_coder_and_model(arguments)
    features, labels = find_described_features(arguments, coder), find_label_texts(arguments, coder)

    def write_json(graph: "Graph", name: str) -> None:
        write_viewer_json(label_nodes(graph, labels), out, name, features, arguments.supernodes)

    visit = write_json if arguments.json else None
    written, failed = attribute_file(model, coder, arguments.prompts, out, options, arguments.batch, share, visit=visit)
    if arguments.json:
        write_index(out)
    if failed and not written:
        print(f"jclt: all of {failed} prompts failed; {out / 'failed.jsonl'} says why", file=sys.stderr)
        return 1
    print(f"done: {written} graphs in {out}, listed in graphs.jsonl; {failed} prompts failed")
    return 0
