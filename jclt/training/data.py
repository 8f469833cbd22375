"""Token rows on disk, and the batch as a function of the step: resuming needs no loader state."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from jax.sharding import Sharding

from jclt.config import cache_folder
from jclt.errors import UserError
from jclt.models import Tokenizer
from jclt.shapes import Array
from jclt.training.documents import Input, file_system, pieces
from jclt.training.tokenize import FORMAT, MANIFEST, UNFINISHED, tokenizer_digest

ROUNDS = 6


@dataclass(frozen=True)
class PackedRows:
    """Shards of tokens, memory-mapped, as one array of rows `[N, T]`; a row never crosses shards."""

    shards: Sequence[np.ndarray]  # each [rows, T]
    digest: str

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


def batch_rows(count: int, seed: int, step: int, batch: int) -> np.ndarray:
    """Which of `count` rows make up the batch of this step: every epoch is a permutation of its own."""
    epoch, at = np.divmod(np.arange(step * batch, (step + 1) * batch), count)
    return np.concatenate([shuffled(at[epoch == e], count, (seed, int(e))) for e in np.unique(epoch)])


def shuffled(places: np.ndarray, count: int, key: Sequence[int]) -> np.ndarray:
    """Where the key's permutation of `count` numbers takes these; no table is made, so billions cost what ten do.

    A Feistel network permutes the numbers of an even number of bits; what it takes beyond `count` goes round again.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)
    found = places.astype(np.uint64)
    outside = np.ones(len(found), bool)
    while outside.any():
        left, right = found[outside] >> half, found[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & mask)
        found[outside] = (left << half) | right
        outside = found >= count
    return found.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """A hash of 64 bits to 64 bits (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def place(read: Callable[[np.ndarray], Any], index: np.ndarray, sharding: Sharding) -> Any:
    """The rows of these numbers as global arrays: each process reads those that lie on its own devices.

    `read` gives arrays (in any pytree) whose first axis is the rows asked for; the sharding holds for each of them.
    """
    kinds, structure = jax.tree.flatten(read(index[:0]))

    @cache  # several devices may hold the same rows, and every array asks for them
    def rows(start: int, stop: int) -> list[np.ndarray]:
        return jax.tree.leaves(read(index[start:stop]))

    def placed(n: int) -> Array:
        def part(where: tuple[slice, ...] | None) -> np.ndarray:
            first, *others = where or (slice(None),)
            start, stop, _ = first.indices(len(index))
            return rows(start, stop)[n][(slice(None), *others)]

        shape = (len(index), *kinds[n].shape[1:])
        return jax.make_array_from_callback(shape, sharding, part, dtype=kinds[n].dtype)

    return jax.tree.unflatten(structure, [placed(n) for n in range(len(kinds))])


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


def holds_tokens(data: str) -> bool:
    """Whether a setting names a folder of `jclt tokenize`, here or remote, rather than text."""
    return data != "world" and ("://" in data or Path(data).is_dir())


def load_tokens(
    url: str | Path, length: int, vocabulary: int | None = None, tokenizer: Tokenizer | None = None
) -> TokenRows:
    """The folder of `jclt tokenize`, here or remote, as rows of any length; every token counts alike.

    Given the vocabulary and the tokenizer of the model that is to read them, tokens of another are refused.
    """
    folder = local_tokens(url)
    manifest = json.loads((folder / MANIFEST).read_text())
    made_with = manifest["tokenizer"]
    if vocabulary is not None and made_with["vocabulary"] > vocabulary:
        raise UserError(f"data '{url}': {made_with['vocabulary']} token ids, expected at most {vocabulary} (the model)")
    if tokenizer is not None and tokenizer_digest(tokenizer) != made_with["digest"]:
        raise UserError(f"data '{url}': tokenised with {made_with['name']}, expected the model's own tokenizer")
    mapped = [_mapped(folder / shard["name"], shard["tokens"], manifest["dtype"]) for shard in manifest["shards"]]
    shards = [shard[: len(shard) // length * length].reshape(-1, length) for shard in mapped if len(shard) >= length]
    if not shards:
        longest = max(len(shard) for shard in mapped)
        raise UserError(f"data '{url}': no shard has more than {longest} tokens, expected {length} (one row)")
    digest = hashlib.sha256("".join(shard["digest"] for shard in manifest["shards"]).encode()).hexdigest()
    tokens = PackedRows(shards, digest)
    return TokenRows(tokens, np.broadcast_to(np.float32(1), tokens.shape))


def _mapped(path: Path, tokens: int, dtype: str) -> np.ndarray:
    try:
        shard = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise UserError(f"{path}: missing, expected a shard of {tokens} tokens") from None
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path}: damaged ({error}), expected {tokens} tokens of {dtype}") from None
    if shard.shape != (tokens,) or shard.dtype != dtype:
        raise UserError(f"{path}: holds {shard.dtype} of shape {shard.shape}, expected {tokens} tokens of {dtype}")
    return shard


def local_tokens(url: str | Path) -> Path:
    """The folder itself, or the copy of a remote one in the cache, made where it is not there yet."""
    system, path = file_system(str(url))
    if not system.isfile(f"{path}/{MANIFEST}"):
        if system.isfile(f"{path}/{UNFINISHED}"):
            raise UserError(f"{url}: not finished, expected the same `jclt tokenize` to be run again to its end")
        raise UserError(f"{url}: no {MANIFEST}, expected a folder made by `jclt tokenize`")
    content: Any = system.cat_file(f"{path}/{MANIFEST}")
    manifest = _manifest(content, url)
    if isinstance(system, LocalFileSystem):
        return Path(path)
    copy = cache_folder() / "tokens" / hashlib.sha256(content).hexdigest()
    copy.mkdir(parents=True, exist_ok=True)
    digests = {shard["name"]: shard["digest"] for shard in manifest["shards"]}
    for name in ("tokenizer.json", *digests, MANIFEST):
        if not (copy / name).exists():
            beside = copy / f"{name}.{os.getpid()}.partial"  # several processes may fetch into one cache
            try:
                system.get_file(f"{path}/{name}", str(beside))
            except FileNotFoundError:
                raise UserError(f"{url}/{name}: missing, expected what {MANIFEST} names") from None
            if name in digests and _digest(beside) != digests[name]:
                beside.unlink()
                raise UserError(f"{url}/{name}: differs from what {MANIFEST} says of it, expected it as it was written")
            beside.replace(copy / name)
    return copy


def _manifest(content: bytes, url: str | Path) -> Mapping[str, Any]:
    try:
        manifest = json.loads(content)
        if manifest["format"] == FORMAT:
            return manifest
        found = f"format {manifest['format']}"
    except (ValueError, KeyError, TypeError):
        found = "not what `jclt tokenize` writes"
    raise UserError(f"{url}/{MANIFEST}: {found}, expected format {FORMAT}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    documents: list[str] = []
    for piece in pieces(Input(LocalFileSystem(), str(path))):
        if piece.begins:
            documents.append(piece.text)
        else:
            documents[-1] += piece.text
    if not any(text.strip() for text in documents):
        raise UserError(f"{path}: empty, expected text")
    return documents
