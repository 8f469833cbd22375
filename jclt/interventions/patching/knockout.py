"""`knock_out`: attention knockout. An edge from a key to a query is removed before the softmax, in a window of layers.

    score(query, key) = the least number there is, so pattern(query, key) = 0 and the rest of the row sums to 1

What the next token loses is what went along these edges.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import jax.numpy as jnp
import numpy as np

from jclt.errors import UserError
from jclt.interventions.patching.metrics import Metric, check_metric
from jclt.interventions.patching.pairs import PromptPairs
from jclt.interventions.patching.places import Position, list_windows, locate_position, make_grid, name_position
from jclt.interventions.patching.result import PatchingResult
from jclt.interventions.patching.rows import Rule
from jclt.interventions.patching.runs import Chunk, keep_passes, prepare_job, run_grid
from jclt.models import Model, ModelConfig
from jclt.numerics import at_least_float32
from jclt.shapes import Int

Edge = tuple[Position, Position]
"""Query and key: the position that attends, and the one attended to."""


def knock_out(
    model: Model,
    pairs: PromptPairs,
    edges: Sequence[Edge] | Mapping[str, Sequence[Edge]],
    *,
    layers: Iterable[int] | None = None,
    window: int = 1,
    heads: bool = False,
    metric: Metric = "probability",
    progress: bool = True,
) -> PatchingResult:
    """Removes each edge (query, key), or each named set of edges, in a window of layers around each layer.

    edges       positions as in `places.py`: `[("last", "subject")]`; or sets: `{"name": [("last", "subject"), ...]}`
    window      the number of layers around each that are knocked out together; published figures have 9
    heads       whether each head is knocked out on its own, instead of all together

    Only the clean prompts and the answers of `pairs` are used. An edge must leave its query another key.
    """
    check_metric(metric, pairs)
    if metric == "normalised":
        raise UserError("metric 'normalised': a knockout has no corrupted run, expected another metric")
    sets = name_edges(pairs, edges)
    centres = tuple(range(model.config.layers) if layers is None else layers)
    spans = list_windows(model.config, window, centres)
    grid = make_grid(model.config, pairs, "attn_scores", spans, ["all"] * len(sets), heads)
    labels = {("edge" if name == "position" else name): labels for name, labels in grid.axes.items()}
    grid = grid._replace(axes=labels | {"layer": centres, "edge": tuple(sets)})
    located = locate_edges(pairs, list(sets.values()))
    check_rows(model.config, pairs, located, spans, tuple(sets))
    job = prepare_job(model, pairs)
    lowest = jnp.finfo(at_least_float32(model.params["token_embedding"].dtype)).min

    def make_chunk(numbers: Int[np.ndarray, "P"]) -> Chunk:
        clean, _ = keep_passes(job, "clean", numbers)
        boxes = located[numbers][:, grid.position]  # [P, R, m, 2 (query, key), 2]
        shape = (*boxes.shape[:3], 2)
        layers, head = (np.broadcast_to(x[None, :, None], shape) for x in (grid.layers, grid.heads))
        values = np.full((len(numbers), 1, 1, 1, 1), lowest)
        rule = Rule(values, layers, boxes[..., 0, :], head, boxes[..., 1, :])
        return Chunk(clean, {"attn_scores": (rule,)}, clean.logits, None)

    found = run_grid(job, grid, make_chunk, progress)
    method = "attention knockout" + f", {window} layers together" * (window > 1)
    return PatchingResult(grid.axes, metric, method, "clean", pairs, *found)


def name_edges(pairs: PromptPairs, edges: Sequence[Edge] | Mapping[str, Sequence[Edge]]) -> dict[str, tuple[Edge, ...]]:
    """The sets of edges by name; each edge that stands alone is named by its positions."""
    if isinstance(edges, Mapping):
        sets: dict[str, tuple[Edge, ...]] = {str(name): tuple(edges[name]) for name in edges}
    else:
        named = [
            (" attends to ".join(name_position(pairs, place) for place in (query, key)), query, key)
            for query, key in edges
        ]
        sets = {name: ((query, key),) for name, query, key in named}
    if not sets or not all(sets.values()):
        raise UserError("edges: none, or a set of none, expected at least one (query, key)")
    return sets


def locate_edges(pairs: PromptPairs, sets: Sequence[Sequence[Edge]]) -> Int[np.ndarray, "P E m 2 2"]:
    """The ranges of queries and keys of each set, padded with empty ones."""
    most = max(map(len, sets))
    located = np.zeros((len(pairs), len(sets), most, 2, 2), np.int32)
    for number, (index, edges) in product(range(len(pairs)), enumerate(sets)):
        for slot, edge in enumerate(edges):
            located[number, index, slot] = [locate_position(pairs, number, place) for place in edge]
    return located


def check_rows(
    config: ModelConfig,
    pairs: PromptPairs,
    located: Int[np.ndarray, "P E m 2 2"],
    spans: Sequence[range],
    names: Sequence[str],
) -> None:
    """An error if a query would keep no key: its pattern could not sum to 1."""
    windows = {config.window if layer in config.local_layers else None for span in spans for layer in span}
    for number, boxes in enumerate(located):
        length = len(pairs.clean[number])
        at = np.arange(length)
        for name, edges in zip(names, boxes, strict=True):
            queries, keys = ((at[None] >= edges[:, side, :1]) & (at[None] < edges[:, side, 1:]) for side in (0, 1))
            removed = np.any(queries[:, :, None] & keys[:, None, :], axis=0)
            for window in windows:
                allowed = (at[None] <= at[:, None]) & (at[None] > at[:, None] - (window or length))
                empty = np.flatnonzero(~(allowed & ~removed).any(axis=1))
                if len(empty):
                    raise UserError(
                        f"edges '{name}': position {empty[0]} of {pairs.names[number]} would attend to nothing, "
                        "expected each query to keep a key"
                    )
