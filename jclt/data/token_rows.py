"""Token rows on disk, and the batch as a function of the step: resuming needs no loader state."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jclt.array_files import map_array
from jclt.errors import UserError
from jclt.files import new_file

HELD_OUT = 32
"""Rows, the last of the data, that the evaluations during a coder's training read and its steps never see."""


RESERVED_SHARE, RESERVED_MOST = 16, 1 << 18
"""Of a folder of tokens or a text the last sixteenth, of at most so many tokens, is left to `jclt eval`."""


@dataclass(frozen=True)
class PackedRows:
    """Shards of tokens, memory-mapped, as one array of rows `[N, T]`; a row never crosses shards."""

    shards: Sequence[np.ndarray]  # each [rows, T]
    digest: str
    unreserved: int  # rows, the first ones, that lie before the tokens left to `jclt eval`

    @property
    def shape(self) -> tuple[int, int]:
        return sum(len(shard) for shard in self.shards), self.shards[0].shape[1]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        ends = np.cumsum([len(shard) for shard in self.shards])
        lies_in = np.searchsorted(ends, index, side="right")
        rows = np.empty((len(index), self.shape[1]), self.shards[0].dtype)
        for n in np.unique(lies_in):
            here = lies_in == n
            rows[here] = self.shards[n][index[here] - (ends[n] - len(self.shards[n]))]
        return rows


@dataclass(frozen=True)
class TokenRows:
    """Rows `[N, T]` of token ids, memory-mapped, with the weight that each token has in the loss."""

    tokens: np.ndarray | PackedRows
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and weights of these rows."""
        return self.tokens[index].astype(np.int32), self.weights[index].astype(np.float32)

    @property
    def digest(self) -> str:
        """What tells these data from others, for a store of activations made from them."""
        if isinstance(self.tokens, PackedRows):
            return self.tokens.digest
        return hashlib.sha256(self.tokens.tobytes()).hexdigest()


def reserved(tokens: int) -> int:
    """How many tokens at the end of the data are left to `jclt eval`, whatever the length of rows."""
    return min(tokens // RESERVED_SHARE, RESERVED_MOST)


def trained_rows(rows: TokenRows, data: str) -> int:
    """How many rows, the first ones, a coder is trained on.

    The last `HELD_OUT` are its own evaluations'. Nor is it trained on a row that reaches into the tokens left to
    `jclt eval`, which thus measures on none that any run on these data has seen; the small world has enough others.
    """
    count = len(rows) - HELD_OUT
    if data == "world":
        return count
    if isinstance(rows.tokens, PackedRows):
        return min(count, rows.tokens.unreserved)
    # The text's own end is not known any more, but tokens that fill no row only move the border on.
    return min(count, (rows.tokens.size - reserved(rows.tokens.size)) // rows.tokens.shape[1])


def unreserved_tokens(shards: Sequence[np.ndarray]) -> int:
    total = sum(map(len, shards))
    return total - reserved(total)


def reserved_rows(shards: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Of tokens one after another the rows of those that no coder is trained on."""
    border, rows = unreserved_tokens(shards), []
    for shard in shards:
        rows.append(in_rows(shard[max(0, border) :], length))
        border -= len(shard)
    return np.concatenate(rows).astype(np.int32)


def in_rows(tokens: np.ndarray, length: int) -> np.ndarray:
    """`[N, T]`; what fills no row is left out."""
    return tokens[: len(tokens) // length * length].reshape(-1, length)


def save_rows(folder: Path, tokens: np.ndarray, weights: np.ndarray) -> TokenRows:
    """Writes rows so that a folder with `tokens.npy` is always complete, and maps them back."""
    for name, array in (("weights", weights), ("tokens", tokens)):
        with new_file(folder / f"{name}.npy") as beside, beside.open("wb") as file:
            np.save(file, array)
    return load_rows(folder)


def load_rows(folder: Path) -> TokenRows:
    tokens, weights = (map_array(folder / f"{name}.npy", "a run's rows [N, T]") for name in ("tokens", "weights"))
    if tokens.ndim != 2 or tokens.shape != weights.shape:
        raise UserError(f"{folder}: tokens of shape {tokens.shape} and weights of {weights.shape}, expected [N, T]")
    return TokenRows(tokens, weights)
