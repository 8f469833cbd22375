"""Attribution graphs for people: the JSON that published graph viewers read, pictures and text without any viewer."""

from jclt.viewer.demo import demo
from jclt.viewer.graph_json import export_json, import_json, slug_of, write_index
from jclt.viewer.picture import draw_graph
from jclt.viewer.report import MEANING, free_name, summary, write_graph, write_viewer_json

__all__ = [
    "MEANING",
    "demo",
    "draw_graph",
    "export_json",
    "free_name",
    "import_json",
    "slug_of",
    "summary",
    "write_graph",
    "write_index",
    "write_viewer_json",
]
