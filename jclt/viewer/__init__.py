"""Attribution graphs for people: pictures and text, without any viewer."""

from jclt.viewer.picture import draw_graph
from jclt.viewer.text import MEANING, free_name, summary, write_graph, write_viewer_json

__all__ = ["MEANING", "draw_graph", "free_name", "summary", "write_graph", "write_viewer_json"]
