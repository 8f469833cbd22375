"""`jclt intervene`: what happens to the model when features or other values are changed."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jclt.cli.arguments import (
    Subcommands,
    add_fit_arguments,
    add_model_argument,
    add_prompt_arguments,
    check_new_file,
    find_prompt,
    load_coder_and_model,
    make_int_parser,
    parse_text,
)
from jclt.cli.label_arguments import add_labels_argument, find_label_texts
from jclt.errors import UserError

if TYPE_CHECKING:
    from jclt.graphs import Graph
    from jclt.models import SiteEdit

Change = tuple[str, int, "int | slice", int | None, float]
"""Site, layer, position, index and number; without an index, all of the site's value."""


def add_command(commands: Subcommands) -> None:
    command = commands.add_parser(
        "intervene",
        help="change features or other values and see what the model does",
        description="Runs the model on a prompt with and without changes, and prints how the next token and the "
        "features change, compared with what the attribution graph predicts. A place is LAYER/POSITION/FEATURE. At "
        "another site of the layers it is SITE/LAYER/POSITION, or SITE/LAYER/POSITION/INDEX for a part of the value: "
        "errors/2/5, mlp_out/2/5, mlp_neurons/2/5/17 (a neuron), head_out/2/5/3 (a head). A position is one number, "
        "counted from 0, a range 3-5 with both ends, or 3- for all from there on. Changes of one place are applied in "
        "the order given. With --generate the text goes on under the same changes, with the model's own MLPs, "
        "attention and norms reacting.",
        epilog="example: jclt intervene 'calc: 36+59=' --scale 0/5/192=-1; jclt intervene 'calc: 36+59=' --set "
        "0/2-/5=4 --layers 0-2 --out sum.png; jclt intervene 'Once upon a' --coder runs/mine/coder --add 2/3-/7=5 "
        "--generate 20",
    )
    add_prompt_arguments(command)
    for name, what in (
        ("set", "set an activation to a number"),
        ("scale", "multiply an activation: 0 takes it away, -1 changes its sign"),
        ("add", "add a number to an activation"),
    ):
        command.add_argument(
            f"--{name}", action="append", dest="changes", type=make_parser(name), metavar="PLACE=NUMBER", help=what
        )
    command.add_argument(
        "--supernode",
        action="append",
        dest="changes",
        type=parse_supernode,
        metavar="NAME=FACTOR",
        help="multiply every member of a supernode of --graph",
    )
    add_model_argument(command)
    command.add_argument(
        "--coder",
        help="demo, a folder in any known layout, or neurons: those of the model (default demo, for model demo)",
    )
    add_fit_arguments(command)
    add_setting_arguments(command)
    add_labels_argument(command)
    command.add_argument("--graph", type=Path, metavar="FILE", help="the prompt's graph (default: it is computed)")
    command.add_argument("--no-predict", action="store_true", help="compute no graph and no prediction")
    command.add_argument(
        "--generate", type=make_int_parser(1), metavar="N", help="also continue the prompt by N tokens, greedily"
    )
    command.add_argument("--out", type=Path, metavar="FILE", help="also draw the result as a PNG file")
    command.set_defaults(function=run)


def add_setting_arguments(command: argparse.ArgumentParser) -> None:
    """How the model reacts."""
    command.add_argument(
        "--layers",
        type=parse_layers,
        metavar="FIRST-LAST",
        help="constrained patching: MLPs of these layers write what they wrote, plus the changes (default: all react)",
    )
    command.add_argument(
        "--attention", default="frozen", choices=("frozen", "free"), help="attention patterns (default frozen)"
    )
    command.add_argument(
        "--norms", default="frozen", choices=("frozen", "free"), help="denominators of norms (default frozen)"
    )
    command.add_argument(
        "--reference",
        default="original",
        choices=("original", "current"),
        help="without --layers: original (default) lets the coder's features stand in for the MLPs; current lets the "
        "model's own MLPs react",
    )
    command.add_argument(
        "--errors", default="kept", choices=("kept", "dropped"), help="what the coder leaves out (default kept)"
    )


def make_parser(kind: str) -> Callable[[str], tuple[str, Change]]:
    """A parser of [SITE/]LAYER/POSITION/INDEX=NUMBER, which adds the kind of change."""

    def parse(typed: str) -> tuple[str, Change]:
        place, _, number = parse_text(typed).rpartition("=")
        parts = place.split("/")
        try:
            site = "features" if parts[0].isdigit() else parts.pop(0)
            layer, position, *index = parts
            if len(index) > 1 or (site == "features" and not index):
                raise ValueError
            first, dash, last = position.partition("-")
            where: int | slice = int(first)
            if dash:
                where = slice(int(first), int(last) + 1 if last else None)
                if last and int(last) < int(first):
                    raise ValueError
            return kind, (site, int(layer), where, int(index[0]) if index else None, float(number))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{typed[:60]!r}, expected LAYER/POSITION/FEATURE=NUMBER, such as 3/10/17=0, or "
                "SITE/LAYER/POSITION=NUMBER"
            ) from None

    return parse


def parse_supernode(typed: str) -> tuple[str, tuple[str, float]]:
    name, _, factor = parse_text(typed).rpartition("=")
    try:
        return "supernode", (name, float(factor))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{typed[:60]!r}, expected NAME=FACTOR, such as state=-1") from None


def parse_layers(typed: str) -> tuple[int, int]:
    first, _, last = typed.partition("-")
    try:
        layers = int(first), int(last or first)
    except ValueError:
        layers = 1, 0
    if layers[0] > layers[1]:
        raise argparse.ArgumentTypeError(f"{typed[:40]!r}, expected FIRST-LAST, such as 3-6")
    return layers


def make_edits(changes: "list[tuple[str, Any]]", graph: "Graph | None") -> "list[SiteEdit]":
    """The edits, in the order given."""
    from jclt.interventions import scale_nodes
    from jclt.models import Add, Scale, Set
    from jclt.models.site_edits import Where

    kinds = {"set": Set, "scale": Scale, "add": Add}
    edits: list[SiteEdit] = []
    for kind, change in changes:
        if kind == "supernode":
            assert graph is not None
            edits += scale_nodes(graph, *change)
            continue
        site, layer, position, index, number = change
        where: Where = {"site": site, "layer": layer, "position": position}
        if index is not None:
            where["head" if site in ("head_out", "queries", "keys", "values") else "index"] = index
        edits.append(kinds[kind](number, **where))
    return edits


def run(arguments: argparse.Namespace) -> None:
    from jclt.graphs import load_graph
    from jclt.interventions import intervene, measure_shares, steer
    from jclt.viewer.intervention_picture import draw_intervention

    prompt, changes = find_prompt(arguments), arguments.changes or []
    if prompt is None:
        raise UserError("intervene: expected a prompt or --chat TEXT")
    if not changes:
        raise UserError("intervene: nothing to change, expected --set, --scale, --add or --supernode")
    if arguments.graph is None and any(kind == "supernode" for kind, _ in changes):
        raise UserError("intervene: --supernode needs --graph FILE, the graph that has it")
    check_new_file(arguments.out)
    graph = None if arguments.graph is None else load_graph(arguments.graph)
    edits = make_edits(changes, graph)
    if arguments.generate and any(edit.site == "errors" for edit in edits):
        raise UserError("intervene: --generate with changes of errors, which the model's own MLPs do not have")
    model, coder = load_coder_and_model(arguments)
    labels = find_label_texts(arguments, coder)
    result = intervene(
        model,
        coder,
        prompt,
        edits,
        layers=arguments.layers,
        attention=arguments.attention,
        norms=arguments.norms,
        reference=arguments.reference,
        errors=arguments.errors,
        graph=graph,
        predict=not arguments.no_predict,
    )
    # Labels that are asked for come before those of the graph, and these before what lies beside the coder.
    labels = {**labels, **result.labels} if arguments.labels is None else {**result.labels, **labels}
    result = replace(result, labels=labels)
    print(result.summarize())
    shares = {} if graph is None else measure_shares(graph, result)
    for name, share in shares.items():
        print(f"supernode {name!r}: {share:.0%} of its original activation")
    if arguments.out is not None:
        draw_intervention(result, arguments.out, shares)
        print(f"written: {arguments.out}")
    if arguments.generate:
        steered = steer(model, coder, prompt, edits, arguments.generate)
        print("text, with the model's own MLPs, attention and norms reacting:")
        print(f"  without changes: {steered.original_text!r}\n  with them:       {steered.text!r}")
