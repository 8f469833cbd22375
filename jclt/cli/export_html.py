"""`jclt export-html`: a graph's page as one file."""

import argparse
from pathlib import Path

from jclt.cli.arguments import Subcommands
from jclt.errors import UserError


def add_command(commands: Subcommands) -> None:
    command = commands.add_parser(
        "export-html",
        help="write a graph's page as one file, to send or to publish",
        description="Writes the page of `jclt serve` with one graph in it, as a file that needs no server and no "
        "network: to look at, to prune, to make supernodes, without interventions. What was pinned, grouped and "
        "labelled on the page is in it.",
        epilog="example: jclt export-html demo/two_hop.npz --out two_hop.html",
    )
    command.add_argument("graph", type=Path, metavar="GRAPH", help="the graph's file")
    command.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the file to write, such as graph.html"
    )
    command.add_argument("--features", type=Path, metavar="DIR", help="a folder with labels of features")
    command.set_defaults(function=run)


def run(arguments: argparse.Namespace) -> None:
    from jclt.cli.arguments import check_new_file
    from jclt.viewer import export_html
    from jclt.viewer.feature_panels import coder_of, read_labels
    from jclt.viewer.library import Library

    check_new_file(arguments.out)
    library = Library([arguments.graph])
    if len(library.paths) != 1:
        raise UserError(f"{arguments.graph}: {len(library.paths)} graphs, expected the file of one")
    (name,) = library.paths
    graph = library.read(name)
    labels = read_labels(arguments.features, coder_of(graph))
    export_html(graph, arguments.out, labels=labels, view=library.read_view(name))
    print(f"written: {arguments.out}")
