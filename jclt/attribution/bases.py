"""The basis of a graph (step 2, gather sources): which nodes a prompt has, and what each of them reads and writes.

A basis lists the nodes of a prompt and gives for each

- what it reads: a vector at a layer and position. The vector times the value there, plus a bias, is the node's value;
- what it writes: a vector into the MLP output of one or several layers, at its position;
- its value.

`FeatureNodes` holds what nodes read and their values, `SourceWrites` what they write, and `Layout` the sizes of both.
Edges, ranking and graphs (`edges.py`, `ranking.py`, `schedule.py`) know nothing else of the coder: not how many
features it has, nor where its weights are stored.

There is one basis today: the active features of a coder (`active.py`), with the coder's error at each layer and
position as a source beside them. (Embeddings are sources of every graph: `embeddings.py`.) Another basis is another
function that fills the same arrays.

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

from jclt.coders import CoderConfig
from jclt.shapes import Array, Bool, Float, Int


class FeatureNodes(NamedTuple):
    """One prompt's active features by covered layer: what they read, and their values. Lists are padded."""

    valid: Bool[Array, "C n"]  # False: padding
    positions: Int[Array, "C n"]
    features: Int[Array, "C n"]
    activations: Float[Array, "C n"]
    encoders: Float[Array, "C n D"]
    biases: Float[Array, "C n"]
    decoders: tuple[Float[Array, "n R D"], ...]  # by covered layer, what each writes: activation times decoder row


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
def gather_sources(
    layout: Layout, nodes: FeatureNodes, counts: Int[Array, "B C T"], unexplained: Float[Array, "B L T D"]
) -> tuple[Int[Array, "B C n"], SourceWrites]:
    """What the nodes of a batch of prompts write; and each feature's slot, numbered through the tiles of all groups."""
    return jax.vmap(partial(_gather_prompt, layout))(nodes, counts, unexplained)


def _gather_prompt(
    layout: Layout, nodes: FeatureNodes, counts: Array, unexplained: Array
) -> tuple[Int[Array, "C n"], SourceWrites]:
    first_slots, tile_ends = _place_in_tiles(layout, counts)
    earlier = jnp.cumsum(counts, axis=1) - counts  # active features of the same layer at earlier positions
    layers = jnp.arange(len(layout.layers))[:, None]
    ranks = jnp.arange(layout.list_length)[None] - earlier[layers, nodes.positions]
    empty = layout.groups * layout.tiles * layout.tile_size
    slots = jnp.where(nodes.valid, first_slots[layers, nodes.positions] + ranks, empty)
    find_positions = jax.vmap(lambda ends: jnp.searchsorted(ends, jnp.arange(layout.tiles), side="right"))
    positions = jnp.minimum(find_positions(tile_ends), counts.shape[1] - 1)  # tiles beyond the last write nothing
    tiles, explained = _gather_writes(layout, nodes, slots, positions, unexplained)
    tile_positions = jnp.broadcast_to(positions, (len(layout.layers), layout.tiles))
    return slots, SourceWrites(tiles, tile_positions, unexplained - explained)


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


def _gather_writes(
    layout: Layout,
    nodes: FeatureNodes,
    slots: Int[Array, "C n"],
    positions: Int[Array, "G K"],
    unexplained: Float[Array, "L T D"],
) -> tuple[Float[Array, "C K D S"], Float[Array, "L T D"]]:
    """What the features of each tile write to each covered layer; and what all features write together."""
    covered, width, dtype = layout.layers, unexplained.shape[-1], unexplained.dtype
    groups, tiles, tile_size = layout.groups, layout.tiles, layout.tile_size
    # Nodes are numbered through all lists. An empty slot has the number after the last, and writes nothing.
    count = nodes.valid.size
    numbers = jnp.where(nodes.valid, jnp.arange(count).reshape(nodes.valid.shape), count)
    slot_nodes = jnp.full(groups * tiles * tile_size, count).at[slots].set(numbers, mode="drop")
    slot_nodes = slot_nodes.reshape(groups, -1)
    tile_writes, explained = [], jnp.zeros_like(unexplained)
    for target, layer in enumerate(covered):
        if groups > 1:
            node_writes, node_numbers = nodes.decoders[target][:, 0], slot_nodes[target] - target * layout.list_length
        else:
            from_layers = [
                nodes.decoders[index][:, target - index]
                if target - index < nodes.decoders[index].shape[1]
                else jnp.zeros((layout.list_length, width), dtype)
                for index in range(target + 1)
            ]
            node_writes, node_numbers = jnp.concatenate(from_layers), slot_nodes[0]
        slot_writes = node_writes.at[node_numbers].get(mode="fill", fill_value=0).reshape(tiles, tile_size, width)
        explained = explained.at[layer, positions[target if groups > 1 else 0]].add(slot_writes.sum(axis=1))
        tile_writes.append(slot_writes.swapaxes(1, 2))
    return jnp.stack(tile_writes), explained
