"""`jclt serve`: the page that shows graphs."""

import argparse
from pathlib import Path

from jclt.cli.arguments import (
    Subcommands,
    add_fit_arguments,
    add_keep_argument,
    add_model_argument,
    load_coder_and_model,
)
from jclt.cli.label_arguments import add_labels_argument, find_label_texts
from jclt.cli.page import DESCRIBED, add_page_arguments, serve_graphs


def add_command(commands: Subcommands) -> None:
    command = commands.add_parser(
        "serve",
        help="see graphs in the browser, and work in them",
        description="Opens a page that shows graphs: .npz, .json of published viewers, .pt of circuit-tracer, and "
        "folders of them. Only this machine can reach it, and it asks nothing of any other. Pinned nodes, supernodes "
        "and labels are saved beside each graph as NAME.view.json. With --model or --coder the page can also intervene "
        "on the model and trace new prompts.",
        epilog="example: jclt serve demo --model demo; jclt serve sum.npz dallas.json",
    )
    command.add_argument("graphs", nargs="*", type=Path, metavar="GRAPH", help="a graph's file, or a folder of graphs")
    command.add_argument(
        "--features",
        type=Path,
        metavar="DIR",
        help="a folder with labels and examples of features (default: what `jclt demo --open` wrote beside its graphs)",
    )
    add_model_argument(command)
    command.add_argument("--coder", help="demo, a folder in any known layout, or neurons: those of the model")
    add_fit_arguments(command)
    add_keep_argument(command)
    add_labels_argument(command)
    add_page_arguments(command)
    command.set_defaults(function=run)


def run(arguments: argparse.Namespace) -> None:
    has_model = arguments.model is not None or arguments.coder is not None
    load = (lambda: load_coder_and_model(arguments)) if has_model else None
    serve_graphs(
        arguments.graphs,
        arguments,
        load=load,
        find_labels=lambda coder: find_label_texts(arguments, coder),
        features=arguments.features or find_described(arguments.graphs),
    )


def find_described(places: list[Path]) -> Path | None:
    """The features that the demo described beside its graphs, complete ones."""
    from jclt.viewer.feature_panels import has_columns

    return next((place / DESCRIBED for place in places if has_columns(place / DESCRIBED)), None)
