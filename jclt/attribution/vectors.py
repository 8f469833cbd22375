"""Step 2, heads and residual streams as nodes (`sweep/vectors.py` says what they are): which ones, and in which
arrays."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from jclt.attribution.gradients import Gradients
from jclt.attribution.local import Masks
from jclt.attribution.sizes import round_up
from jclt.attribution.sweep.vector_edges import VectorEdges
from jclt.attribution.sweep.vectors import VectorNodes
from jclt.attribution.true_pass import TruePass
from jclt.graphs.nodes import compute_order
from jclt.numerics import einsum
from jclt.shapes import Array, Bool, Float, Int


class VectorList(NamedTuple):
    """One prompt's heads, by layer, position and number, and then its residual streams, by layer and position."""

    heads: Int[np.ndarray, "h 3"]
    streams: Int[np.ndarray, "r 2"]

    @property
    def layers(self) -> Int[np.ndarray, "_"]:
        return np.concatenate([self.heads[:, 0], self.streams[:, 0]])

    @property
    def positions(self) -> Int[np.ndarray, "_"]:
        return np.concatenate([self.heads[:, 1], self.streams[:, 1]])

    @property
    def order(self) -> Int[np.ndarray, "_"]:
        """As in a graph's `NodeTable`."""
        return np.concatenate([compute_order(self.heads[:, 0], "head"), compute_order(self.streams[:, 0], "stream")])

    @property
    def slots(self) -> Int[np.ndarray, "h"]:
        """The place of each head in the list of its layer."""
        return np.arange(len(self.heads)) - np.searchsorted(self.heads[:, 0], self.heads[:, 0])

    def take_edges(
        self, edges: VectorEdges, nodes: Int[np.ndarray, "v"], targets: Int[np.ndarray, "r"], start: int
    ) -> Float[np.ndarray, "r v"]:
        """From these nodes into these targets of a block."""
        count = len(self.heads)
        heads, (layers, positions) = nodes[nodes < count], self.streams[nodes[nodes >= count] - count].T
        of_heads = edges.heads[self.heads[heads, 0], self.slots[heads]]
        of_streams = edges.streams[layers, positions - start]
        return np.concatenate([of_heads, of_streams])[:, targets].T


NO_VECTORS = VectorList(np.zeros((0, 3), int), np.zeros((0, 2), int))


class ChosenVectors(NamedTuple):
    """Those of a batch of prompts."""

    nodes: VectorNodes
    lists: list[VectorList]  # by prompt
    about: list[dict[str, Any]]  # by prompt, for a graph's provenance

    def number_targets(self, prompt: int) -> Int[np.ndarray, "_"]:
        """Their numbers after a batch's other targets."""
        heads, streams = (np.arange(len(x)) for x in self.lists[prompt])
        return np.append(heads, self.nodes.heads.shape[1] + streams)


def choose_vectors(
    gradients: Gradients,
    true_pass: TruePass,
    has_nodes: Bool[np.ndarray, "B T"],
    heads: int | None,
    cuts: tuple[int, ...],
    prompts: int,
    by_prompt: NamedSharding,
) -> ChosenVectors:
    """Of each prompt the `heads` with the values of highest size, none with 0, and the streams that enter the layers
    `cuts`. Beyond so many `prompts` the others only fill the batch up."""
    assert true_pass.heads is not None and true_pass.streams is not None
    lists, about = [], []
    values = np.asarray(measure_heads(gradients.heads, true_pass.heads)) * has_nodes[:, None, :, None]
    for sizes, has in zip(np.abs(values[:prompts]), has_nodes, strict=False):
        chosen = find_largest(sizes, heads or 0)
        positions = np.flatnonzero(has)
        streams = np.stack([np.repeat(cuts, len(positions)), np.tile(positions, len(cuts))], axis=1).astype(int)
        lists.append(VectorList(np.stack(chosen, axis=1), streams))
        share = float(sizes[chosen].sum(dtype=np.float64) / max(sizes.sum(dtype=np.float64), 1e-30))
        of = sizes.shape[0] * sizes.shape[2] * len(positions)
        counts = {"nodes": len(chosen[0]), "of": of, "share_of_values": round(share, 4)}
        about.append({} if heads is None else {"chosen_heads": counts})
    nodes = jax.device_put(arrange_vectors(lists, values.shape), by_prompt)
    return ChosenVectors(gather_gradients(gradients, nodes), lists, about)


def find_largest(sizes: Float[np.ndarray, "L T H"], most: int) -> tuple[Int[np.ndarray, "n"], ...]:
    """The places of at most so many entries above 0, sorted."""
    order = np.argsort(-sizes, axis=None, kind="stable")[:most]
    return np.unravel_index(np.sort(order[sizes.ravel()[order] > 0]), sizes.shape)


def arrange_vectors(lists: list[VectorList], shape: tuple[int, ...]) -> VectorNodes:
    """The nodes in arrays, each list longer than any of its prompts', without gradients: 1 stands for them, and 0 for
    padding."""
    batch, layers, length, heads = shape
    most = [max(len(x[kind]) for x in lists) for kind in (0, 1)]
    sizes = [round_up(size + 1, 16) if size else 0 for size in most]
    head_places, stream_places = np.zeros((batch, sizes[0], 3), int), np.zeros((batch, sizes[1], 2), int)
    valid_heads, valid_streams = np.zeros((batch, sizes[0], 1), bool), np.zeros((batch, sizes[1], 1), bool)
    longest = max((int(vectors.slots.max()) + 1 for vectors in lists if len(vectors.heads)), default=0)
    head_lists = np.zeros((batch, layers, round_up(longest, 8) if longest else 0, 2), int)
    kept_heads, kept_streams = np.ones((batch, layers, length, heads), bool), np.ones((batch, layers, length), bool)
    for row, vectors in enumerate(lists):
        head_places[row, : len(vectors.heads)], valid_heads[row, : len(vectors.heads)] = vectors.heads, True
        stream_places[row, : len(vectors.streams)], valid_streams[row, : len(vectors.streams)] = vectors.streams, True
        head_lists[row, vectors.heads[:, 0], vectors.slots] = vectors.heads[:, 1:]
        kept_heads[row][tuple(vectors.heads.T)] = False
        kept_streams[row][tuple(vectors.streams.T)] = False
    masks = Masks(kept_heads, kept_streams)  # type: ignore[arg-type]
    places: Any = head_places, stream_places, head_lists
    return VectorNodes(masks, *places, valid_heads, valid_streams)  # type: ignore[arg-type]


@jax.jit
@jax.named_scope("choose_vectors")
def measure_heads(gradients: Float[Array, "B L T H K"], values: Float[Array, "B L T H K"]) -> Float[Array, "B L T H"]:
    return einsum("blthk,blthk->blth", gradients, values)


@jax.jit
@jax.named_scope("choose_vectors")
def gather_gradients(gradients: Gradients, nodes: VectorNodes) -> VectorNodes:
    """The nodes with their gradients."""

    def gather(gradients: Gradients, nodes: VectorNodes) -> VectorNodes:
        dtype, heads, streams = gradients.heads.dtype, nodes.heads.T, nodes.streams.T
        return nodes._replace(
            masks=jax.tree.map(lambda x: x.astype(dtype), nodes.masks),
            head_gradients=gradients.heads[tuple(heads)] * nodes.head_gradients.astype(dtype),
            stream_gradients=gradients.streams[tuple(streams)] * nodes.stream_gradients.astype(dtype),
        )

    return jax.vmap(gather)(gradients, nodes)
