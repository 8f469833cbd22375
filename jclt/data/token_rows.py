"""Rows of token ids, in memory or mapped from disk, and which of them are for training and which for evaluation."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jclt.array_files import map_array
from jclt.errors import UserError
from jclt.files import create_file

HELD_OUT = 32
"""The last rows of the data: the evaluations during a coder's training use them, and training never does."""


RESERVED_SHARE, RESERVED_MOST = 16, 1 << 18
"""The last 1/16 of the tokens of a folder or text, and at most 2^18 tokens, is reserved for `jclt eval`."""


@dataclass(frozen=True)
class PackedRows:
    """Shards of tokens, memory-mapped, as one array of rows `[N, T]`; a row never crosses shards."""

    shards: Sequence[np.ndarray]  # each [rows, T]
    digest: str
    unreserved: int  # number of rows, from the first one on, without tokens reserved for `jclt eval`

    @property
    def shape(self) -> tuple[int, int]:
        return sum(len(shard) for shard in self.shards), self.shards[0].shape[1]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        ends = np.cumsum([len(shard) for shard in self.shards])
        shard_of_row = np.searchsorted(ends, index, side="right")
        rows = np.empty((len(index), self.shape[1]), self.shards[0].dtype)
        for n in np.unique(shard_of_row):
            in_shard = shard_of_row == n
            rows[in_shard] = self.shards[n][index[in_shard] - (ends[n] - len(self.shards[n]))]
        return rows


@dataclass(frozen=True)
class TokenRows:
    """Rows `[N, T]` of token ids, memory-mapped, and the weight of each token in the loss."""

    tokens: np.ndarray | PackedRows
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and weights of the rows with these numbers."""
        return self.tokens[index].astype(np.int32), self.weights[index].astype(np.float32)

    @property
    def digest(self) -> str:
        """A hash of the data, which a store of activations keeps to know what it was made from."""
        if isinstance(self.tokens, PackedRows):
            return self.tokens.digest
        return hashlib.sha256(self.tokens.tobytes()).hexdigest()


def count_reserved(tokens: int) -> int:
    """The number of tokens at the end of the data that are reserved for `jclt eval`, for rows of any length."""
    return min(tokens // RESERVED_SHARE, RESERVED_MOST)


def count_training_rows(rows: TokenRows, data: str) -> int:
    """The number of rows, from the first one on, that a coder is trained on.

    Training leaves out the last `HELD_OUT` rows and each row with a token that is reserved for `jclt eval`. So
    `jclt eval` measures on tokens that no training run on these data has seen. The small world has enough other rows,
    so nothing is reserved there.
    """
    count = len(rows) - HELD_OUT
    if data == "world":
        return count
    if isinstance(rows.tokens, PackedRows):
        return min(count, rows.tokens.unreserved)
    # Here the tokens after the last full row are not known. They would only move the border towards the end.
    return min(count, (rows.tokens.size - count_reserved(rows.tokens.size)) // rows.tokens.shape[1])


def count_unreserved(shards: Sequence[np.ndarray]) -> int:
    """The number of tokens before the reserved ones."""
    total = sum(map(len, shards))
    return total - count_reserved(total)


def cut_reserved_rows(shards: Sequence[np.ndarray], length: int) -> np.ndarray:
    """The reserved tokens as rows of this length."""
    border, rows = count_unreserved(shards), []
    for shard in shards:
        rows.append(cut_rows(shard[max(0, border) :], length))
        border -= len(shard)
    return np.concatenate(rows).astype(np.int32)


def cut_rows(tokens: np.ndarray, length: int) -> np.ndarray:
    """Tokens as rows `[N, T]`; tokens after the last full row are left out."""
    return tokens[: len(tokens) // length * length].reshape(-1, length)


def save_rows(folder: Path, tokens: np.ndarray, weights: np.ndarray) -> TokenRows:
    """Writes rows to a folder and maps them. `tokens.npy` is written last, so a folder that has it is complete."""
    for name, array in (("weights", weights), ("tokens", tokens)):
        with create_file(folder / f"{name}.npy") as partial, partial.open("wb") as file:
            np.save(file, array)
    return load_rows(folder)


def load_rows(folder: Path) -> TokenRows:
    """The rows that `save_rows` wrote."""
    tokens, weights = (map_array(folder / f"{name}.npy", "a run's rows [N, T]") for name in ("tokens", "weights"))
    if tokens.ndim != 2 or tokens.shape != weights.shape:
        raise UserError(f"{folder}: tokens of shape {tokens.shape} and weights of {weights.shape}, expected [N, T]")
    return TokenRows(tokens, weights)
