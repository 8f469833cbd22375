"""Shows attribution graphs as text and pictures, and writes their files."""

from jclt.viewer.heat_map import draw_patching, write_heat_map
from jclt.viewer.notebook import describe_in_notebook, plot_graph, show_graph
from jclt.viewer.page_files import export_html
from jclt.viewer.picture import draw_graph
from jclt.viewer.text import SCORES_EXPLAINED, find_free_name, summarize_graph, write_graph, write_viewer_json
from jclt.viewer.weight_pictures import draw_global_weights, draw_operand_grids

__all__ = [
    "SCORES_EXPLAINED",
    "describe_in_notebook",
    "draw_global_weights",
    "draw_graph",
    "draw_operand_grids",
    "draw_patching",
    "export_html",
    "find_free_name",
    "plot_graph",
    "show_graph",
    "summarize_graph",
    "write_graph",
    "write_heat_map",
    "write_viewer_json",
]
