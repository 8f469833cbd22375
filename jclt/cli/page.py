"""What the commands share that open the page."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jclt.cli.arguments import make_int_parser

DESCRIBED = "described"
"""The folder beside the demo's graphs with what the features of its coder are."""


def add_page_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--port", type=make_int_parser(0), default=0, metavar="N", help="port of the page (default 0: any free one)"
    )
    command.add_argument("--no-browser", action="store_true", help="print the page's address, but open no browser")


def serve_graphs(
    places: Sequence[Path],
    arguments: argparse.Namespace,
    *,
    load: Callable[[], Any] | None,
    find_labels: Callable[[Any], Any] | None = None,
    features: Path | None = None,
    first: str | None = None,
    has_tour: bool = False,
) -> None:
    """Serves graphs until Ctrl-C; `load` gives the model and the coder that the page may run, and `find_labels` the
    labels of this coder."""
    from jclt.viewer.library import Library
    from jclt.viewer.page_service import Page
    from jclt.viewer.server import serve_page

    page = Page(Library(places), load_model=load, features=features, find_labels=find_labels, has_tour=has_tour)
    serve_page(page, port=arguments.port, first=first, open_browser=not arguments.no_browser)
