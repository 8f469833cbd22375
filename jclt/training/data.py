"""Token rows on disk, and the batch as a function of the step: resuming needs no loader state."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from jclt.errors import UserError
from jclt.models import Tokenizer


@dataclass(frozen=True)
class TokenRows:
    """Rows `[N, T]` of token ids, memory-mapped, with the weight that each token has in the loss."""

    tokens: np.ndarray
    weights: np.ndarray

    def indices(self, seed: int, step: int, batch: int) -> np.ndarray:
        """Which rows make up the batch of this step: every epoch is a permutation of its own."""
        count = len(self.tokens)
        epoch, place = np.divmod(np.arange(step * batch, (step + 1) * batch), count)
        return np.concatenate([_permutation(seed, int(e), count)[place[epoch == e]] for e in np.unique(epoch)])


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def save_rows(folder: Path, tokens: np.ndarray, weights: np.ndarray) -> TokenRows:
    """Writes rows so that a folder with `tokens.npy` is always complete, and maps them back."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (("weights", weights), ("tokens", tokens)):
        beside = folder / f"{name}.partial.npy"
        np.save(beside, array)
        beside.rename(folder / f"{name}.npy")
    return load_rows(folder)


def load_rows(folder: Path) -> TokenRows:
    return TokenRows(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "weights")))


def text_rows(path: Path, tokenizer: Tokenizer, length: int, end: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Text or JSON lines (their `text`) as packed rows: documents follow one another, each with its end, and every
    token counts alike."""
    ids = np.concatenate([np.asarray([*tokenizer.encode(text), *end], np.int32) for text in _documents(path)])
    rows = len(ids) // length
    if rows == 0:
        raise UserError(f"{path}: {len(ids)} tokens, expected at least {length} (one row)")
    tokens = ids[: rows * length].reshape(rows, length)
    return tokens, np.ones(tokens.shape, np.float16)


def _documents(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"data '{path}': not found, expected 'world', a text file or JSON lines")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if not text.strip():
        raise UserError(f"{path}: empty, expected text")
    if path.suffix != ".jsonl":
        return [text]
    # Not splitlines, which also splits at signs that JSON allows within a string.
    return [_text(line, f"{path}:{n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]


def _text(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise UserError(f"{where}: expected a JSON object with 'text'")
    return text
