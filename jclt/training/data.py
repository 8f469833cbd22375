"""Token rows on disk, and the batch as a function of the step: resuming needs no loader state."""

import hashlib
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
from jclt.errors import UserError, first_line
from jclt.files import map_array, new_file, parse_object
from jclt.models import Tokenizer
from jclt.shapes import Array
from jclt.training.documents import Input, file_system, pieces
from jclt.training.tokenize import MANIFEST, UNFINISHED, check_manifest, tokenizer_digest

ROUNDS = 6
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
    for name, array in (("weights", weights), ("tokens", tokens)):
        with new_file(folder / f"{name}.npy") as beside, beside.open("wb") as file:
            np.save(file, array)
    return load_rows(folder)


def load_rows(folder: Path) -> TokenRows:
    tokens, weights = (map_array(folder / f"{name}.npy", "a run's rows [N, T]") for name in ("tokens", "weights"))
    if tokens.ndim != 2 or tokens.shape != weights.shape:
        raise UserError(f"{folder}: tokens of shape {tokens.shape} and weights of {weights.shape}, expected [N, T]")
    return TokenRows(tokens, weights)


def holds_tokens(data: str) -> bool:
    """Whether a setting names a folder of `jclt tokenize`, here or remote, rather than text."""
    return data != "world" and ("://" in data or Path(data).is_dir())


def load_tokens(
    url: str | Path, length: int, vocabulary: int | None = None, tokenizer: Tokenizer | None = None
) -> TokenRows:
    """The folder of `jclt tokenize`, here or remote, as rows of any length; every token counts alike.

    Given the vocabulary and the tokenizer of the model that is to read them, tokens of another are refused.
    """
    shards, digest = load_shards(url, vocabulary, tokenizer)
    if max(map(len, shards)) < length:
        longest = max(map(len, shards))
        raise UserError(f"data '{url}': no shard has more than {longest} tokens, expected {length} (one row)")
    tokens = packed(shards, length, digest)
    return TokenRows(tokens, np.broadcast_to(np.float32(1), tokens.shape))


def packed(shards: Sequence[np.ndarray], length: int, digest: str) -> PackedRows:
    """Shards of tokens as rows of this length."""
    rows = [in_rows(shard, length) for shard in shards if len(shard) >= length]
    border, unreserved = unreserved_tokens(shards), 0
    for shard in shards:
        unreserved += max(0, min(border, len(shard))) // length
        border -= len(shard)
    return PackedRows(rows, digest, unreserved)


def load_shards(
    url: str | Path, vocabulary: int | None = None, tokenizer: Tokenizer | None = None
) -> tuple[list[np.ndarray], str]:
    """The folder's tokens, memory-mapped, each shard as its manifest says it is; and a digest of all of them."""
    folder, manifest = _found(url)
    made_with = manifest["tokenizer"]
    if vocabulary is not None and made_with["vocabulary"] > vocabulary:
        raise UserError(f"data '{url}': {made_with['vocabulary']} token ids, expected at most {vocabulary} (the model)")
    if tokenizer is not None and tokenizer_digest(tokenizer) != made_with["digest"]:
        raise UserError(f"data '{url}': tokenised with {made_with['name']}, expected the model's own tokenizer")
    shards = [_mapped(folder / shard["name"], shard, manifest) for shard in manifest["shards"]]
    digest = hashlib.sha256("".join(shard["digest"] for shard in manifest["shards"]).encode()).hexdigest()
    return shards, digest


def _mapped(path: Path, entry: Mapping[str, Any], manifest: Mapping[str, Any]) -> np.ndarray:
    tokens, dtype, vocabulary = entry["tokens"], manifest["dtype"], manifest["tokenizer"]["vocabulary"]
    shard = map_array(path, f"a shard of {tokens} tokens of {dtype}")
    if shard.shape != (tokens,) or shard.dtype != dtype:
        raise UserError(f"{path}: holds {shard.dtype} of shape {shard.shape}, expected {tokens} tokens of {dtype}")
    found = path.stat()
    header = found.st_size - shard.nbytes
    largest = _largest(path, (found.st_size, found.st_mtime_ns), header, entry["digest"], dtype)
    if largest >= vocabulary:
        raise UserError(f"{path}: holds token id {largest}, expected at most {vocabulary - 1}, the vocabulary's last")
    return shard


@cache  # once for a file that stays as it is
def _largest(path: Path, stamp: tuple[int, int], header: int, digest: str, dtype: str) -> int:
    """The largest token id of a shard, read once from end to end: its bytes are compared with their digest as well."""
    whole, largest = hashlib.sha256(), 0
    with path.open("rb") as file:
        whole.update(file.read(header))
        while block := file.read(1 << 24):
            whole.update(block)
            largest = max(largest, int(np.frombuffer(block, dtype).max()))
    if whole.hexdigest() != digest:
        raise UserError(f"{path}: differs from what {MANIFEST} says of it, expected it as it was written")
    return largest


def local_tokens(url: str | Path) -> Path:
    """The folder itself, or the copy of a remote one in the cache, made where it is not there yet."""
    return _found(url)[0]


def _found(url: str | Path) -> tuple[Path, Mapping[str, Any]]:
    """The folder on this machine, and its manifest."""
    system, path = file_system(str(url))
    if not system.isfile(f"{path}/{MANIFEST}"):
        if system.isfile(f"{path}/{UNFINISHED}"):
            raise UserError(f"{url}: not finished, expected the same `jclt tokenize` to be run again to its end")
        raise UserError(f"{url}: no {MANIFEST}, expected a folder made by `jclt tokenize`")
    content: Any = system.cat_file(f"{path}/{MANIFEST}")
    manifest = parse_object(content, f"{url}/{MANIFEST}")
    check_manifest(manifest, f"{url}/{MANIFEST}")
    if not manifest["shards"]:
        raise UserError(f"{url}/{MANIFEST}: names no shards, expected at least one")
    if isinstance(system, LocalFileSystem):
        return Path(path), manifest
    copy = cache_folder() / "tokens" / hashlib.sha256(content).hexdigest()
    digests = {shard["name"]: shard["digest"] for shard in manifest["shards"]}
    for name in ("tokenizer.json", *digests, MANIFEST):
        if (copy / name).exists():
            continue
        with new_file(copy / name) as beside:  # several processes may fetch into one cache
            try:
                system.get_file(f"{path}/{name}", str(beside))
            except FileNotFoundError:
                raise UserError(f"{url}/{name}: missing, expected what {MANIFEST} names") from None
            except OSError as error:
                raise UserError(f"{url}/{name}: cannot be fetched ({first_line(error)})") from None
            if name in digests and _digest(beside) != digests[name]:
                raise UserError(f"{url}/{name}: differs from what {MANIFEST} says of it, expected it as it was written")
    return copy, manifest


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_rows(path: Path, tokenizer: Tokenizer, length: int, end: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Text or JSON lines (their `text`) as packed rows, in which every token counts alike."""
    ids = text_tokens(path, tokenizer, end)
    tokens = in_rows(ids, length)
    if not len(tokens):
        raise UserError(f"{path}: {len(ids)} tokens, expected at least {length} (one row)")
    return tokens, np.ones(tokens.shape, np.float16)


def text_tokens(path: Path, tokenizer: Tokenizer, end: Sequence[int]) -> np.ndarray:
    """Documents one after another, each with its end."""
    return np.concatenate([np.asarray([*tokenizer.encode(text), *end], np.int32) for text in _documents(path)])


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
