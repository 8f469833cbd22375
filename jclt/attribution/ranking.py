"""Steps 4 and 5 on the host, for one prompt: ranking (which features to trace next) and assembling the graph.

A row of edges holds the edges into one target. Take |row| / sum |row| as the probabilities of the steps of a walk that
starts at the outputs and goes from target to source. A node's influence is the probability that the walk visits it. The
walk ends at a target that has no row yet. This is the definition of `graphs/influence.py`, applied to the rows traced
so far: in a row all sources are present, so its `rest_mass` is 0. Let m be the probability that the walk ends at an
untraced feature. Then

1. a walk in the whole graph is the same as this walk until it meets an untraced feature, and visits until then are
   counted;
2. with probability 1 - m it never meets one;
3. so every influence is too low by at most m.

Tracing stops when m falls below the tolerance, or when enough features are traced.

Only embeddings lead into features of the first layer, so their rows are there before anything is traced, and no walk
goes from them to another feature. So with a tolerance, rounds are counted in features of higher layers; those of the
first layer are taken with them as far as they rank as high. Once walks end at untraced features of higher layers with a
probability below the tolerance, only features of the first layer are taken, until m is below it, too. Where heads are
nodes they lead into features of the first layer, and those count as the others do.

Rows are kept without the sources that cannot reach their targets: those in the target's own layer (but heads and
residual streams), in higher layers and at positions after its block's last one. Each row is dropped as soon as it has
been copied into the graph.
"""

from typing import Any, NamedTuple

import numpy as np

from jclt.attribution.embeddings import EmbeddingEdges
from jclt.attribution.sweep.edges import Edges
from jclt.attribution.targets import Outputs
from jclt.attribution.vectors import NO_VECTORS, VectorList
from jclt.attribution.walk import Rows, move_to_graph, walk
from jclt.graphs.graph import Graph
from jclt.graphs.nodes import build_node_table, compute_order, find_layer
from jclt.shapes import Float, Int

ROUND_SIZE = 512
"""Features traced between two rankings: at most so many, at most a sixteenth of all, and at least 16. So which features
are kept does not depend on how rows are computed."""


TRACED_FOR_TOLERANCE = 0.2
"""About the share of features that a tolerance needs."""


class Limits(NamedTuple):
    """How much of a graph is traced."""

    max_features: int
    tolerance: float
    round_size: int | None = None


class PromptRows:
    """The rows of one prompt. Targets are numbered: first the n active features, then the k outputs, then the heads and
    residual streams that are nodes. So are sources, the columns of a row: features, errors by layer, token embeddings,
    position embeddings, heads and residual streams."""

    def __init__(
        self,
        *,
        tokens: Int[np.ndarray, "T"],
        features: Int[np.ndarray, "n 3"],  # layer, position, feature
        activations: Float[np.ndarray, "n"],
        slots: Int[np.ndarray, "2 n"],  # tile, numbered through all groups, and slot
        outputs: Outputs,
        embedding_edges: EmbeddingEdges,
        padded_numbers: Int[np.ndarray, "_"],  # of each target among the arrays' targets, with padding (`fold_nodes`)
        layers: int,
        about: dict[str, Any],  # for the graph's provenance
        limits: Limits,
        vectors: VectorList = NO_VECTORS,
    ):
        self.tokens, self.features, self.activations, self.slots = tokens, features, activations, slots
        self.outputs, self.layers, self.about = outputs, layers, about
        self.limit, self.tolerance = min(limits.max_features, len(features)), limits.tolerance
        default_size = min(ROUND_SIZE, max(16, len(features) // 16))
        self.round_size = default_size if limits.round_size is None else limits.round_size
        self.vectors = vectors
        self.target_layers = np.concatenate([features[:, 0], outputs.layers, vectors.layers])
        self.target_positions = np.concatenate([features[:, 1], outputs.positions, vectors.positions])
        orders = [compute_order(layers, "feature") for layers in (features[:, 0], outputs.layers)]
        self.target_orders = np.concatenate([*orders, vectors.order])
        self.values, self.bias = embedding_edges.values[padded_numbers], embedding_edges.bias[padded_numbers]
        self.embeddings = [x for x in (embedding_edges.tokens, embedding_edges.positions) if x is not None]
        self.padded_numbers = padded_numbers
        self.is_traced = np.zeros(len(features), bool)  # has a row, or will have it at the end of the round
        self.cut = 0  # the layer down to which targets go to meet columns (`sweep/columns.py`); 0: none
        self.column_places = np.full((2, self.source_count), -1)  # block and place in it of each source below the cut
        self.low_places = np.zeros((2, len(features)), int)  # tile and slot of each target below the cut
        self.low_edges: Float[np.ndarray, "N m K R S"] | None = None  # from the former into the latter
        self.rows: list[Rows] = []
        self.columns: dict[tuple[int, int], np.ndarray] = {}

    @property
    def source_count(self) -> int:
        return self.first_vector + len(self.vectors.layers)

    @property
    def first_vector(self) -> int:
        """The number of the first head or residual stream among the sources."""
        return len(self.features) + (self.layers + len(self.embeddings)) * len(self.tokens)

    @property
    def lowest(self) -> int:
        """The lowest layer whose targets go down: in the first one they only read embeddings, and heads."""
        return 0 if len(self.vectors.heads) else max(self.cut, 1)

    def list_columns(self, order: int, stop: int) -> Int[np.ndarray, "c"]:
        """The sources below a target's place in the order, and before a position."""
        if (order, stop) not in self.columns:
            layer = find_layer(order)
            features = np.flatnonzero((self.features[:, 0] < layer) & (self.features[:, 1] < stop))
            # After the features come blocks of one column per position: each layer's errors, then the embeddings.
            blocks = (*range(layer), *range(self.layers, self.layers + len(self.embeddings)))
            starts = [len(self.features) + len(self.tokens) * block for block in blocks]
            others = [start + np.arange(stop) for start in starts]
            vectors = np.flatnonzero((self.vectors.order < order) & (self.vectors.positions < stop))
            others.append(self.first_vector + vectors)
            self.columns[order, stop] = np.concatenate([features, *others]).astype(np.int32)
        return self.columns[order, stop]

    def count_features(self, start: int, length: int) -> Int[np.ndarray, "L T"]:
        """How many are active in each layer, at `length` positions from `start` on."""
        counts = np.zeros((self.layers, length), int)
        np.add.at(counts, (self.features[:, 0], self.features[:, 1] - start), 1)
        return counts

    def list_sources(self, cut: int, start: int) -> Int[np.ndarray, "s"]:
        """The features and errors in layers below the cut."""
        features, errors = np.flatnonzero(self.features[:, 0] < cut), np.arange(cut * len(self.tokens))
        return np.concatenate([features, len(self.features) + errors[errors % len(self.tokens) >= start]])

    def locate_sources(self, numbers: Int[np.ndarray, "s"]) -> tuple[Int[np.ndarray, "s"], Int[np.ndarray, "s"]]:
        """Layers and positions of features and errors."""
        errors = np.stack(np.divmod(np.arange(self.layers * len(self.tokens)), len(self.tokens)), axis=1)
        layers, positions = np.concatenate([self.features[:, :2], errors])[numbers].T
        return layers, positions

    def estimate_traced(self) -> float:
        """About the share of features that will be traced."""
        return min(self.limit / len(self.features), TRACED_FOR_TOLERANCE if self.tolerance else 1.0)

    def choose_first(self) -> Int[np.ndarray, "_"]:
        """The targets of the first round: all but features, and every feature if all are traced whatever their rank."""
        outputs = np.arange(len(self.features), len(self.target_layers))
        if self.limit < len(self.features) or self.tolerance:
            return outputs
        self.is_traced[:] = True
        return np.append(outputs, np.arange(len(self.features)))

    def choose_next(self) -> Int[np.ndarray, "_"]:
        """The features of the next round, the most influential ones; none when the graph is done."""
        budget, untraced = self.limit - np.count_nonzero(self.is_traced), np.flatnonzero(~self.is_traced)
        if not budget or not len(untraced):
            return untraced[:0]
        influence = self.compute_influence()[untraced]
        allowed = self.tolerance * self.outputs.weights.sum()
        if influence.sum() < allowed:
            return untraced[:0]
        order, size = np.argsort(-influence, kind="stable"), self.round_size
        if self.tolerance:
            higher = np.flatnonzero(self.features[untraced[order], 0] >= min(self.lowest, 1))
            if influence[order[higher]].sum() < allowed:
                order = np.delete(order, higher)
            else:
                size = higher[:size][-1] + 1
        chosen = untraced[order[: min(size, budget)]]
        self.is_traced[chosen] = True
        return chosen

    def add_block(
        self,
        targets: Int[np.ndarray, "n"],
        block: Edges,
        start: int,
        length: int,
    ) -> None:
        """Keeps the rows of a block, which begins with the rows of these targets: edges from sources at `length`
        positions from `start` on."""
        tiles = block.features.reshape(-1, *block.features.shape[2:])
        stop, count = min(len(self.tokens), start + length), len(self.features)
        for order in np.unique(self.target_orders[targets]):
            place, layer = np.flatnonzero(self.target_orders[targets] == order), find_layer(int(order))
            columns = self.list_columns(int(order), stop)
            features = columns[: np.searchsorted(columns, count)]
            tile, slot = self.slots[:, features]
            edges = np.zeros((len(place), len(columns)), tiles.dtype)
            end = len(features) + int(layer) * stop
            edges[:, : len(features)] = tiles[tile, place[:, None], slot]
            errors = edges[:, len(features) : end].reshape(len(place), int(layer), stop)
            errors[:, :, start:] = np.moveaxis(np.asarray(block.errors)[:layer, : stop - start, place], 2, 0)
            edges[:, len(features) : end] = errors.reshape(len(place), -1)
            if block.columns is not None:
                number, slot = self.column_places[:, columns[:end]]
                met = np.flatnonzero(number >= 0)
                edges[:, met] += block.columns[number[met], place[:, None], slot[met]]
            if block.vectors is not None:
                inner = columns[np.searchsorted(columns, self.first_vector) :] - self.first_vector
                edges[:, len(columns) - len(inner) :] = self.vectors.take_edges(block.vectors, inner, place, start)
            self.add_rows(int(order), targets[place], columns, edges, end, stop)

    def add_low_targets(self, targets: Int[np.ndarray, "r"]) -> None:
        """Keeps the rows of targets below the cut, whose edges are there already."""
        for order in np.unique(self.target_orders[targets]):
            assert self.low_edges is not None
            of_layer, layer = targets[self.target_orders[targets] == order], find_layer(int(order))
            stop = int(self.target_positions[of_layer].max()) + 1
            columns = self.list_columns(int(order), stop)
            end = len(columns) - len(self.embeddings) * stop
            block, place = self.column_places[:, columns[:end]]
            tile, slot = self.low_places[:, of_layer, None]
            edges = np.zeros((len(of_layer), len(columns)), self.values.dtype)
            edges[:, :end] = np.where(block < 0, 0, self.low_edges[block, layer, tile, place, slot])
            self.add_rows(int(order), of_layer, columns, edges, end, stop)

    def add_first_layer(self, targets: Int[np.ndarray, "r"]) -> None:
        """Keeps the rows of targets in the first layer, into which only embeddings lead."""
        if len(targets):
            order, length = int(self.target_orders[targets[0]]), len(self.tokens)
            columns = self.list_columns(order, length)
            self.add_rows(order, targets, columns, np.zeros((len(targets), len(columns)), self.values.dtype), 0, length)

    def add_rows(
        self, order: int, targets: np.ndarray, columns: np.ndarray, edges: Float[np.ndarray, "r c"], end: int, stop: int
    ) -> None:
        """Adds the edges from embeddings before a position to rows, from column `end` on, and keeps the rows."""
        to_embeddings = [x[self.padded_numbers[targets], :stop] for x in self.embeddings]
        np.concatenate(to_embeddings, axis=1, out=edges[:, end : end + stop * len(self.embeddings)])
        self.rows.append(Rows(order, targets, columns, edges))

    def compute_influence(self) -> Float[np.ndarray, "sources"]:
        """The probability that the walk visits each source, times the sum of the outputs' weights."""
        count = len(self.features)
        sources, weights = np.arange(len(self.target_layers)), np.zeros(len(self.target_layers))
        ends = slice(count, count + len(self.outputs.tokens))
        sources[ends], weights[ends] = -1, self.outputs.weights
        sources[ends.stop :] = np.arange(self.first_vector, self.source_count)
        return walk(self.rows, self.source_count, sources, weights)

    def build_graph(self, token_texts: tuple[str, ...], provenance: dict[str, Any]) -> Graph:
        """The traced features, all errors and embeddings, and the outputs; the untraced features add up to the rest."""
        count, length, ends = len(self.features), len(self.tokens), len(self.outputs.tokens)
        kept = np.flatnonzero(self.is_traced)
        targets = np.append(kept, np.arange(count, len(self.target_layers)))
        sources = len(kept) + self.source_count - count
        size = sources + ends
        # The graph's node of each source and of each target; -1 for an untraced feature.
        feature_nodes = np.where(self.is_traced, np.cumsum(self.is_traced) - 1, -1)
        source_nodes = np.append(feature_nodes, np.arange(len(kept), sources))
        first_vector = len(kept) + self.first_vector - count
        target_nodes = np.concatenate([feature_nodes, sources + np.arange(ends), np.arange(first_vector, sources)])
        dtype = self.values.dtype

        def spread_over_nodes(x: Any) -> Float[np.ndarray, "N"]:
            by_node = np.zeros(size, dtype)
            by_node[target_nodes[targets]] = x
            return by_node

        edges = move_to_graph(self.rows, source_nodes, target_nodes, size, dtype)
        return Graph(
            adjacency=edges.adjacency,
            nodes=build_node_table(
                layers=self.layers,
                features=self.features[kept],
                errors=np.stack(np.divmod(np.arange(self.layers * length), length), axis=1),
                tokens=self.tokens,
                positions=np.arange(length if len(self.embeddings) > 1 else 0),
                logit_tokens=self.outputs.tokens,
                logit_positions=self.outputs.positions,
                heads=self.vectors.heads,
                streams=self.vectors.streams,
                values=spread_over_nodes(self.values[targets]),
            ),
            bias=spread_over_nodes(self.bias[targets]),
            rest=edges.rest,
            rest_mass=edges.rest_mass,
            activations=self.activations[kept],
            token_texts=token_texts,
            logit_names=self.outputs.names,
            logit_probabilities=self.outputs.probabilities,
            logit_weights=self.outputs.weights,
            layers=self.layers,
            provenance=provenance | self.about,
        )
