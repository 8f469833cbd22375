"""What a graph's edges come from: on each prompt the active features and what they write, and the coder's errors.

The pass over the prompts finds how many features are active; then arrays of a size that holds them all are filled.
Features stand in two orders. In `Active`, by covered layer, position and feature, as a graph lists them, each layer's
list filled up to the longest. In `Sources`, in tiles: all slots of a tile belong to one position, so that one product
serves them, however unevenly positions are filled. Where features write to later layers too, those of all layers share
a position's tiles; where each writes to its own layer alone, every layer has tiles of its own, and nothing is kept of
what a feature does not write.
"""

from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jclt.attribution.local import Held, Through, held_sites
from jclt.coders import Coder, CoderConfig
from jclt.models import forward, ops
from jclt.shapes import Array, Bool, Float, Int, Params, Tokens

Tree = TypeVar("Tree")


class Pass(NamedTuple):
    """The true pass over prompts (each array has a leading batch axis), and what the coder makes of it."""

    logits: Float[Array, "V"]  # at the last position
    held: Held
    tokens: Float[Array, "T D"]  # token embeddings, as they enter the residual stream
    positions: Float[Array, "T D"] | None  # position embeddings, where the model learns them
    reads: Float[Array, "L T D"]
    final: Float[Array, "T D"]
    constant: Float[Array, "L T D"]  # what is written by no node: decoder biases
    counts: Int[Array, "C T"]  # active features
    activations: Float[Array, "C T F"] | None  # by covered layer; 0 where no feature is a node
    unexplained: Float[Array, "L T D"] | None  # what is left for features and errors: all but `constant` and skips

    def without_features(self) -> "Pass":
        """What is needed once the sources are gathered."""
        return self._replace(activations=None, unexplained=None)


def widened(tree: Tree) -> Tree:
    """Weights in at least float32: what half precision holds is exact there, and so are products with it."""

    def wide(x: Array) -> Array:
        return x.astype(ops.wide(x.dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(wide, tree)


@partial(jax.jit, static_argnames=("through", "silent"))
def run_pass(
    through: Through, params: Params, coder: Coder, tokens: Tokens, lengths: Int[Array, "B"], silent: int
) -> Pass:
    """Prompts are filled up behind to one length. What is written at the first `silent` positions is no node's."""
    model, covered = through.model, coder.config.covered
    held = held_sites(model)
    embeddings = ("token_embedding", *(("position_embedding",) if model.learned_positions else ()))
    capture = (*held, *embeddings, through.reads, through.writes, "resid_final")
    _, seen, _ = forward(model, params, tokens, capture=capture)
    reads, writes = seen[through.reads], seen[through.writes]
    last = jnp.take_along_axis(seen["resid_final"], lengths[:, None, None] - 1, axis=1)
    table = params["token_embedding" if model.tied else "unembedding"]
    logits = ops.soft_cap(ops.contract("btd,vd->btv", last, table), model.logit_softcap)[:, 0]

    place = jnp.arange(tokens.shape[1], dtype=lengths.dtype)
    is_node = (place[None] < lengths[:, None]) & (place[None] >= silent)
    wide = widened(coder)
    encoded = jnp.stack([wide.encode(index, reads[layer]) for index, layer in enumerate(covered)])
    activations = jnp.where(is_node[None, :, :, None], encoded, 0)
    biases = jnp.stack([wide.constant(index) for index in range(len(covered))])
    constant = jnp.zeros_like(writes).at[jnp.asarray(covered)].set(biases[:, None, None])
    linear = skipped(coder, reads)
    constant = jnp.where(is_node[None, :, :, None], constant, writes - linear)

    def prompts_first(x: Array) -> Array:
        return jnp.moveaxis(x, 1, 0)

    return Pass(
        logits=logits,
        held={name: seen[name] if name == "final_denominator" else prompts_first(seen[name]) for name in held},
        tokens=seen["token_embedding"],
        positions=seen.get("position_embedding"),
        reads=prompts_first(reads),
        final=seen["resid_final"],
        constant=prompts_first(constant),
        counts=prompts_first(jnp.sum(activations != 0, axis=-1)),
        activations=prompts_first(activations),
        unexplained=prompts_first(writes - linear - constant),
    )


def skips_of(coder: Coder, layers: int) -> Float[Array, "L D D"] | None:
    """Of each of the model's layers, if the coder has any."""
    own = [widened(skip) for index in range(len(coder.config.covered)) if (skip := coder.skip(index)) is not None]
    if not own:
        return None
    return jnp.zeros((layers, *own[0].shape), own[0].dtype).at[jnp.asarray(coder.config.covered)].set(jnp.stack(own))


def skipped(coder: Coder, reads: Float[Array, "L *N D"]) -> Float[Array, "L *N D"]:
    """What affine skips make of each layer's read."""
    skips = skips_of(coder, reads.shape[0])
    return jnp.zeros_like(reads) if skips is None else jnp.einsum("l...d,led->l...e", reads, skips, precision="highest")


class Active(NamedTuple):
    """One prompt's active features by covered layer; lists are filled up, and `valid` says with what."""

    valid: Bool[Array, "C n"]
    positions: Int[Array, "C n"]
    features: Int[Array, "C n"]
    activations: Float[Array, "C n"]
    slots: Int[Array, "C n"]  # each one's place in the tiles of all groups, one after the other
    encoders: Float[Array, "C n D"]  # what each reads
    biases: Float[Array, "C n"]


class Sources(NamedTuple):
    """What one prompt's nodes write."""

    features: Float[Array, "C K D S"]  # what the features of a tile write to each covered layer, activations included
    places: Int[Array, "C K"]  # each tile's position
    errors: Float[Array, "L T D"]


TILE = 64
"""Features of a tile: long enough for a product, short enough that few slots stay empty."""
LEAST_TILE = 8
"""Where each layer has tiles of its own they are shorter, as there are fewer features to fill one."""


class Layout(NamedTuple):
    """The sizes of a batch's arrays of features."""

    longest: int  # holds every layer's active features
    groups: int  # of tiles: one for each covered layer, or one for all
    tiles: int  # of a group
    tile: int  # features of a tile


def groups_of(config: CoderConfig) -> int:
    return len(config.covered) if all(config.reach(index) == 1 for index in range(len(config.covered))) else 1


def tile_of(counts: Int[np.ndarray, "B C T"], groups: int) -> int:
    """How many features a tile holds."""
    if groups == 1:
        return TILE
    mean = int(np.ceil(counts.sum() / max(np.count_nonzero(counts), 1)))
    return min(max(1 << max(mean - 1, 0).bit_length(), LEAST_TILE), TILE)


def tiles_before(counts: Int[np.ndarray, "B C T"], groups: int, tile: int) -> Int[np.ndarray, "T"]:
    """How many tiles of a group hold the features of all positions up to each."""
    own = counts if groups > 1 else counts.sum(axis=1, keepdims=True)
    return np.cumsum(-(-own // tile), axis=2).max(axis=(0, 1))


@partial(jax.jit, static_argnames=("layout",))
def gather_sources(coder: Coder, found: Pass, layout: Layout) -> tuple[Active, Sources]:
    """Of a batch of prompts."""
    assert found.activations is not None and found.unexplained is not None
    return jax.vmap(partial(_gather, coder, layout))(found.activations, found.counts, found.unexplained)


def _gather(
    coder: Coder, layout: Layout, activations: Array, counts: Array, unexplained: Array
) -> tuple[Active, Sources]:
    longest, groups, tiles, tile = layout
    covered = coder.config.covered
    length, width = activations.shape[1:]
    size, dtype = unexplained.shape[-1], unexplained.dtype
    if groups > 1:
        in_group, before = counts, jnp.zeros_like(counts)
    else:
        in_group = counts.sum(axis=0, keepdims=True)
        before = jnp.cumsum(counts, axis=0) - counts  # active features of lower layers at the same position
    own_tiles = -(-in_group // tile)
    group = jnp.arange(groups)[:, None]
    before = before + tile * (jnp.cumsum(own_tiles, axis=1) - own_tiles + tiles * group)
    starts = jnp.cumsum(counts, axis=1) - counts  # of the same layer at earlier positions
    layers, readings = [], []
    for index in range(len(covered)):
        (flat,) = jnp.nonzero(activations[index].ravel(), size=longest, fill_value=0)
        rank = jnp.arange(longest)
        valid = rank < counts[index].sum()
        position, feature = flat // width, flat % width
        encoder, bias = coder.reading(index)
        readings.append((encoder[feature].astype(dtype), bias[feature].astype(dtype)))
        slot = before[index, position] + rank - starts[index, position]
        value = jnp.where(valid, activations[index].ravel()[flat], 0)
        layers.append((valid, position, feature, value, jnp.where(valid, slot, groups * tiles * tile)))
    active = Active(
        *(jnp.stack(x) for x in zip(*layers, strict=True)), *(jnp.stack(x) for x in zip(*readings, strict=True))
    )

    # Which entry of the lists, one after the other, stands in each slot; the last, one past them, writes nothing.
    nothing = active.valid.size
    entries = jnp.where(active.valid, jnp.arange(nothing).reshape(active.valid.shape), nothing)
    table = jnp.full(groups * tiles * tile, nothing).at[active.slots].set(entries, mode="drop").reshape(groups, -1)
    ends = jnp.cumsum(own_tiles, axis=1)
    places = jax.vmap(lambda own: jnp.searchsorted(own, jnp.arange(tiles), side="right"))(ends)
    places = jnp.minimum(places, length - 1)  # the tiles beyond the last write nothing
    rows = [
        coder.rows(index)[active.features[index]].astype(dtype) * active.activations[index][:, None, None]
        for index in range(len(covered))
    ]
    written, explained = [], jnp.zeros_like(unexplained)
    for target, layer in enumerate(covered):
        if groups > 1:
            own, wanted = rows[target][:, 0], table[target] - target * longest
        else:
            reaching = [
                rows[index][:, target - index]
                if target - index < coder.config.reach(index)
                else jnp.zeros((longest, size), dtype)
                for index in range(target + 1)
            ]
            own, wanted = jnp.concatenate(reaching), table[0]
        tiled = own.at[wanted].get(mode="fill", fill_value=0).reshape(tiles, tile, size)
        explained = explained.at[layer, places[target if groups > 1 else 0]].add(tiled.sum(axis=1))
        written.append(tiled.swapaxes(1, 2))
    everywhere = jnp.broadcast_to(places, (len(covered), tiles))
    return active, Sources(jnp.stack(written), everywhere, unexplained - explained)
