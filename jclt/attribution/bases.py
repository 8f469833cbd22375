"""The basis of a graph (step 2, gather sources): which nodes a prompt has, and what each of them reads and writes.

A basis lists the nodes of a prompt and gives for each

- what it reads: a vector at a layer and position. The vector times the value there, plus a bias, is the node's value;
- what it writes: a vector into the MLP output of one or several layers, at its position;
- its value.

`FeatureNodes` holds what nodes read and their values, `SourceWrites` what they write, and `Layout` the sizes of both.
Edges, ranking and graphs (`edges.py`, `ranking.py`, `schedule.py`) know nothing else of the coder: not how many
features it has, nor where its weights are stored.

There is one basis today: the active features of a coder, with the coder's error at each layer and position as a source
beside them. (Embeddings are sources of every graph: `embeddings.py`.) Another basis is another function that fills the
same arrays.

Features are kept in two orders.

- `FeatureNodes` lists them by covered layer, position and feature, as a graph does. Each layer's list is padded to the
  length of the longest.
- `SourceWrites` keeps them in tiles. All slots of a tile belong to one position, so that one matrix product serves the
  tile, however unevenly features are spread over positions. Where features also write to later layers, the features of
  all layers share a position's tiles (one group of tiles). Where each writes to its own layer alone, every layer has
  tiles of its own (a group for each layer), so that no zeros are kept for layers that a feature does not write.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jclt.attribution.true_pass import TruePass
from jclt.coders import Coder, CoderConfig
from jclt.shapes import Array, Bool, DTypeLike, Float, Int


class FeatureNodes(NamedTuple):
    """One prompt's active features by covered layer: what they read, and their values. Lists are padded."""

    valid: Bool[Array, "C n"]  # False: padding
    positions: Int[Array, "C n"]
    features: Int[Array, "C n"]
    activations: Float[Array, "C n"]
    slots: Int[Array, "C n"]  # each feature's slot, numbered through the tiles of all groups
    encoders: Float[Array, "C n D"]
    biases: Float[Array, "C n"]


class SourceWrites(NamedTuple):
    """What one prompt's source nodes write."""

    tiles: Float[Array, "C K D S"]  # to each covered layer, activation times decoder row
    tile_positions: Int[Array, "C K"]
    errors: Float[Array, "L T D"]


class Layout(NamedTuple):
    """The sizes of a batch's arrays of nodes, which programs are compiled for."""

    layers: tuple[int, ...]  # those with features: the coder's covered layers, C of them
    list_length: int  # of each layer's padded list of active features
    groups: int  # of tiles: one for each covered layer, or one for all
    tiles: int  # of a group
    tile_size: int  # slots of a tile


LARGEST_TILE = 64
"""Slots of a tile: enough for an efficient product, few enough that few of them stay empty."""
SMALLEST_TILE = 8
"""Where each layer has tiles of its own, tiles may be smaller, as there are fewer features to fill one."""


def count_groups(config: CoderConfig) -> int:
    indices = range(len(config.covered))
    return len(config.covered) if all(config.reach(index) == 1 for index in indices) else 1


def choose_tile_size(counts: Int[np.ndarray, "B C T"], groups: int) -> int:
    if groups == 1:
        return LARGEST_TILE
    mean = int(np.ceil(counts.sum() / max(np.count_nonzero(counts), 1)))
    return min(max(1 << max(mean - 1, 0).bit_length(), SMALLEST_TILE), LARGEST_TILE)


def count_tiles(counts: Int[np.ndarray, "B C T"], groups: int, tile_size: int) -> Int[np.ndarray, "T"]:
    """For each position, how many tiles a group needs for the features up to and at it."""
    in_group = counts if groups > 1 else counts.sum(axis=1, keepdims=True)
    return np.cumsum(-(-in_group // tile_size), axis=2).max(axis=(0, 1))


@partial(jax.jit, static_argnames=("layout",))
@jax.named_scope("gather_sources")
def gather_sources(coder: Coder, true_pass: TruePass, layout: Layout) -> tuple[FeatureNodes, SourceWrites]:
    """The nodes of a batch of prompts, and what they write."""
    assert true_pass.activations is not None and true_pass.unexplained is not None
    gather = jax.vmap(partial(_gather_prompt, coder, layout))
    return gather(true_pass.activations, true_pass.counts, true_pass.unexplained)


def _gather_prompt(
    coder: Coder, layout: Layout, activations: Array, counts: Array, unexplained: Array
) -> tuple[FeatureNodes, SourceWrites]:
    first_slots, tile_ends = _place_in_tiles(layout, counts)
    nodes = _list_nodes(coder, layout, activations, counts, first_slots, unexplained.dtype)
    find_positions = jax.vmap(lambda ends: jnp.searchsorted(ends, jnp.arange(layout.tiles), side="right"))
    positions = jnp.minimum(find_positions(tile_ends), counts.shape[1] - 1)  # tiles beyond the last write nothing
    tiles, explained = _gather_writes(coder, layout, nodes, positions, unexplained)
    tile_positions = jnp.broadcast_to(positions, (len(layout.layers), layout.tiles))
    return nodes, SourceWrites(tiles, tile_positions, unexplained - explained)


def _place_in_tiles(layout: Layout, counts: Int[Array, "C T"]) -> tuple[Int[Array, "C T"], Int[Array, "G T"]]:
    """The slot of each layer's first active feature at each position; and by group, how many tiles end there."""
    if layout.groups > 1:
        in_group, below = counts, jnp.zeros_like(counts)
    else:
        in_group = counts.sum(axis=0, keepdims=True)
        below = jnp.cumsum(counts, axis=0) - counts  # active features of lower layers at the same position
    position_tiles = -(-in_group // layout.tile_size)
    tile_ends = jnp.cumsum(position_tiles, axis=1)
    first_tiles = tile_ends - position_tiles + layout.tiles * jnp.arange(layout.groups)[:, None]
    return below + layout.tile_size * first_tiles, tile_ends


def _list_nodes(
    coder: Coder,
    layout: Layout,
    activations: Float[Array, "C T F"],
    counts: Int[Array, "C T"],
    first_slots: Int[Array, "C T"],
    dtype: DTypeLike,
) -> FeatureNodes:
    length, features = layout.list_length, activations.shape[-1]
    earlier = jnp.cumsum(counts, axis=1) - counts  # active features of the same layer at earlier positions
    rank = jnp.arange(length)
    lists = []
    for index in range(len(layout.layers)):
        (flat,) = jnp.nonzero(activations[index].ravel(), size=length, fill_value=0)
        valid = rank < counts[index].sum()
        position, feature = flat // features, flat % features
        slot = first_slots[index, position] + rank - earlier[index, position]
        encoder, bias = coder.encoder(index)
        nodes = FeatureNodes(
            valid=valid,
            positions=position,
            features=feature,
            activations=jnp.where(valid, activations[index].ravel()[flat], 0),
            slots=jnp.where(valid, slot, layout.groups * layout.tiles * layout.tile_size),
            encoders=encoder[feature].astype(dtype),
            biases=bias[feature].astype(dtype),
        )
        lists.append(nodes)
    return jax.tree.map(lambda *x: jnp.stack(x), *lists)


def _gather_writes(
    coder: Coder, layout: Layout, nodes: FeatureNodes, positions: Int[Array, "G K"], unexplained: Float[Array, "L T D"]
) -> tuple[Float[Array, "C K D S"], Float[Array, "L T D"]]:
    """What the features of each tile write to each covered layer; and what all features write together."""
    covered, width, dtype = layout.layers, unexplained.shape[-1], unexplained.dtype
    groups, tiles, tile_size = layout.groups, layout.tiles, layout.tile_size
    # Nodes are numbered through all lists. An empty slot has the number after the last, and writes nothing.
    count = nodes.valid.size
    numbers = jnp.where(nodes.valid, jnp.arange(count).reshape(nodes.valid.shape), count)
    slot_nodes = jnp.full(groups * tiles * tile_size, count).at[nodes.slots].set(numbers, mode="drop")
    slot_nodes = slot_nodes.reshape(groups, -1)
    rows = [
        coder.decoder_rows(index)[nodes.features[index]].astype(dtype) * nodes.activations[index][:, None, None]
        for index in range(len(covered))
    ]
    tile_writes, explained = [], jnp.zeros_like(unexplained)
    for target, layer in enumerate(covered):
        if groups > 1:
            node_writes, node_numbers = rows[target][:, 0], slot_nodes[target] - target * layout.list_length
        else:
            from_layers = [
                rows[index][:, target - index]
                if target - index < coder.config.reach(index)
                else jnp.zeros((layout.list_length, width), dtype)
                for index in range(target + 1)
            ]
            node_writes, node_numbers = jnp.concatenate(from_layers), slot_nodes[0]
        slot_writes = node_writes.at[node_numbers].get(mode="fill", fill_value=0).reshape(tiles, tile_size, width)
        explained = explained.at[layer, positions[target if groups > 1 else 0]].add(slot_writes.sum(axis=1))
        tile_writes.append(slot_writes.swapaxes(1, 2))
    return jnp.stack(tile_writes), explained
