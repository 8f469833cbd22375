"""Graphs that a browser can show: of a large one the strongest edges."""

from dataclasses import replace

from jclt.graphs.adjacency import count_edges
from jclt.graphs.graph import Graph

MOST_EDGES = 2_000_000
"""A browser takes a few seconds to draw so many."""
EDGE_THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Shares of the edges' influence of which the first is taken that leaves few enough."""


def limit_edges(graph: Graph, most: int = MOST_EDGES) -> Graph:
    """The graph itself, or if it has too many edges the part that has most influence: pruned at the usual thresholds,
    and then at lower shares of the edges' influence until few enough are left. Its provenance says so as `shown`."""
    edges, shown = int(count_edges(graph.adjacency)), graph
    if edges <= most:
        return graph
    if not isinstance(graph.provenance.get("pruning_settings"), dict):
        shown = graph.prune()
    for threshold in EDGE_THRESHOLDS:
        if count_edges(shown.adjacency) <= most:
            break
        shown = shown.prune(1.0, threshold)
    features, left = len(shown.features), int(count_edges(shown.adjacency))
    note = (
        f"{features:,} of {len(graph.features):,} features and {left:,} of {edges:,} edges, those with the most "
        f"influence, as a page has at most {most:,} edges"
    )
    return replace(shown, provenance=shown.provenance | {"shown": note})
