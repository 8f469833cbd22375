"""Tiles: where each feature's writes lie in the arrays that gradients are multiplied with.

All slots of a tile belong to one position, so that one matrix product serves the tile, however unevenly features are
spread over positions.

Where features also write to later layers, the features of all layers share a position's tiles (one group of tiles). At
each position features are sorted by layer. The tiles of all positions are sorted, too, by the lowest layer of their
features. So the tiles with features that write to a layer are the first ones, and only these are kept for this layer:
over all layers about half of them where positions have many tiles.
Where each feature writes to its own layer alone, every layer has tiles of its own (a group for each layer).
"""

from typing import NamedTuple

import numpy as np

from jclt.coders import CoderConfig
from jclt.shapes import Int

LARGEST_TILE = {"cpu": 64, "gpu": 64, "tpu": 128}
"""Slots of a tile: enough for an efficient product, few enough that few of them stay empty. A TPU multiplies 128 at a
time."""
SMALLEST_TILE = 8
"""Where each layer has tiles of its own, tiles may be smaller, as there are fewer features to fill one."""
TILES_AT_ONCE = {"cpu": 1, "gpu": 32, "tpu": 1}
"""Tiles that are multiplied together, or skipped together where a block of targets does not need them. Multiplying
several needs a copy of the gradients at their positions; on a TPU the copy takes longer than the products."""
TARGET_TILE = 16
"""Slots of a tile of targets, all of one layer and position."""
NO_LAYER = 2**30
"""The layer of tiles without features."""


class Layout(NamedTuple):
    """The sizes of a batch's arrays of nodes, which programs are compiled for."""

    layers: tuple[int, ...]  # those with features: the coder's covered layers, C of them
    list_length: int  # of each layer's padded list of active features
    groups: int  # of tiles: one for each covered layer, or one for all
    tiles: int  # of a group
    kept_tiles: int  # for each layer those that write to it, of all layers together
    tile_size: int  # slots of a tile
    at_position: int  # the largest number of tiles of a group at one position
    tiles_at_once: int  # that are multiplied together, or skipped together


class TilePlan(NamedTuple):
    """Where the tiles of a batch of prompts are."""

    starts: Int[np.ndarray, "B C"]  # the first kept tile of each covered layer
    numbers: Int[np.ndarray, "B G T J"]  # of the tiles at each position, in order
    positions: Int[np.ndarray, "B G K"]
    layers: Int[np.ndarray, "B G K"]  # the lowest layer with a feature in each tile


def count_groups(config: CoderConfig) -> int:
    indices = range(len(config.covered))
    return len(config.covered) if all(config.reach(index) == 1 for index in indices) else 1


def choose_tile_size(counts: Int[np.ndarray, "B C T"], groups: int, backend: str) -> int:
    if groups == 1:
        return LARGEST_TILE[backend]
    mean = int(np.ceil(counts.sum() / max(np.count_nonzero(counts), 1)))
    return min(max(1 << max(mean - 1, 0).bit_length(), SMALLEST_TILE), LARGEST_TILE[backend])


def count_tiles(counts: Int[np.ndarray, "B C T"], groups: int, tile_size: int) -> Int[np.ndarray, "B C T"]:
    """The number of tiles at each position that write to each covered layer, the first ones of a group. To the last
    layer all tiles of a single group write."""
    features = counts if groups > 1 else np.cumsum(counts, axis=1)
    return -(-features // tile_size)


def count_kept_tiles(tiles: Int[np.ndarray, "B C T"], at_once: int) -> Int[np.ndarray, "B C"]:
    """The number of tiles that are kept for each covered layer: those that write to it, rounded up so that no tiles of
    two layers are multiplied together. The rest is 0."""
    return at_once * -(-tiles.sum(axis=2) // at_once)


def plan_tiles(counts: Int[np.ndarray, "B C T"], layout: Layout) -> TilePlan:
    """The place of each tile for so many active features."""
    tiles = count_tiles(counts, layout.groups, layout.tile_size)
    writes = np.arange(layout.at_position)[:, None] < tiles[:, :, None]  # [B, C, J, T]
    covered, last = np.array(layout.layers), len(layout.layers) - 1
    if layout.groups > 1:
        exists, lowest = writes, np.broadcast_to(covered[None, :, None, None], writes.shape)
    else:
        exists, lowest = writes[:, last:], covered[np.minimum((~writes).sum(axis=1, keepdims=True), last)]
    lowest_or_none = np.where(exists, lowest, NO_LAYER).reshape(*exists.shape[:2], -1)
    order = np.argsort(lowest_or_none, axis=2, kind="stable")
    numbers = np.argsort(order, axis=2).reshape(exists.shape)  # the inverse: each tile's place in the order
    batch, group, ordinal, position = np.nonzero(exists)
    places = batch, group, numbers[batch, group, ordinal, position]
    positions = np.zeros((*exists.shape[:2], layout.tiles), int)
    layers = np.full(positions.shape, NO_LAYER)
    positions[places], layers[places] = position, lowest[batch, group, ordinal, position]
    kept = count_kept_tiles(tiles, layout.tiles_at_once)
    return TilePlan(np.cumsum(kept, axis=1) - kept, numbers.swapaxes(2, 3), positions, layers)


def place_targets(
    layers: Int[np.ndarray, "n"], positions: Int[np.ndarray, "n"]
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """Tile and slot of each target, sorted by layer and position. Tiles are numbered within each layer."""
    places, first, inverse, counts = np.unique(
        np.stack([layers, positions]), axis=1, return_index=True, return_inverse=True, return_counts=True
    )
    tiles = -(-counts // TARGET_TILE)
    before = np.cumsum(tiles) - tiles
    first_of_layer = before[np.searchsorted(places[0], places[0])]
    ordinals = np.arange(len(layers)) - first[inverse.ravel()]
    return (before - first_of_layer)[inverse.ravel()] + ordinals // TARGET_TILE, ordinals % TARGET_TILE
