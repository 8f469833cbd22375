"""What a graph explains, its outputs: the likeliest next tokens, or tokens, differences of two and directions that the
user chooses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jclt.errors import UserError
from jclt.fingerprints import hash_json
from jclt.models import Model
from jclt.models.transformer import look_up_rows
from jclt.numerics import at_least_float32
from jclt.shapes import Array, ArrayLike, Float, Int, Params

MOST_LOGITS, LOGIT_MASS = 10, 0.95
"""As in Circuit Tracing (2025): the smallest set of tokens with this probability together, but at most so many."""


@dataclass(frozen=True, eq=False)
class Direction:
    """A target with the value `vector` times what the coder reads in a layer, or what the unembedding reads, at a
    position."""

    vector: Float[ArrayLike, "D"]
    layer: int | None = None  # None: what the unembedding reads
    position: int = -1
    name: str = "direction"

    def summary(self) -> dict[str, Any]:
        """For a graph's file: a hash stands for the vector."""
        vector = hash_json(np.asarray(self.vector, np.float64).tolist())
        return {"direction": self.name, "layer": self.layer, "position": self.position, "vector": vector}


Token = int | str | np.integer
Target = Token | tuple[Token, Token] | Direction
"""A token as text or id: its logit minus the mean logit of the vocabulary. A pair: the first token's logit minus the
second's."""


def parse_targets(targets: Any) -> list[Target] | None:
    """Targets in plain types, in a list. A single target need not be in a list."""
    if targets is None:
        return None
    if isinstance(targets, str | int | np.integer | Direction):
        targets = [targets]
    if not isinstance(targets, Sequence | np.ndarray):
        raise UserError(f"targets: {targets!r}, expected a list of tokens, pairs of tokens and directions")
    if not len(targets):
        raise UserError("targets: none given, expected at least one, or None for the likeliest next tokens")
    return [_parse_target(target) for target in targets]


def _parse_target(target: Any) -> Target:
    def parse_token(x: Any) -> int | str | None:
        if isinstance(x, bool | np.bool_):
            return None
        return str(x) if isinstance(x, str) else int(x) if isinstance(x, int | np.integer) else None

    if isinstance(target, Direction):
        return target
    parts = [parse_token(x) for x in target] if isinstance(target, tuple | list) else [parse_token(target)]
    if len(parts) > 2 or not parts or None in parts or (isinstance(target, tuple | list) and len(parts) < 2):
        raise UserError(f"target {target!r}: expected a token (text or id), a pair of them, or a Direction")
    parsed: Any = tuple(parts) if len(parts) > 1 else parts[0]
    return parsed


def resolve_targets(model: Model, targets: Sequence[Target]) -> list[int | tuple[int, int] | Direction]:
    """Targets with tokens as ids; an error where two are the same."""

    def resolve(target: Target) -> int | tuple[int, int] | Direction:
        if isinstance(target, Direction):
            return target
        if isinstance(target, tuple):
            return find_token(model, target[0]), find_token(model, target[1])
        return find_token(model, target)

    resolved_targets, seen = [resolve(target) for target in targets], set[Any]()
    for target, resolved in zip(targets, resolved_targets, strict=True):
        key = str(resolved.summary()) if isinstance(resolved, Direction) else resolved
        if key in seen:
            name = f"'{target.name}'" if isinstance(target, Direction) else repr(target)
            raise UserError(f"target {name}: given twice, expected different targets")
        seen.add(key)
    return resolved_targets


class Unembedding(NamedTuple):
    """The unembedding matrix, one row for each token, and the mean of its rows."""

    table: Float[Array, "V D"]
    mean: Float[np.ndarray, "D"]

    def gather_rows(self, tokens: Sequence[int]) -> Float[np.ndarray, "n D"]:
        padded = np.zeros(-(-max(len(tokens), 1) // 16) * 16, np.int32)  # few shapes, few programs
        padded[: len(tokens)] = tokens
        return np.asarray(_gather_rows(self.table, padded))[: len(tokens)]


def make_unembedding(model: Model, params: Params) -> Unembedding:
    table = params["token_embedding" if model.config.tied else "unembedding"]
    return Unembedding(table, np.asarray(_average_rows(table)))


@jax.jit
def _gather_rows(table: Array, tokens: Array) -> Array:
    return look_up_rows(table, tokens[None])[0]


@jax.jit
def _average_rows(table: Array) -> Array:
    """The mean row. It is summed in pieces, as a long sum loses digits."""
    piece = 512
    padded = jnp.pad(table, ((0, -len(table) % piece), (0, 0))).astype(at_least_float32(table.dtype))
    return padded.reshape(-1, piece, table.shape[1]).sum(axis=1).sum(axis=0) / len(table)


@dataclass(frozen=True)
class Outputs:
    """The outputs of one prompt's graph as arrays."""

    tokens: Int[np.ndarray, "k"]  # -1: no single token
    names: tuple[str, ...]
    layers: Int[np.ndarray, "k"]
    positions: Int[np.ndarray, "k"]
    vectors: Float[np.ndarray, "k D"]
    probabilities: Float[np.ndarray, "k"]  # the model's; 0 for what is no single token
    weights: Float[np.ndarray, "k"]  # how much each counts for influence


class _Output(NamedTuple):
    token: int
    name: str
    layer: int
    position: int
    vector: np.ndarray
    probability: float = 0.0
    weight: float = 1.0


def choose_likeliest(logits: Float[np.ndarray, "V"], most: int = MOST_LOGITS, mass: float = LOGIT_MASS) -> list[int]:
    """The smallest set of tokens with a probability of `mass` together, the likeliest first; at most so many."""
    probabilities = softmax(logits)
    order = np.argsort(-probabilities, kind="stable")[:most]
    enough = np.searchsorted(np.cumsum(probabilities[order]), mass) + 1
    return [int(token) for token in order[:enough]]


def softmax(logits: Float[np.ndarray, "V"]) -> Float[np.ndarray, "V"]:
    raised = np.exp(logits.astype(np.float64) - logits.max())
    return raised / raised.sum()


def build_outputs(
    model: Model,
    unembedding: Unembedding,
    length: int,
    logits: Float[np.ndarray, "V"],
    targets: Sequence[Target] | None,
    renormalize: bool,
) -> Outputs:
    """The outputs of a prompt with this length and these last logits: its targets, or the likeliest next tokens. With
    `renormalize` their weights add up to 1."""
    resolved = choose_likeliest(logits) if targets is None else resolve_targets(model, targets)
    by_token = [target for target in resolved if not isinstance(target, Direction)]
    tokens = sorted({token for target in by_token for token in np.atleast_1d(target).tolist()})
    rows = dict(zip(tokens, unembedding.gather_rows(tokens), strict=True))
    last, end, probabilities = model.config.layers, length - 1, softmax(logits)
    outputs: list[_Output] = []
    for target in resolved:
        if isinstance(target, Direction):
            layer, position, vector = _locate(model, length, target)
            outputs.append(_Output(-1, target.name, layer, position, vector))
        elif isinstance(target, tuple):
            first, second = target
            name = f"{decode_token(model, first)} - {decode_token(model, second)}"
            outputs.append(_Output(-1, name, last, end, rows[first] - rows[second]))
        else:
            probability = float(probabilities[target])
            vector = rows[target] - unembedding.mean
            name = decode_token(model, target)
            outputs.append(_Output(target, name, last, end, vector, probability, weight=probability))
    weights = np.array([output.weight for output in outputs], np.float64)
    if renormalize:
        weights = weights / weights.sum() if weights.any() else np.full(len(weights), 1 / len(weights))
    return Outputs(
        tokens=np.array([output.token for output in outputs]),
        names=tuple(output.name for output in outputs),
        layers=np.array([output.layer for output in outputs]),
        positions=np.array([output.position for output in outputs]),
        vectors=np.stack([output.vector for output in outputs]).astype(unembedding.mean.dtype),
        probabilities=np.array([output.probability for output in outputs], np.float64),
        weights=weights,
    )


def _locate(model: Model, length: int, target: Direction) -> tuple[int, int, np.ndarray]:
    """A direction's layer, position and vector, checked."""
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


def find_token(model: Model, token: Token) -> int:
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


def decode_token(model: Model, token: int) -> str:
    return str(token) if model.tokenizer is None else model.tokenizer.text(token)
