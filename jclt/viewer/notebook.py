"""Shows a graph in a notebook's cell: as its page, as a picture, or in a few lines."""

import html
import io
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from jclt.errors import UserError
from jclt.files import create_file
from jclt.graphs import describe, strongest_paths
from jclt.graphs.export_json import slug_of
from jclt.graphs.graph import Graph
from jclt.viewer.page_files import build_single_page
from jclt.viewer.picture import build_figure
from jclt.viewer.picture_files import find_picture_type, save_figure
from jclt.viewer.text import PATHS, describe_outputs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from jclt.coders import Coder
    from jclt.models import Model
    from jclt.viewer.widget import GraphWidget

NOTEBOOK_DOTS_PER_INCH = 100
INSTALL = "pip install 'jclt[notebook]'"


class NotebookPage:
    """The page of a graph as an element that notebooks display: a frame that can reach nothing outside itself."""

    def __init__(self, page: str, height: int):
        self.page, self.height = page, height

    def __repr__(self) -> str:
        return "<page of a graph; notebooks show it>"

    def _repr_html_(self) -> str:
        style = f"width:100%;height:{self.height}px;border:1px solid #8888"
        frame = 'sandbox="allow-scripts allow-downloads" title="Graph"'
        return (
            f'<iframe srcdoc="{html.escape(self.page)}" {frame} style="{style}"></iframe>'
            f"<div>What is done here does not come back to Python; with <code>{INSTALL}</code> it does.</div>"
        )


class NotebookPicture:
    """A picture that notebooks display."""

    def __init__(self, figure: "Figure"):
        self.figure = figure

    def __repr__(self) -> str:
        return "<picture of a graph; notebooks show it, and save(FILE) writes it>"

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        save_figure(self.figure, content, "png", NOTEBOOK_DOTS_PER_INCH)
        return content.getvalue()

    def save(self, path: str | Path) -> None:
        """The ending of the file's name is the file type."""
        kind = find_picture_type(Path(path))
        with create_file(Path(path)) as partial:
            save_figure(self.figure, partial, kind)


def show_graph(
    graph: Graph,
    *,
    model: "Model | None" = None,
    coder: "Coder | None" = None,
    features: str | Path | None = None,
    height: int = 760,
) -> "GraphWidget | NotebookPage":
    """The graph's page, to be shown as the last value of a notebook's cell."""
    if (model is None) != (coder is None):
        raise UserError("show: a model or a coder alone, expected both or neither")
    if find_spec("anywidget"):
        from jclt.viewer.widget import GraphWidget

        folder = None if features is None else Path(features)
        load = None if model is None or coder is None else lambda: (model, coder)
        return GraphWidget(graph, load_model=load, features=folder, height=height)
    if model is not None or features is not None:
        raise UserError(f"show: with a model or features it needs anywidget, expected `{INSTALL}`")
    return NotebookPage(build_single_page(graph, slug_of(graph)), height)


def plot_graph(graph: Graph, *, title: str | None = None) -> NotebookPicture:
    """The graph's picture, to be shown as the last value of a notebook's cell."""
    return NotebookPicture(build_figure(graph, "".join(graph.token_texts) if title is None else title))


def describe_in_notebook(graph: Graph) -> str:
    """What a notebook shows of a graph by itself: outputs, scores and the strongest paths."""
    scores = graph.scores
    lines = [
        repr(graph),
        f"explains {describe_outputs(graph)}; completeness {scores.completeness:.2f}, replacement "
        f"{scores.replacement:.2f}",
        *(f"  {describe(graph, path)}" for path in strongest_paths(graph, PATHS)),
        "graph.show() is its page, graph.plot() its picture, graph.prune() the part with most of the influence",
    ]
    return f"<pre>{html.escape(chr(10).join(lines))}</pre>"
