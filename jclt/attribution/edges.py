"""Edges: for each target the derivative of what it reads with respect to everything that was written before it.

Targets go down the layers in blocks, each joining at the layer where it reads; `jax.vjp` of one layer of the linear
model carries their gradients from its output to its input. At each layer the gradient of what is written there, times
what each source writes there, is the sources' share. No target needs layers above its own, nor positions after its own.

Embeddings are followed the other way, from each one up through the linear model to every target, since prompts have
fewer tokens than targets; the gradients need then never go through the first layer's attention.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jclt.attribution.local import (
    Held,
    Reads,
    Through,
    final_read,
    linear,
    of_layers,
    propagate,
    stacked,
    through_layer,
    window,
)
from jclt.attribution.nodes import Active, Pass, Sources, groups_of
from jclt.coders import CoderConfig
from jclt.shapes import Array, Float, Int, Params


class Targets(NamedTuple):
    """What edges lead to: a direction at a place that is read."""

    layers: Int[Array, "R"]  # the number of layers: what the unembedding reads
    positions: Int[Array, "R"]
    vectors: Float[Array, "R D"]


class Edges(NamedTuple):
    """Of blocks of targets, up to the last position of their window."""

    features: Float[Array, "M G K R S"]  # by group of tiles
    errors: Float[Array, "M L R T"]


def trace_targets(
    through: Through,
    config: CoderConfig,
    start: int,
    stop: int,
    tiles: int,
    params: Params,
    held: Held,
    skips: Array | None,
    sources: Sources,
    joined: Int[Array, "levels"],
    targets: Targets,
) -> Edges:
    """Edges from the features of the first tiles and the errors from position `start` to before `stop`, where all
    targets stand.

    Targets come in blocks `[M, R]`, those of high layers first: so many blocks as `joined` says of a layer read there
    or above.
    """
    held, depth, covered = window(held, start, stop), through.model.layers, config.covered
    layers, errors = (stacked(through.model, params), of_layers(held), skips), sources.errors[:, start:stop]
    of_tiles, places, dtype = sources.features[:, :tiles], sources.places[:, :tiles] - start, sources.errors.dtype
    tile, groups = of_tiles.shape[-1], groups_of(config)
    index_of = jnp.asarray([covered.index(layer) if layer in covered else 0 for layer in range(depth)])
    is_covered = jnp.asarray([layer in covered for layer in range(depth)])
    nothing = jnp.zeros((stop - start, sources.errors.shape[-1]), dtype)

    def injected(block: Array, layer: Array | int) -> Float[Array, "R T D"]:
        """Each target's vector at its position, if it reads at this layer."""
        own = jax.tree.map(lambda x: x[block], targets)
        here = (
            jax.nn.one_hot(own.positions - start, stop - start, dtype=dtype)
            * (own.layers == layer).astype(dtype)[:, None]
        )
        return here[:, :, None] * own.vectors[:, None]

    def written(layer: Array | int) -> tuple[Array, Array, Array, Array]:
        """What sources write to a layer: of tiles, each tile's position, of errors; and the layer's group."""
        index = index_of[layer]
        return of_tiles[index], places[index], errors[layer], index if groups > 1 else jnp.zeros_like(index)

    def add_shares(
        edges: Edges, block: Array, layer: Array | int, write: Array, sources: tuple[Array, Array, Array, Array]
    ) -> Edges:
        features, where, errors, group = sources

        def product() -> Array:
            by_tile = jnp.moveaxis(write, 1, 0)[where]
            return jnp.einsum("krd,kds->krs", by_tile, features, precision="highest")

        if len(covered) == depth:
            of_features = product()
        else:
            of_features = jax.lax.cond(is_covered[layer], product, lambda: jnp.zeros((tiles, size, tile), dtype))
        of_errors = jnp.sum(write * errors[None], axis=-1)  # no einsum: it would be a product of matrices with one row
        return Edges(edges.features.at[block, group].add(of_features), edges.errors.at[block, layer].set(of_errors))

    def descend(step: Array, carry: tuple[Array, Edges]) -> tuple[Array, Edges]:
        layer = depth - 1 - step
        weights, own, skip = jax.tree.map(lambda x: x[layer], layers)
        writing = written(layer)
        _, back = jax.vjp(lambda x, write: through_layer(through, weights, own, x, write, skip), nothing, nothing)

        def one(block: Array, carry: tuple[Array, Edges]) -> tuple[Array, Edges]:
            streams, edges = carry
            stream, write = jax.vmap(back)((streams[block], injected(block, layer)))
            return streams.at[block].set(stream), add_shares(edges, block, layer, write, writing)

        return jax.lax.fori_loop(0, joined[layer], one, carry)

    def begin(block: Array, streams: Array) -> Array:
        _, to_stream = jax.vjp(lambda x: final_read(through.model, params, held, x), nothing)
        return streams.at[block].set(jax.vmap(to_stream)(injected(block, depth))[0])

    blocks, size = targets.positions.shape
    streams = jnp.zeros((blocks, size, *nothing.shape), dtype)
    streams = jax.lax.fori_loop(0, joined[depth], begin, streams)
    edges = Edges(
        jnp.zeros((blocks, groups, tiles, size, tile), dtype), jnp.zeros((blocks, depth, size, stop - start), dtype)
    )
    # Above the highest target there is nothing to do; below the first layer's MLP nothing is left but embeddings.
    highest = jnp.sum((joined[:depth] > 0).astype(jnp.int32))
    streams, edges = jax.lax.fori_loop(depth - highest, depth - 1, descend, (streams, edges))
    weights, own, skip = jax.tree.map(lambda x: x[0], layers)
    writing = written(0)
    _, back = jax.vjp(lambda write: through_layer(through, weights, own, nothing, write, skip)[0], nothing)

    def end(block: Array, edges: Edges) -> Edges:
        (write,) = jax.vmap(back)(streams[block])
        return add_shares(edges, block, 0, write, writing)

    edges = jax.lax.fori_loop(0, joined[1], end, edges)
    return edges._replace(errors=jnp.pad(edges.errors, ((0, 0), (0, 0), (0, 0), (start, 0))))


@partial(jax.jit, static_argnames=("through", "config", "start", "stop", "tiles"))
def trace_blocks(
    through: Through,
    config: CoderConfig,
    start: int,
    stop: int,
    tiles: int,
    params: Params,
    held: Held,
    skips: Array | None,
    sources: Sources,
    joined: Int[Array, "levels"],
    active: Active,
    others: Targets,
    chosen: Int[Array, "B M R"],
) -> Edges:
    """Blocks of each prompt's targets, chosen by number: the entries of the lists of `active`, then the `others`."""

    def one(held: Held, sources: Sources, active: Active, others: Targets, chosen: Array) -> Edges:
        targets = jax.tree.map(lambda x: x[chosen], all_targets(config.covered, active, others))
        return trace_targets(through, config, start, stop, tiles, params, held, skips, sources, joined, targets)

    return jax.vmap(one)(held, sources, active, others, chosen)


def all_targets(covered: tuple[int, ...], active: Active, others: Targets) -> Targets:
    """One prompt's targets in one list: its active features, layer by layer, then the others."""
    layers = jnp.repeat(jnp.asarray(covered), active.valid.shape[1])
    flat = active.encoders.reshape(-1, active.encoders.shape[-1])
    return Targets(
        jnp.concatenate([layers, others.layers]),
        jnp.concatenate([active.positions.ravel(), others.positions]),
        jnp.concatenate([flat, others.vectors]),
    )


class Fixed(NamedTuple):
    """What reaches the targets of one prompt, in the order of `all_targets`, other than from features and errors."""

    values: Float[Array, "N"]  # what each target adds up to, all in all
    bias: Float[Array, "N"]
    tokens: Float[Array, "N T"]
    positions: Float[Array, "N T"] | None


SOURCES_AT_ONCE = 16


@partial(jax.jit, static_argnames=("through", "covered", "positions_are_nodes", "at_once"))
def trace_embeddings(
    through: Through,
    covered: tuple[int, ...],
    positions_are_nodes: bool,
    at_once: int,
    params: Params,
    skips: Array | None,
    found: Pass,
    active: Active,
    others: Targets,
) -> Fixed:
    """Of a batch of prompts, so many embeddings at once. Position embeddings that are no nodes count as a bias."""

    def one(found: Pass, active: Active, others: Targets) -> Fixed:
        def at_targets(reads: Reads) -> Float[Array, "N"]:
            own = reads.layers[jnp.asarray(covered)[:, None], active.positions]
            other = jnp.concatenate([reads.layers, reads.final[None]])[others.layers, others.positions]
            to_features = jnp.einsum("cnd,cnd->cn", own, active.encoders, precision="highest")
            return jnp.concatenate(
                [to_features.ravel(), jnp.einsum("kd,kd->k", other, others.vectors, precision="highest")]
            )

        alone = linear(through, params, found.held, found.reads, skips)

        def from_each(embeddings: Float[Array, "T D"]) -> Float[Array, "N T"]:
            def from_one(place: Array) -> Array:
                here = jax.nn.one_hot(place, embeddings.shape[0], dtype=embeddings.dtype)
                return at_targets(alone(here[:, None] * embeddings))

            return jax.lax.map(from_one, jnp.arange(embeddings.shape[0]), batch_size=at_once).T

        own_bias = jnp.concatenate([active.biases.ravel(), jnp.zeros(len(others.layers), active.biases.dtype)])
        constant = jnp.zeros_like(found.tokens)
        if found.positions is not None and not positions_are_nodes:
            constant = found.positions
        biases = propagate(through, params, found.held, constant, found.constant, skips)
        return Fixed(
            at_targets(Reads(found.reads, found.final)) + own_bias,
            at_targets(biases) + own_bias,
            from_each(found.tokens),
            from_each(found.positions) if found.positions is not None and positions_are_nodes else None,
        )

    return jax.vmap(one)(found, active, others)
