"""Shows a graph's page in a notebook's cell."""

import html

from jclt.graphs.export_json import slug_of
from jclt.graphs.graph import Graph
from jclt.viewer.page_files import build_single_page


class NotebookPage:
    """The page of a graph as an element that notebooks display: a frame that can reach nothing outside itself."""

    def __init__(self, page: str, height: int):
        self.page, self.height = page, height

    def _repr_html_(self) -> str:
        style = f"width:100%;height:{self.height}px;border:1px solid #8888"
        frame = 'sandbox="allow-scripts allow-downloads" title="Graph"'
        return f'<iframe srcdoc="{html.escape(self.page)}" {frame} style="{style}"></iframe>'


def show_graph(graph: Graph, *, height: int = 760) -> NotebookPage:
    """The graph's page, to be shown as the last value of a notebook's cell."""
    return NotebookPage(build_single_page(graph, slug_of(graph)), height)
