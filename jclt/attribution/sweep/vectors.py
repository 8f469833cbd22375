"""Vector nodes: heads and residual streams as nodes of a graph.

A feature is a number times a vector that is always the same. What a head writes at a position, and the residual stream
that enters a layer there, are vectors w that can point anywhere. Their node stands for one number,

    value = u . w        u = sum over outputs o: weight(o) . d value(o) / d w    (`scores.py`)

As sources they are the whole vector. As targets they are a linear function of the stream that enters a layer:

    head h of layer l at t     coefficient P'_h(t, s) at each position s, times the vector V'_h^T O'_h^T u
    residual stream of l at t  coefficient 1 at t alone, times u

Gradients of other targets end at such a node: its row of the pattern is 0, and so is the stream's derivative by itself.
`folding.py` defines P', V' and O'.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jclt.attribution.local import Frozen, LocalModel, Masks, Reads
from jclt.attribution.sweep.folding import FoldedWeights
from jclt.mesh import replicate
from jclt.numerics import einsum
from jclt.shapes import Array, Bool, Float, Int

FOLDED_AT_ONCE = 64


class VectorNodes(NamedTuple):
    """Those of one prompt, of several with a leading axis. Lists are padded; padding has a gradient of 0."""

    masks: Masks
    heads: Int[Array, "*B h 3"]  # layer, position, number
    streams: Int[Array, "*B r 2"]  # layer, position
    head_lists: Int[Array, "*B L n 2"]  # position and number of each layer's heads
    head_gradients: Float[Array, "*B h K"]  # of the outputs by a head's values, before its output matrix
    stream_gradients: Float[Array, "*B r D"]

    @property
    def total(self) -> int:
        return self.heads.shape[-2] + self.streams.shape[-2]

    def read(self, reads: Reads) -> tuple[Float[Array, "h"], Float[Array, "r"]]:
        """The values of the nodes of one prompt, given what heads and layers read."""
        assert reads.heads is not None and reads.streams is not None
        layers, positions, numbers = self.heads.T
        of_heads = einsum("mk,mk->m", reads.heads[layers, positions, numbers], self.head_gradients)
        layers, positions = self.streams.T
        return of_heads, einsum("md,md->m", reads.streams[layers, positions], self.stream_gradients)


class FoldedVectors(NamedTuple):
    """The vector nodes of B prompts as the sweep needs them. As targets they are the last ones of each prompt."""

    layers: Int[Array, "*B M"]
    are_heads: Bool[Array, "*B M"]
    rows: Float[Array, "*B M T"]  # coefficients at the positions of what enters the layer
    head_lists: Int[Array, "*B L n 2"]
    values: Float[Array, "*B L T H K"] | None  # of all heads, divided by the norm after them; None: none is a node
    kept: Float[Array, "*B L T"]
    streams: Float[Array, "*B L T D"] | None  # that enter all layers; None: none is a node


def fold_vectors(
    local: LocalModel, weights: FoldedWeights, frozen: Frozen, nodes: VectorNodes, true_reads: Reads
) -> tuple[FoldedVectors, Float[Array, "M D"]]:
    """The nodes of one prompt, and their vectors as targets."""
    config, (of_heads, of_streams) = local.model, (len(nodes.heads), len(nodes.streams))
    layers, positions, numbers = nodes.heads.T
    groups = numbers // (config.heads // config.key_heads)

    def read_values(arguments: tuple[Array, Array, Array]) -> Float[Array, "D"]:
        layer, group, gradient = arguments
        return einsum("dk,k->d", weights.values[layer, :, group], gradient)

    vectors = jax.lax.map(read_values, (layers, groups, nodes.head_gradients), batch_size=FOLDED_AT_ONCE)
    rows = frozen["pattern"][layers, numbers, positions] / frozen["attn_denominator"][layers]
    at_position = jax.nn.one_hot(nodes.streams[:, 1], rows.shape[1], dtype=rows.dtype)
    values = true_reads.heads
    if config.post_norms and values is not None:
        values = values / frozen["attn_post_denominator"][:, :, None, None]
    folded = FoldedVectors(
        layers=jnp.concatenate([layers, nodes.streams[:, 0]]),
        are_heads=jnp.arange(of_heads + of_streams) < of_heads,
        rows=jnp.concatenate([rows, at_position]),
        head_lists=nodes.head_lists,
        values=values if of_heads else None,
        kept=nodes.masks.streams,
        streams=true_reads.streams if of_streams else None,
    )
    return folded, jnp.concatenate([replicate(vectors), nodes.stream_gradients])
