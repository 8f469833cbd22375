"""Edges from heads and residual streams that are nodes, and the gradients that begin and end there (`vectors.py`).

On its way down through layer l a target's gradient meets, in this order,

1. the heads of l, between attention and MLP: edge = gradient . O'_h values(t). (Their rows of the pattern are 0, so it
   does not pass through them.) The gradients of these heads begin at the layer's input;
2. the residual streams that enter l: edge = gradient(t) . x(t). There the gradient ends, and theirs begin.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jclt.attribution.sweep.folding import FoldedLayer, add_skip
from jclt.attribution.sweep.nodes import Sweep, TargetNodes, begin_gradients
from jclt.attribution.sweep.vectors import FoldedVectors
from jclt.numerics import einsum
from jclt.shapes import Array, Bool, Float, Int


class VectorTargets(NamedTuple):
    """Which targets of a block are vector nodes: where their gradients begin."""

    layers: Int[Array, "R"]  # -1: another target
    are_heads: Bool[Array, "R"]
    rows: Float[Array, "R T"]
    vectors: Float[Array, "R D"]

    def begin(self, layer: Array, are_heads: bool) -> Float[Array, "T R D"]:
        begins = ((self.layers == layer) & (self.are_heads == are_heads)).astype(self.rows.dtype)
        return (self.rows * begins[:, None]).T[:, :, None] * self.vectors[None]


class VectorEdges(NamedTuple):
    """From vector nodes into the targets of M blocks, or of one."""

    heads: Float[Array, "*M L n R"]
    streams: Float[Array, "*M L T R"]


def make_vector_edges(sweep: Sweep, targets: int) -> VectorEdges | None:
    """Zeros for one block of so many targets."""
    nodes = sweep.prompts.vectors
    if nodes is None:
        return None
    _, layers, most, _ = nodes.head_lists.shape
    length = 0 if nodes.streams is None else sweep.stops[-1]
    heads, streams = ((layers, size, targets) for size in (most, length))
    return VectorEdges(jnp.zeros(heads, sweep.dtype), jnp.zeros(streams, sweep.dtype))


def take_vector_targets(
    sweep: Sweep, nodes: FoldedVectors, prompt: Int[Array, ""], numbers: Int[Array, "R"], targets: TargetNodes
) -> VectorTargets:
    first = sweep.prompts.targets.layers.shape[1] - nodes.layers.shape[1]
    place = jnp.maximum(numbers - first, 0)
    layers = jnp.where(numbers >= first, nodes.layers[prompt, place], -1)
    rows = nodes.rows[prompt, place, sweep.start :]
    return VectorTargets(layers, nodes.are_heads[prompt, place], rows, targets.vectors)


def cross_vectors(
    sweep: Sweep,
    nodes: FoldedVectors,
    begins: VectorTargets,
    targets: TargetNodes,
    prompt: Int[Array, ""],
    layer: Int[Array, ""],
    folded: FoldedLayer,
    above: Float[Array, "T R D"],
    below: Float[Array, "T R D"],
    edges: VectorEdges,
) -> tuple[Float[Array, "T R D"], VectorEdges]:
    """One layer's vector nodes: their edges, and the gradients at the layer's input, given those `above` at its output
    and `below` at its input."""
    precision = sweep.local.precision
    if nodes.values is not None:
        begun = begin_gradients(targets, layer, sweep.stops[-1])
        # From the layer's output, and what its coder reads, to the stream after attention.
        run = partial(add_skip, sweep.local, folded, jnp.zeros_like(above))
        middle = jax.vjp(run, jnp.zeros_like(above))[1]((above, begun))[0]
        writes = einsum("thk,hkd->thd", nodes.values[prompt, layer, sweep.start :], folded.outputs, precision=precision)
        to_heads = einsum("trd,thd->htr", middle, writes, precision=precision)
        positions, numbers = nodes.head_lists[prompt, layer].T
        edges = edges._replace(heads=edges.heads.at[layer].set(to_heads[numbers, positions - sweep.start]))
        below = below + begins.begin(layer, True)
    if nodes.streams is not None:
        to_streams = einsum("trd,td->tr", below, nodes.streams[prompt, layer, sweep.start :], precision=precision)
        edges = edges._replace(streams=edges.streams.at[layer].set(to_streams))
        below = below * nodes.kept[prompt, layer, sweep.start :, None, None] + begins.begin(layer, False)
    return below, edges
