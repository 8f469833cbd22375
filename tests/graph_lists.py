"""Graphs built from one list of nodes per kind, two small examples, and the comparison of two graphs."""

from dataclasses import fields, replace
from typing import Any

import numpy as np

from jclt.graphs import Graph, build_node_table

LISTS = ("features", "errors", "tokens", "positions", "heads", "streams", "logit_tokens", "logit_positions", "values")


def build_graph(**fields: Any) -> Graph:
    table = build_node_table(layers=fields["layers"], **{name: fields.pop(name) for name in LISTS if name in fields})
    return Graph(nodes=table, **fields)


def replace_lists(graph: Graph, **changes: Any) -> Graph:
    """A copy of the graph with other lists of nodes, or other fields."""
    lists = {name: changes.pop(name, getattr(graph, name)) for name in LISTS}
    table = build_node_table(layers=changes.get("layers", graph.layers), **lists)
    return replace(graph, nodes=table, **changes)


def random_graph(
    seed: int, features=20, layers=3, tokens=4, outputs=2, positions=False, rest=0.0, density=0.5, vectors=False
) -> Graph:
    """Edges lead only upward, and value = edges + bias + rest holds exactly. With `vectors` each layer has a head at
    each position, and a residual stream enters layer 1 there."""
    random = np.random.default_rng(seed)
    places = np.stack([random.integers(0, size, features) for size in (layers, tokens, 50)], axis=1)
    places = places[np.lexsort(places.T[::-1])]
    heads = np.stack(
        [*np.divmod(np.arange(layers * tokens * vectors), tokens), np.full(layers * tokens * vectors, 5)], axis=1
    )
    streams = np.stack([np.ones(tokens * vectors, int), np.arange(tokens * vectors)], axis=1)
    size = features + layers * tokens + tokens * (1 + positions) + len(heads) + len(streams) + outputs
    graph = build_graph(
        adjacency=np.zeros((size, size)),
        bias=np.zeros(size),
        rest=np.zeros(size),
        rest_mass=np.zeros(size),
        values=np.zeros(size),
        features=places,
        activations=random.uniform(0.1, 2, features),
        errors=np.stack(np.divmod(np.arange(layers * tokens), tokens), axis=1),
        tokens=random.integers(0, 50, tokens),
        token_texts=tuple(f" word{i}" for i in range(tokens)),
        positions=np.arange(tokens * positions),
        heads=heads,
        streams=streams,
        logit_tokens=np.arange(outputs),
        logit_names=tuple(f" out{i}" for i in range(outputs)),
        logit_positions=np.full(outputs, tokens - 1),
        logit_probabilities=np.sort(random.uniform(0.1, 0.5, outputs))[::-1].copy(),
        layers=layers,
        provenance={"model": "random", "seed": seed},
    )
    below = graph.nodes.order[None] < graph.nodes.order[:, None]
    targets = graph.nodes.is_kind("feature", "head", "stream", "output")
    edges = random.standard_normal((size, size)) * (random.random((size, size)) < density)
    adjacency = edges * below * targets[:, None] * (~graph.nodes.is_kind("output"))
    signed = rest * random.standard_normal(size) * targets
    mass = np.abs(signed) * random.uniform(1, 2, size)
    bias = random.standard_normal(size) * targets
    values = adjacency.sum(axis=1) + signed + bias
    return replace_lists(graph, adjacency=adjacency, rest=signed, rest_mass=mass, bias=bias, values=values)


def hand_graph() -> Graph:
    """output = 3 f1 + 1 token1, f1 = 2 f0 - 2 error, f0 = 1 token0 - 3 token1."""
    adjacency = np.zeros((6, 6), np.float32)
    f0, f1, error, token0, token1, output = range(6)
    adjacency[output, [f1, token1]] = 3, 1
    adjacency[f1, [f0, error]] = 2, -2
    adjacency[f0, [token0, token1]] = 1, -3
    zeros = np.zeros(6, np.float32)
    return build_graph(
        adjacency=adjacency,
        bias=zeros,
        rest=zeros,
        rest_mass=zeros,
        values=adjacency.sum(axis=1),
        features=np.array([[0, 0, 17], [2, 1, 40]]),
        activations=np.ones(2, np.float32),
        errors=np.array([[1, 1]]),
        tokens=np.array([5, 6]),
        token_texts=(" South", " Creek"),
        positions=np.zeros(0, np.int64),
        logit_tokens=np.array([9]),
        logit_names=(" Denver",),
        logit_positions=np.array([1]),
        logit_probabilities=np.array([0.5], np.float32),
        layers=3,
    )


def assert_same_graph(got: Graph, want: Graph):
    for field in fields(Graph):
        a, b = getattr(got, field.name), getattr(want, field.name)
        if field.name == "nodes":
            for name in ("kind", "layer", "position", "index", "value"):
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
            continue
        if isinstance(b, np.ndarray):
            assert isinstance(a, np.ndarray), field.name
            assert a.dtype == b.dtype, field.name
            np.testing.assert_array_equal(a, b, err_msg=field.name)
        else:
            assert a == b, field.name
