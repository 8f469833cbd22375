"""What a graph explains: the likeliest next tokens, or tokens, differences and directions of the user's choice."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jclt.errors import UserError
from jclt.fingerprints import digest
from jclt.models import Model, ops
from jclt.shapes import Array, ArrayLike, Float, Int, Params

MOST_LOGITS, LOGIT_MASS = 10, 0.95
"""Circuit Tracing (2025): the smallest set of tokens that has this probability, but at most so many."""


@dataclass(frozen=True, eq=False)
class Direction:
    """The value of `vector` times what is read at a position: by the coder in a layer, or by the unembedding."""

    vector: Float[ArrayLike, "D"]
    layer: int | None = None  # None: what the unembedding reads
    position: int = -1
    name: str = "direction"

    def summary(self) -> dict[str, Any]:
        """For a graph's file: the vector by a digest."""
        vector = digest(np.asarray(self.vector, np.float64).tolist())
        return {"direction": self.name, "layer": self.layer, "position": self.position, "vector": vector}


Token = int | str | np.integer
Target = Token | tuple[Token, Token] | Direction
"""A token, as text or id: its logit less the vocabulary's mean; two: the first one's logit less the second's."""


def as_targets(given: Any) -> list[Target] | None:
    """Targets in plain types, in a list: a single one may stand for itself."""
    if given is None:
        return None
    if isinstance(given, str | int | np.integer | Direction):
        given = [given]
    if not isinstance(given, Sequence | np.ndarray):
        raise UserError(f"targets: {given!r}, expected a list of tokens, pairs of tokens and directions")
    if not len(given):
        raise UserError("targets: none given, expected at least one, or None for the likeliest next tokens")
    return [_plain(target) for target in given]


def _plain(target: Any) -> Target:
    def token(x: Any) -> int | str | None:
        if isinstance(x, bool | np.bool_):
            return None
        return str(x) if isinstance(x, str) else int(x) if isinstance(x, int | np.integer) else None

    if isinstance(target, Direction):
        return target
    parts = [token(x) for x in target] if isinstance(target, tuple | list) else [token(target)]
    if len(parts) > 2 or not parts or None in parts or (isinstance(target, tuple | list) and len(parts) < 2):
        raise UserError(f"target {target!r}: expected a token (text or id), a pair of them, or a Direction")
    found: Any = tuple(parts) if len(parts) > 1 else parts[0]
    return found


def resolved(model: Model, targets: Sequence[Target]) -> list[int | tuple[int, int] | Direction]:
    """Tokens by their ids; an error where the same is asked for twice."""

    def resolve(target: Target) -> int | tuple[int, int] | Direction:
        if isinstance(target, Direction):
            return target
        if isinstance(target, tuple):
            return token_of(model, target[0]), token_of(model, target[1])
        return token_of(model, target)

    found, seen = [resolve(target) for target in targets], set[Any]()
    for target, own in zip(targets, found, strict=True):
        key = str(own.summary()) if isinstance(own, Direction) else own
        if key in seen:
            name = f"'{target.name}'" if isinstance(target, Direction) else repr(target)
            raise UserError(f"target {name}: given twice, expected different targets")
        seen.add(key)
    return found


class Unembedding(NamedTuple):
    """What logits are made with: a direction for each token, and their mean."""

    table: Float[Array, "V D"]
    mean: Float[np.ndarray, "D"]

    def rows(self, tokens: Sequence[int]) -> Float[np.ndarray, "n D"]:
        padded = np.zeros(-(-max(len(tokens), 1) // 16) * 16, np.int32)  # few shapes, few programs
        padded[: len(tokens)] = tokens
        return np.asarray(_rows(self.table, padded))[: len(tokens)]


def unembedding(model: Model, params: Params) -> Unembedding:
    table = params["token_embedding" if model.config.tied else "unembedding"]
    return Unembedding(table, np.asarray(_mean_row(table)))


@jax.jit
def _rows(table: Array, tokens: Array) -> Array:
    return table[tokens]


@jax.jit
def _mean_row(table: Array) -> Array:
    """Summed in pieces, as a long sum loses digits."""
    piece = 512
    padded = jnp.pad(table, ((0, -len(table) % piece), (0, 0))).astype(ops.wide(table.dtype))
    return padded.reshape(-1, piece, table.shape[1]).sum(axis=1).sum(axis=0) / len(table)


@dataclass(frozen=True)
class Outputs:
    """One prompt's outputs as arrays."""

    tokens: Int[np.ndarray, "k"]  # -1: no single token
    names: tuple[str, ...]
    layers: Int[np.ndarray, "k"]
    positions: Int[np.ndarray, "k"]
    vectors: Float[np.ndarray, "k D"]
    probabilities: Float[np.ndarray, "k"]  # the model's own; 0 for what is no single token
    weights: Float[np.ndarray, "k"]  # what each counts


def likeliest(logits: Float[np.ndarray, "V"]) -> list[int]:
    """The smallest set of tokens that together have `LOGIT_MASS`, the likeliest first."""
    probabilities = softmax(logits)
    order = np.argsort(-probabilities, kind="stable")[:MOST_LOGITS]
    enough = np.searchsorted(np.cumsum(probabilities[order]), LOGIT_MASS) + 1
    return [int(token) for token in order[:enough]]


def softmax(logits: Float[np.ndarray, "V"]) -> Float[np.ndarray, "V"]:
    raised = np.exp(logits.astype(np.float64) - logits.max())
    return raised / raised.sum()


def outputs(
    model: Model,
    unembedding: Unembedding,
    length: int,
    logits: Float[np.ndarray, "V"],
    targets: Sequence[Target] | None,
    renormalize: bool,
) -> Outputs:
    """Of a prompt of this length with these logits at its end; without targets, the likeliest next tokens."""
    wanted = likeliest(logits) if targets is None else resolved(model, targets)
    tokens = sorted({t for own in wanted if not isinstance(own, Direction) for t in np.atleast_1d(own).tolist()})
    rows = dict(zip(tokens, unembedding.rows(tokens), strict=True))
    last, end, chances = model.config.layers, length - 1, softmax(logits)
    found: list[tuple[int, str, int, int, np.ndarray, float, float]] = []
    for target in wanted:
        if isinstance(target, Direction):
            found.append((-1, target.name, *_place(model, length, target), 0.0, 1.0))
        elif isinstance(target, tuple):
            first, second = target
            name = f"{text_of(model, first)} - {text_of(model, second)}"
            found.append((-1, name, last, end, rows[first] - rows[second], 0.0, 1.0))
        else:
            chance = float(chances[target])
            found.append((target, text_of(model, target), last, end, rows[target] - unembedding.mean, chance, chance))
    ids, names, layers, positions, vectors, probabilities, counting = zip(*found, strict=True)
    weights = np.asarray(counting, np.float64)
    if renormalize:
        weights = weights / weights.sum() if weights.any() else np.full(len(weights), 1 / len(weights))
    return Outputs(
        np.array(ids),
        tuple(names),
        np.array(layers),
        np.array(positions),
        np.stack(vectors).astype(unembedding.mean.dtype),
        np.asarray(probabilities, np.float64),
        weights,
    )


def _place(model: Model, length: int, target: Direction) -> tuple[int, int, np.ndarray]:
    """A direction's layer, position and vector."""
    last = model.config.layers
    vector, layer = np.asarray(target.vector), last if target.layer is None else target.layer
    if vector.shape != (model.config.width,):
        raise UserError(f"target '{target.name}': a vector of shape {vector.shape}, expected ({model.config.width},)")
    if not 0 <= layer <= last or not -length <= target.position < length:
        where = f"layer {target.layer}, position {target.position}"
        raise UserError(f"target '{target.name}': {where}, expected layers 0 to {last - 1}, {length} positions")
    if not np.isfinite(vector).all():
        raise UserError(f"target '{target.name}': its vector is not finite, expected numbers")
    return layer, target.position % length, vector


def token_of(model: Model, token: Token) -> int:
    """The id of a token that the model knows."""
    if isinstance(token, str):
        if model.tokenizer is None:
            raise UserError(f"target '{token}': model {model.name} has no tokenizer, expected a token id")
        ids = model.tokenizer.plain(token)
        if len(ids) != 1:
            raise UserError(f"target '{token}': {len(ids)} tokens of model {model.name}, expected exactly one")
        if model.tokenizer.text(ids[0]).strip() != token.strip():
            raise UserError(f"target '{token}': no token of model {model.name}, expected one, with its leading space")
        return ids[0]
    if not 0 <= token < model.config.vocabulary:
        raise UserError(f"target {token}: expected a token id from 0 to {model.config.vocabulary - 1}")
    return int(token)


def text_of(model: Model, token: int) -> str:
    return str(token) if model.tokenizer is None else model.tokenizer.text(token)
