"""The basis of a graph (step 2, gather sources): which nodes a prompt has, and what each of them reads and writes.

A basis lists the nodes of a prompt and gives for each

- what it reads: a vector at a layer and position. The vector times what is read there, plus a bias, is its
  pre-activation;
- what it writes: a vector into the MLP output of one or several layers, at its position;
- its activation.

`FeatureNodes` holds what nodes read, `SourceWrites` what they write, and `Layout` the sizes of both.
Edges, ranking and graphs (`edges.py`, `ranking.py`, `schedule.py`) know nothing else of the coder: not how many
features it has, nor where its weights are stored.

The basis is the active features of a coder (`active.py`), with the coder's error at each layer and position as a source
beside them. A model's neurons are a coder, too. Of a dense basis, and wherever it is asked for, some of the active
features are chosen first, by their score (`scores.py`); what the others write is part of the errors. (Embeddings are
sources of every graph: `embeddings.py`.) Another basis is another function that fills the same arrays.

Features are kept in two orders: `FeatureNodes` lists them by covered layer, position and feature, as a graph does, each
layer's list padded to the length of the longest. `SourceWrites` keeps what they write in tiles (`tiles.py`).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jclt.attribution.sweep.tiles import Layout, TilePlan
from jclt.coders import Coder
from jclt.kernels.take_rows import NO_ROW
from jclt.shapes import Array, Bool, Float, Int


class FeatureNodes(NamedTuple):
    """One prompt's active features by covered layer: what they read. Lists are padded."""

    valid: Bool[Array, "C n"]  # False: padding
    positions: Int[Array, "C n"]
    features: Int[Array, "C n"]
    activations: Float[Array, "C n"]
    encoders: Float[Array, "C n D"]
    biases: Float[Array, "C n"]


class SourceWrites(NamedTuple):
    """What the source nodes of one prompt write, of several with a leading axis."""

    tiles: Float[Array, "*B W S D"]  # W: those kept for each layer, layer by layer; activation times decoder row
    starts: Int[Array, "*B C"]  # the first kept tile of each covered layer
    tile_positions: Int[Array, "*B G K"]
    tile_layers: Int[Array, "*B G K"]  # the lowest layer with a feature in each tile
    errors: Float[Array, "*B L T D"]


MOST_REACHES = 3
"""Features of different layers write to different numbers of layers. These are rounded up to at most so many different
numbers, as a program is compiled for each."""


def gather_sources(
    coder: Coder,
    layout: Layout,
    plan: TilePlan,
    nodes: FeatureNodes,
    counts: Int[Array, "B C T"],
    unexplained: Float[Array, "B L T D"],
    by_prompt: NamedSharding,
) -> tuple[Int[Array, "B C n"], SourceWrites]:
    """What the nodes of a batch of prompts write; and each feature's slot, numbered through the tiles of all groups.

    The decoder rows of one layer at a time are read, and put in the tiles.
    """
    slots = find_slots(layout, plan, nodes, counts)
    shape = len(slots), layout.kept_tiles * layout.tile_size, unexplained.shape[-1]
    tiles, starts = jnp.zeros(shape, unexplained.dtype, device=by_prompt), jnp.asarray(plan.starts)
    features = np.where(nodes.valid, nodes.features, NO_ROW)
    step = -(-max(map(coder.config.reach, range(len(layout.layers)))) // MOST_REACHES)
    for index in range(len(layout.layers)):
        rows = jax.device_put(coder.take_decoder_rows(index, features[:, index]), by_prompt)
        rows = jnp.pad(rows, ((0, 0), (0, 0), (0, -rows.shape[2] % step), (0, 0)))  # few shapes, few programs
        tiles = put_rows(layout, tiles, starts, rows, nodes.activations, slots, np.array(index, slots.dtype))
    return slots, find_errors(layout, plan, tiles, unexplained)


@partial(jax.jit, static_argnames=("layout",))
@jax.named_scope("find_slots")
def find_slots(layout: Layout, plan: TilePlan, nodes: FeatureNodes, counts: Int[Array, "B C T"]) -> Int[Array, "B C n"]:
    def find(tile_numbers: Int[Array, "G T J"], nodes: FeatureNodes, counts: Int[Array, "C T"]) -> Int[Array, "C n"]:
        layers, positions, size = jnp.arange(len(layout.layers))[:, None], nodes.positions, layout.tile_size
        earlier = jnp.cumsum(counts, axis=1) - counts  # active features of the same layer at earlier positions
        # In the tiles of a position, features of lower layers come first.
        below = jnp.zeros_like(counts) if layout.groups > 1 else jnp.cumsum(counts, axis=0) - counts
        ordinals = (below - earlier)[layers, positions] + jnp.arange(layout.list_length)[None]
        groups = layers if layout.groups > 1 else jnp.zeros_like(layers)
        tiles = groups * layout.tiles + tile_numbers[groups, positions, ordinals // size]
        return jnp.where(nodes.valid, tiles * size + ordinals % size, layout.groups * layout.tiles * size)

    return jax.vmap(find)(jnp.asarray(plan.numbers), nodes, counts)


@partial(jax.jit, static_argnames=("layout",), donate_argnames=("tiles",))
@jax.named_scope("gather_sources")
def put_rows(
    layout: Layout,
    tiles: Float[Array, "B Q D"],  # Q: the slots of all kept tiles
    starts: Int[Array, "B C"],
    rows: Float[Array, "B n R D"],
    activations: Float[Array, "B C n"],
    slots: Int[Array, "B C n"],
    index: Int[Array, ""],
) -> Float[Array, "B Q D"]:
    """Puts in the tiles what the features of one covered layer write to it and to the next ones. A padded feature has a
    slot after the last one, and a padded row a layer after the last one; both are left out."""

    def put(tiles: Array, starts: Array, rows: Array, activations: Array, slots: Array) -> Float[Array, "Q D"]:
        writes = rows.astype(tiles.dtype) * activations[index][:, None, None]
        slot_in_group = slots[index] - (index * slots_of_group if layout.groups > 1 else 0)
        layers = index + jnp.arange(rows.shape[1], dtype=index.dtype)
        exists = (slot_in_group < slots_of_group)[:, None] & (layers < len(starts))[None]
        places = (starts[jnp.minimum(layers, len(starts) - 1)] * layout.tile_size)[None] + slot_in_group[:, None]
        return tiles.at[jnp.where(exists, places, len(tiles))].set(writes, mode="drop")

    slots_of_group = layout.tiles * layout.tile_size
    return jax.vmap(put)(tiles, starts, rows, activations, slots)


@partial(jax.jit, static_argnames=("layout",), donate_argnames=("tiles", "unexplained"))
@jax.named_scope("find_errors")
def find_errors(
    layout: Layout, plan: TilePlan, tiles: Float[Array, "B Q D"], unexplained: Float[Array, "B L T D"]
) -> SourceWrites:
    """The tiles, with what is left after all that their features write together."""

    def subtract(tiles: Float[Array, "W S D"], starts: Array, positions: Array, unexplained: Array) -> Array:
        return unexplained.at[locate_tiles(layout, starts, positions)].add(-tiles.sum(axis=1))

    starts, positions = jnp.asarray(plan.starts), jnp.asarray(plan.positions)
    tiles = tiles.reshape(len(tiles), layout.kept_tiles, layout.tile_size, -1)
    errors = jax.vmap(subtract)(tiles, starts, positions, unexplained)
    return SourceWrites(tiles, starts, positions, jnp.asarray(plan.layers), errors)


def locate_tiles(
    layout: Layout, starts: Int[Array, "C"], tile_positions: Int[Array, "G K"]
) -> tuple[Int[Array, "W"], Int[Array, "W"]]:
    """Layer and position of all kept tiles; of an empty one, any."""
    tiles = jnp.arange(layout.kept_tiles)
    index = jnp.searchsorted(starts, tiles, side="right") - 1
    number = jnp.minimum(tiles - starts[index], layout.tiles - 1)
    return jnp.asarray(layout.layers)[index], tile_positions[index if layout.groups > 1 else 0, number]
