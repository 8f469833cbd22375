"""The rows of tokens on which features are described."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jclt.data.load_tokens import is_token_folder, load_tokens, read_text_rows
from jclt.data.token_rows import PackedRows
from jclt.errors import UserError
from jclt.models import Model, token_array
from jclt.shapes import Bool, Int
from jclt.world import make_corpus

WORLD_ROWS, LONGEST = 4096, 128
"""Rows of the small world, and tokens of a row, if nothing else is asked for."""
BLOCK_TOKENS = 1 << 16
"""About how many tokens are counted at once."""
COFIRING_TOKENS = 1 << 16
"""About how many tokens are looked at for features that fire together: on rows that are spread evenly over the data."""

Data = str | Path | np.ndarray | Sequence[Sequence[int]]


class DataRows(NamedTuple):
    """Some of the rows of the data, or all of them."""

    name: str
    tokens: "np.ndarray | PackedRows"  # [N, T]
    valid: Bool[np.ndarray, "N T"] | None  # where only some tokens count
    numbers: Int[np.ndarray, "n"]  # of the rows that are used
    digest: str

    @property
    def length(self) -> int:
        return self.tokens.shape[1]


class Block(NamedTuple):
    """Consecutive rows of the data, which are counted at once."""

    rows: Int[np.ndarray, "b"]  # their numbers in the data
    tokens: Int[np.ndarray, "b T"]
    valid: Bool[np.ndarray, "b T"]
    cofiring: Int[np.ndarray, "b"]  # for rows looked at for features that fire together, their number there; else -1


def find_rows(model: Model, data: Data, rows: int | None, length: int | None) -> DataRows:
    """All rows of the data, or so many of them, spread evenly."""
    if rows is not None and rows < 1:
        raise UserError(f"rows {rows}: expected at least 1")
    context = model.config.context
    if length is not None and not 2 <= length <= context:
        raise UserError(f"length {length}: expected 2 to {context}, the model's context")
    length = length or min(LONGEST, context)
    name, valid = "array", None
    if not isinstance(data, str | Path):
        tokens = token_array(model, data)
        if tokens.ndim != 2:
            raise UserError(f"data: {tokens.ndim} axes, expected rows of token ids [N, T]")
        digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    else:
        name = str(data)
        tokens, valid, digest = _read_rows(model, name, rows, length)
    count = len(tokens) if rows is None else min(rows, len(tokens))
    return DataRows(name, tokens, valid, np.arange(count) * len(tokens) // count, digest)


def _read_rows(
    model: Model, name: str, rows: int | None, length: int
) -> tuple["np.ndarray | PackedRows", np.ndarray | None, str]:
    """The tokens that `data` names, where they count, and their digest."""
    if is_token_folder(name):
        packed = load_tokens(name, length, model.config.vocabulary, model.tokenizer)
        return packed.tokens, None, packed.digest
    if model.tokenizer is None:
        raise UserError(f"model {model.name}: has no tokenizer, expected data made by `jclt tokenize`")
    if name == "world":
        corpus = make_corpus(rows or WORLD_ROWS, length, "features", model.tokenizer.backend.get_vocab())
        tokens, valid = corpus.tokens, np.cumsum(corpus.weights[:, ::-1], axis=1)[:, ::-1] > 0  # not the padding
    else:
        tokens, _ = read_text_rows(Path(name), model.tokenizer, length, model.config.stop_tokens[:1])
        valid = None
    return tokens, valid, hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).hexdigest()


def count_block_rows(length: int) -> int:
    return -(-BLOCK_TOKENS // length)


def count_tokens(data: DataRows, first_position: int) -> int:
    """How many tokens count."""
    if data.valid is None:
        return len(data.numbers) * (data.length - first_position)
    return int(data.valid[data.numbers, first_position:].sum())


def iterate_blocks(data: DataRows, first_position: int, start: int = 0) -> Iterator[Block]:
    """The blocks from number `start` on. Positions that the coder leaves to the model do not count."""
    size, count = count_block_rows(data.length), len(data.numbers)
    looked_at = min(count, -(-COFIRING_TOKENS // data.length))
    for number in range(start, -(-count // size)):
        place = np.arange(number * size, min((number + 1) * size, count))
        rows = data.numbers[place]
        valid = np.ones((len(rows), data.length), bool) if data.valid is None else data.valid[rows].copy()
        valid[:, :first_position] = False
        before, after = place * looked_at // count, (place + 1) * looked_at // count
        cofiring = np.where(after > before, before, -1)
        yield Block(rows, np.asarray(data.tokens[rows], np.int32), valid, cofiring)
