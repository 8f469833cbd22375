"""What the weights alone say of a feature: the logits that it moves, the layers it writes to, features like it."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jclt.coders import Coder
from jclt.features.columns import Sizes
from jclt.mesh import find_place, mesh_of, replicate, use_mesh
from jclt.models import Model, ModelConfig
from jclt.models.model import on_mesh
from jclt.models.ops import center
from jclt.numerics import einsum
from jclt.shapes import Array, Float, Int, Params

CHUNK_FEATURES = 1024
"""Features that are looked at together."""

Columns = dict[str, np.ndarray]


def describe_weights(model: Model, coder: Coder, layer: int, sizes: Sizes) -> Columns:
    """The columns that follow from the weights of one covered layer's features.

    The direct effect on logits is that of what a feature writes at activation 1, summed over its target layers, read by
    the final norm's gain and the unembedding; the mean over the vocabulary is taken off. No layer in between reacts,
    and the norm's denominator, which differs by token, is left out.
    """
    features, parts, written = coder.config.features, list[Columns](), list[np.ndarray]()
    for chunk, count in _iterate_chunks(features):
        found, sums = describe_effects(model, coder, layer, chunk, sizes.effects)
        parts.append({name: x[:count] for name, x in found.items()})
        written.append(sums[:count])
    columns = _join(parts)
    for name in ("raised", "lowered"):  # a vocabulary can be smaller than what is asked for
        more = ((0, 0), (0, sizes.effects - columns[f"{name}_ids"].shape[1]))
        columns[f"{name}_ids"] = np.pad(columns[f"{name}_ids"], more, constant_values=-1)
        columns[f"{name}_effects"] = np.pad(columns[f"{name}_effects"], more)
    encoder, neighbours = coder.load_encoder(layer), min(sizes.neighbours, features - 1)
    with use_mesh(find_place(encoder)[0]):
        rows = np.asarray(encoder.encoder(0)[0].astype(jnp.float32))
    columns |= _find_neighbours("encoder", rows, neighbours)
    return columns | _find_neighbours("decoder", np.concatenate(written), neighbours)


def describe_effects(
    model: Model, coder: Coder, layer: int, features: Int[np.ndarray, "n"], count: int
) -> tuple[Columns, Float[np.ndarray, "n D"]]:
    """Of these features of one covered layer, the tokens whose logits they raise and lower most and the norms of what
    they write by target layer; and what they write to all together."""
    with on_mesh(model):
        rows = coder.take_decoder_rows(layer, features)
        if mesh_of(rows) != model.mesh:
            rows = jax.device_put(rows, find_place(model.params)[1])
        sums, norms = sum_targets(rows, take_post_gains(model, coder, layer))
        found = rank_effects(model.config, model.params, sums, min(count, model.config.vocabulary))
    columns = {name: np.asarray(x) for name, x in found.items()}
    return columns | {"decoder_norms": np.asarray(norms)}, np.asarray(sums)


def _iterate_chunks(features: int) -> Iterator[tuple[Int[np.ndarray, "n"], int]]:
    """The numbers of the features of each chunk, all of one length, and how many of them are new."""
    size = min(CHUNK_FEATURES, features)
    for start in range(0, features, size):
        yield np.minimum(np.arange(start, start + size), features - 1).astype(np.int32), min(size, features - start)


def _join(parts: list[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def take_post_gains(model: Model, coder: Coder, layer: int) -> Float[Array, "R D"]:
    """By what a norm after the MLP multiplies what is written to each target layer: 1 where there is none, or where the
    coder writes after it."""
    config, targets = coder.config, coder.config.covered[layer : layer + coder.config.reach(layer)]
    shape = (len(targets), model.config.width)
    if config.writes != "mlp_raw_out" or not model.config.post_norms:
        return jnp.ones(shape, jnp.float32)
    gains = model.params["mlp_post_norm_gain"][np.asarray(targets)].astype(jnp.float32)
    return gains + jnp.float32(model.config.norm_offset)


@jax.jit
def sum_targets(
    rows: Float[Array, "n R D"], gains: Float[Array, "R D"]
) -> tuple[Float[Array, "n D"], Float[Array, "n R"]]:
    """What features write to all target layers together, and the norms by target layer."""
    rows = rows.astype(jnp.float32)
    return jnp.sum(rows * gains[None], axis=1), jnp.sqrt(jnp.sum(jnp.square(rows), axis=2))


@partial(jax.jit, static_argnames=("config", "count"))
def rank_effects(config: ModelConfig, params: Params, written: Float[Array, "n D"], count: int) -> dict[str, Array]:
    """The tokens whose logits these vectors raise and lower most."""
    directions = center(written) if config.norm == "layer" else written
    gain = replicate(params["final_norm_gain"]).astype(jnp.float32) + jnp.float32(config.norm_offset)
    table = replicate(params["token_embedding" if config.tied else "unembedding"]).astype(jnp.float32)
    effects = center(einsum("nd,vd->nv", directions * gain[None], table))
    (raised, raised_ids), (lowered, lowered_ids) = jax.lax.top_k(effects, count), jax.lax.top_k(-effects, count)
    return {
        "raised_ids": raised_ids,
        "raised_effects": raised,
        "lowered_ids": lowered_ids,
        "lowered_effects": -lowered,
    }


def _find_neighbours(name: str, rows: Float[np.ndarray, "F D"], count: int) -> Columns:
    """For each row the others with the largest cosine."""
    lengths = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-30))
    unit, parts = jnp.asarray(rows / lengths), list[Columns]()
    for chunk, new in _iterate_chunks(len(rows)):
        cosines, ids = rank_cosines(unit, jnp.asarray(chunk), count)
        parts.append({f"{name}_ids": np.asarray(ids)[:new], f"{name}_cosines": np.asarray(cosines)[:new]})
    return _join(parts)


@partial(jax.jit, static_argnames=("count",))
def rank_cosines(unit: Float[Array, "F D"], chosen: Int[Array, "n"], count: int) -> tuple[Array, Array]:
    """The largest products of the chosen rows with the other rows, and the numbers of these."""
    cosines = einsum("nd,fd->nf", unit[chosen], unit)
    itself = chosen[:, None] == jnp.arange(len(unit), dtype=chosen.dtype)[None]
    best, ids = jax.lax.top_k(jnp.where(itself, -jnp.inf, cosines), count)
    return best, ids
