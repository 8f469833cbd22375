"""The basis of a graph (step 2, gather sources): which nodes a prompt has, and what each of them reads and writes.

A basis lists the nodes of a prompt and gives for each

- what it reads: a vector at a layer and position. The vector times what is read there, plus a bias, is its
  pre-activation;
- what it writes: a vector into the MLP output of one or several layers, at its position;
- its activation.

`FeatureNodes` holds what nodes read and, until it is in tiles, what they write; `SourceWrites` holds the tiles, and
`Layout` the sizes of both.
Edges, ranking and graphs (`edges.py`, `ranking.py`, `schedule.py`) know nothing else of the coder: not how many
features it has, nor where its weights are stored.

There is one basis today: the active features of a coder (`active.py`), with the coder's error at each layer and
position as a source beside them. (Embeddings are sources of every graph: `embeddings.py`.) Another basis is another
function that fills the same arrays.

Features are kept in two orders: `FeatureNodes` lists them by covered layer, position and feature, as a graph does, each
layer's list padded to the length of the longest. `SourceWrites` keeps what they write in tiles (`tiles.py`).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jclt.attribution.tiles import Layout, TilePlan
from jclt.shapes import Array, Bool, Float, Int


class FeatureNodes(NamedTuple):
    """One prompt's active features by covered layer: what they read and write. Lists are padded."""

    valid: Bool[Array, "C n"]  # False: padding
    positions: Int[Array, "C n"]
    features: Int[Array, "C n"]
    activations: Float[Array, "C n"]
    encoders: Float[Array, "C n D"]
    biases: Float[Array, "C n"]
    decoders: tuple[Float[Array, "n R D"], ...]  # by covered layer, what each writes: activation times decoder row


class SourceWrites(NamedTuple):
    """What the source nodes of one prompt write, of several with a leading axis."""

    tiles: Float[Array, "*B C K S D"]  # to each covered layer, activation times decoder row
    tile_positions: Int[Array, "*B G K"]
    tile_layers: Int[Array, "*B G K"]  # the lowest layer with a feature in each tile
    errors: Float[Array, "*B L T D"]


@partial(jax.jit, static_argnames=("layout",))
@jax.named_scope("gather_sources")
def gather_sources(
    layout: Layout,
    plan: TilePlan,
    nodes: FeatureNodes,
    counts: Int[Array, "B C T"],
    unexplained: Float[Array, "B L T D"],
) -> tuple[Int[Array, "B C n"], SourceWrites]:
    """What the nodes of a batch of prompts write; and each feature's slot, numbered through the tiles of all groups."""
    return jax.vmap(partial(_gather_prompt, layout))(plan, nodes, counts, unexplained)


def _gather_prompt(
    layout: Layout, plan: TilePlan, nodes: FeatureNodes, counts: Array, unexplained: Array
) -> tuple[Int[Array, "C n"], SourceWrites]:
    slots = _find_slots(layout, jnp.asarray(plan.numbers), nodes, counts)
    tiles, explained = _gather_writes(layout, nodes, slots, jnp.asarray(plan.positions), unexplained)
    places = jnp.asarray(plan.positions), jnp.asarray(plan.layers)
    return slots, SourceWrites(tiles, *places, unexplained - explained)


def _find_slots(
    layout: Layout, tile_numbers: Int[Array, "G T J"], nodes: FeatureNodes, counts: Int[Array, "C T"]
) -> Int[Array, "C n"]:
    layers, positions, size = jnp.arange(len(layout.layers))[:, None], nodes.positions, layout.tile_size
    earlier = jnp.cumsum(counts, axis=1) - counts  # active features of the same layer at earlier positions
    # In the tiles of a position, features of lower layers come first.
    below = jnp.zeros_like(counts) if layout.groups > 1 else jnp.cumsum(counts, axis=0) - counts
    ordinals = (below - earlier)[layers, positions] + jnp.arange(layout.list_length)[None]
    groups = layers if layout.groups > 1 else jnp.zeros_like(layers)
    tiles = groups * layout.tiles + tile_numbers[groups, positions, ordinals // size]
    return jnp.where(nodes.valid, tiles * size + ordinals % size, layout.groups * layout.tiles * size)


def _gather_writes(
    layout: Layout,
    nodes: FeatureNodes,
    slots: Int[Array, "C n"],
    positions: Int[Array, "G K"],
    unexplained: Float[Array, "L T D"],
) -> tuple[Float[Array, "C K S D"], Float[Array, "L T D"]]:
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
        tile_writes.append(slot_writes)
    return jnp.stack(tile_writes), explained
