"""One prompt's rows of edges on the host: which to compute next, best first, and the graph that they make.

Read each row of |edges|, divided by its sum, as the steps of a walk that starts at the outputs and goes from target to
source. A node's influence is the probability that the walk visits it. A row not yet traced ends the walk, so every
influence is too low by at most m, the probability that the walk ends at an untraced feature: a walk of the whole graph
visits a node either before it meets the first untraced feature, which has been counted, or after it, which has no more
than that probability to happen. Tracing stops when m falls below a tolerance, or when enough features have been traced.

Rows are kept without what cannot reach their targets: sources of the target's own layer, of higher ones, and of later
positions. They are dropped as they are put in their places in the graph.
"""

from typing import Any, NamedTuple

import numpy as np

from jclt.attribution.edges import Fixed
from jclt.attribution.targets import Outputs
from jclt.graphs.graph import Graph
from jclt.graphs.nodes import node_table
from jclt.shapes import Float, Int

QUEUE = 512
"""Features traced between two rankings: so many or a sixteenth of all, whichever is less, and at least 16. Which are
kept does thus not depend on how rows are computed."""


class Rows(NamedTuple):
    """Edges into some targets of one layer, from the sources that can reach them."""

    layer: int
    targets: Int[np.ndarray, "r"]
    columns: Int[np.ndarray, "c"]
    edges: Float[np.ndarray, "r c"]


class PromptRows:
    """Targets are numbered: first the n active features, then the k outputs. So are sources, a row's columns: features,
    errors, token embeddings and position embeddings. `fixed` holds more than these targets, which stand in it at
    `places`."""

    def __init__(
        self,
        tokens: Int[np.ndarray, "T"],
        features: Int[np.ndarray, "n 3"],
        activations: Float[np.ndarray, "n"],
        slots: Int[np.ndarray, "3 n"],
        outputs: Outputs,
        fixed: Fixed,
        places: Int[np.ndarray, "_"],
        layers: int,
        limit: int,
        tolerance: float,
        queue: int | None = None,
    ):
        self.tokens, self.features, self.activations, self.slots = tokens, features, activations, slots
        self.outputs, self.layers = outputs, layers
        self.limit, self.tolerance = min(limit, len(features)), tolerance
        self.queue = min(QUEUE, max(16, len(features) // 16)) if queue is None else queue
        self.target_layers = np.concatenate([features[:, 0], outputs.layers])
        self.target_positions = np.concatenate([features[:, 1], outputs.positions])
        self.values, self.bias = fixed.values[places], fixed.bias[places]
        self.embeddings, self.places = [x for x in (fixed.tokens, fixed.positions) if x is not None], places
        self.is_traced = np.zeros(len(features), bool)  # has a row, or is about to
        self.rows: list[Rows] = []
        self.reaching: dict[tuple[int, int], np.ndarray] = {}

    @property
    def sources(self) -> int:
        return len(self.features) + (self.layers + len(self.embeddings)) * len(self.tokens)

    def columns(self, layer: int, stop: int) -> Int[np.ndarray, "c"]:
        """The sources in lower layers and before a position."""
        if (layer, stop) not in self.reaching:
            count, length = len(self.features), len(self.tokens)
            at = np.arange(stop)
            features = np.flatnonzero((self.features[:, 0] < layer) & (self.features[:, 1] < stop))
            others = [count + length * row + at for row in (*range(layer), *self.rows_of_embeddings)]
            self.reaching[layer, stop] = np.concatenate([features, *others]).astype(np.int32)
        return self.reaching[layer, stop]

    @property
    def rows_of_embeddings(self) -> range:
        """Where embeddings stand among the sources after the features, a row for each layer's errors before them."""
        return range(self.layers, self.layers + len(self.embeddings))

    def first(self) -> Int[np.ndarray, "_"]:
        """The outputs, and every feature if all are traced whatever their rank."""
        ends = len(self.features) + np.arange(len(self.outputs.tokens))
        if self.limit < len(self.features) or self.tolerance:
            return ends
        self.is_traced[:] = True
        return np.append(ends, np.arange(len(self.features)))

    def next(self) -> Int[np.ndarray, "_"]:
        """The features to trace now; none when the graph is done."""
        room, left = self.limit - np.count_nonzero(self.is_traced), np.flatnonzero(~self.is_traced)
        if not room or not len(left):
            return left[:0]
        influence = self.influence()[left]
        if influence.sum() < self.tolerance * self.outputs.weights.sum():
            return left[:0]
        chosen = left[np.argsort(-influence, kind="stable")[: min(self.queue, room)]]
        self.is_traced[chosen] = True
        return chosen

    def record(self, targets: Int[np.ndarray, "r"], to_features: np.ndarray, to_errors: np.ndarray) -> None:
        """Takes in blocks `[M, G, K, R, S]` and `[M, L, R, T]` up to some position, of which the first rows are these
        targets'."""
        blocks, groups, tiles, size, _ = to_features.shape
        to_tiles = to_features.reshape(blocks, groups * tiles, size, -1)
        stop, count = min(len(self.tokens), to_errors.shape[3]), len(self.features)
        for layer in np.unique(self.target_layers[targets]):
            numbers = np.flatnonzero(self.target_layers[targets] == layer)
            block, place = np.divmod(numbers, size)
            columns = self.columns(int(layer), stop)
            features = columns[: np.searchsorted(columns, count)]
            group, tile, slot = self.slots[:, features]
            edges = np.empty((len(numbers), len(columns)), to_features.dtype)
            end = len(features) + int(layer) * stop
            edges[:, : len(features)] = to_tiles[block[:, None], group * tiles + tile, place[:, None], slot]
            edges[:, len(features) : end] = to_errors[block, :layer, place, :stop].reshape(len(numbers), -1)
            own = [x[self.places[targets[numbers]], :stop] for x in self.embeddings]
            np.concatenate(own, axis=1, out=edges[:, end:])
            self.rows.append(Rows(int(layer), targets[numbers], columns, edges))

    def influence(self) -> Float[np.ndarray, "C"]:
        """The probability that the walk visits each source, times the sum of the outputs' weights."""
        found, count = np.zeros(self.sources), len(self.features)
        for rows in sorted(self.rows, key=lambda rows: -rows.layer):
            are_outputs = rows.targets >= count
            walkers = found[np.where(are_outputs, 0, rows.targets)]
            walkers[are_outputs] = self.outputs.weights[rows.targets[are_outputs] - count]
            found[rows.columns] += visited(rows.edges, walkers)
        return found

    def graph(self, token_texts: tuple[str, ...], provenance: dict[str, Any]) -> Graph:
        """The traced features, all errors and embeddings, and the outputs; untraced features are the rest."""
        count, length, ends = len(self.features), len(self.tokens), len(self.outputs.tokens)
        kept = np.flatnonzero(self.is_traced)
        targets = np.append(kept, count + np.arange(ends))
        sources = len(kept) + self.sources - count
        size = sources + ends
        of_features = np.where(self.is_traced, np.cumsum(self.is_traced) - 1, -1)
        of_sources = np.append(of_features, np.arange(len(kept), sources))
        of_targets = np.append(of_sources[:count], sources + np.arange(ends))
        dtype = self.values.dtype

        def on_nodes(x: Any) -> Float[np.ndarray, "N"]:
            whole = np.zeros(size, dtype)
            whole[of_targets[targets]] = x
            return whole

        adjacency = np.zeros((size, size), dtype)
        rest, rest_mass = np.zeros(size, dtype), np.zeros(size, dtype)
        while self.rows:
            _, own, columns, edges = self.rows.pop()
            nodes, columns = of_targets[own], of_sources[columns]
            if not self.is_traced.all():
                lost = edges[:, columns < 0]
                rest[nodes], rest_mass[nodes] = lost.sum(axis=1), np.abs(lost).sum(axis=1)
                edges, columns = edges[:, columns >= 0], columns[columns >= 0]
            for node, row in zip(nodes, edges, strict=True):
                adjacency[node, columns] = row
        return Graph(
            adjacency=adjacency,
            nodes=node_table(
                layers=self.layers,
                features=self.features[kept],
                errors=np.stack(np.divmod(np.arange(self.layers * length), length), axis=1),
                tokens=self.tokens,
                positions=np.arange(length if len(self.embeddings) > 1 else 0),
                logit_tokens=self.outputs.tokens,
                logit_positions=self.outputs.positions,
                values=on_nodes(self.values[targets]),
            ),
            bias=on_nodes(self.bias[targets]),
            rest=rest,
            rest_mass=rest_mass,
            activations=self.activations[kept],
            token_texts=token_texts,
            logit_names=self.outputs.names,
            logit_probabilities=self.outputs.probabilities,
            logit_weights=self.outputs.weights,
            layers=self.layers,
            provenance=provenance,
        )


def visited(rows: Float[np.ndarray, "r C"], walkers: Float[np.ndarray, "r"]) -> Float[np.ndarray, "C"]:
    """How many of the walkers at the targets of these rows go on to each source."""
    steps = np.abs(rows)
    shares = walkers / np.maximum(steps.sum(axis=1, dtype=np.float64), 1e-30)
    return (shares.astype(steps.dtype) @ steps).astype(np.float64)


def size_of_rows(
    counts: Int[np.ndarray, "C T"], covered: tuple[int, ...], layers: int, nodes: int, limit: int, outputs: int
) -> tuple[float, float]:
    """About how many numbers the rows of a prompt hold, and its graph; `nodes` are kinds of embeddings."""
    length, total = counts.shape[1], int(counts.sum())
    limit = min(limit, total)
    below = np.cumsum(np.cumsum(counts, axis=0) - counts, axis=1) + np.outer(covered, np.arange(1, length + 1))
    mean = float((counts * (below + nodes * np.arange(1, length + 1))).sum()) / max(total, 1)
    fixed = (layers + nodes) * length
    return limit * mean + outputs * (total + fixed), float(limit + fixed + outputs) ** 2
