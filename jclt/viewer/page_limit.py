"""Graphs that a browser can show: of a large one the strongest edges."""

from dataclasses import replace
from typing import Any

from jclt.graphs.adjacency import count_edges
from jclt.graphs.graph import Graph
from jclt.viewer.page_data import is_pruned

MOST_EDGES = 2_000_000
"""A browser takes a few seconds to draw so many."""
EDGE_THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Shares of the edges' influence; the first one is taken that leaves few enough edges."""


def limit_edges(graph: Graph, most: int = MOST_EDGES) -> Graph:
    """The graph itself, or if it has too many edges the part with the most influence. An unpruned graph is pruned at
    the usual thresholds first. Its provenance says as `shown` how much is left."""
    edges = int(count_edges(graph.adjacency))
    if edges <= most:
        return graph
    pruned = shown = graph if is_pruned(graph) else graph.prune()
    settings = pruned.provenance.get("pruning_settings")
    rule: Any = settings["rule"] if isinstance(settings, dict) and "rule" in settings else "paper"
    for threshold in EDGE_THRESHOLDS:
        if count_edges(shown.adjacency) <= most:
            break
        shown = pruned.prune(1.0, threshold, rule)
    left = f"{len(shown.features):,} of {len(graph.features):,} features and {int(count_edges(shown.adjacency)):,} of "
    note = f"{left}{edges:,} edges: those with the most influence"
    return replace(shown, provenance=pruned.provenance | {"shown": note})
