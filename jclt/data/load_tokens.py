"""Tokens from a text file, or from a folder that `jclt tokenize` wrote."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from jclt.array_files import map_array
from jclt.config import cache_folder
from jclt.data.documents import Input, open_file_system, read_pieces
from jclt.data.manifest import MANIFEST, UNFINISHED, check_manifest, hash_tokenizer
from jclt.data.token_rows import PackedRows, TokenRows, count_unreserved, cut_rows
from jclt.errors import UserError, first_line
from jclt.files import create_file, parse_object
from jclt.models import Tokenizer


def is_token_folder(data: str) -> bool:
    """Whether the setting `data` names a folder of `jclt tokenize`, local or remote, and not a text."""
    return data != "world" and ("://" in data or Path(data).is_dir())


def load_tokens(
    url: str | Path, length: int, vocabulary: int | None = None, tokenizer: Tokenizer | None = None
) -> TokenRows:
    """The tokens of a folder of `jclt tokenize`, local or remote, as rows of any length; all weights are 1.

    If the model's vocabulary and tokenizer are given, tokens of another tokenizer are refused.
    """
    shards, digest = load_shards(url, vocabulary, tokenizer)
    if max(map(len, shards)) < length:
        longest = max(map(len, shards))
        raise UserError(f"data '{url}': no shard has more than {longest} tokens, expected {length} (one row)")
    tokens = pack_rows(shards, length, digest)
    return TokenRows(tokens, np.broadcast_to(np.float32(1), tokens.shape))


def pack_rows(shards: Sequence[np.ndarray], length: int, digest: str) -> PackedRows:
    """Shards of tokens as rows of this length; a row never crosses shards."""
    rows = [cut_rows(shard, length) for shard in shards if len(shard) >= length]
    border, unreserved = count_unreserved(shards), 0
    for shard in shards:
        unreserved += max(0, min(border, len(shard))) // length
        border -= len(shard)
    return PackedRows(rows, digest, unreserved)


def load_shards(
    url: str | Path, vocabulary: int | None = None, tokenizer: Tokenizer | None = None
) -> tuple[list[np.ndarray], str]:
    """The folder's shards, memory-mapped and checked against its manifest, and a digest of all of them."""
    folder, manifest = _find_local_folder(url)
    made_with = manifest["tokenizer"]
    if vocabulary is not None and made_with["vocabulary"] > vocabulary:
        raise UserError(f"data '{url}': {made_with['vocabulary']} token ids, expected at most {vocabulary} (the model)")
    if tokenizer is not None and hash_tokenizer(tokenizer) != made_with["digest"]:
        raise UserError(f"data '{url}': tokenised with {made_with['name']}, expected the model's own tokenizer")
    shards = [_map_shard(folder / shard["name"], shard, manifest) for shard in manifest["shards"]]
    digest = hashlib.sha256("".join(shard["digest"] for shard in manifest["shards"]).encode()).hexdigest()
    return shards, digest


def _map_shard(path: Path, entry: Mapping[str, Any], manifest: Mapping[str, Any]) -> np.ndarray:
    tokens, dtype, vocabulary = entry["tokens"], manifest["dtype"], manifest["tokenizer"]["vocabulary"]
    shard = map_array(path, f"a shard of {tokens} tokens of {dtype}")
    if shard.shape != (tokens,) or shard.dtype != dtype:
        raise UserError(f"{path}: holds {shard.dtype} of shape {shard.shape}, expected {tokens} tokens of {dtype}")
    status = path.stat()
    header_bytes = status.st_size - shard.nbytes
    largest = _find_largest_token(path, (status.st_size, status.st_mtime_ns), header_bytes, entry["digest"], dtype)
    if largest >= vocabulary:
        raise UserError(f"{path}: holds token id {largest}, expected at most {vocabulary - 1}, the vocabulary's last")
    return shard


@cache  # read once as long as its size and time of change (`stamp`) stay the same
def _find_largest_token(path: Path, stamp: tuple[int, int], header_bytes: int, digest: str, dtype: str) -> int:
    """The largest token id of a shard. The same pass over the file compares its content with the digest."""
    content_hash, largest = hashlib.sha256(), 0
    with path.open("rb") as file:
        content_hash.update(file.read(header_bytes))
        while block := file.read(1 << 24):
            content_hash.update(block)
            largest = max(largest, int(np.frombuffer(block, dtype).max()))
    if content_hash.hexdigest() != digest:
        raise UserError(f"{path}: differs from what {MANIFEST} says of it, expected it as it was written")
    return largest


def fetch_tokens(url: str | Path) -> Path:
    """The local folder itself, or a copy of a remote one in the cache, downloaded if it is not there yet."""
    return _find_local_folder(url)[0]


def _find_local_folder(url: str | Path) -> tuple[Path, Mapping[str, Any]]:
    """The folder or its local copy, as in `fetch_tokens`, and its manifest."""
    system, path = open_file_system(str(url))
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
        with create_file(copy / name) as partial:  # several processes can share the cache
            try:
                system.get_file(f"{path}/{name}", str(partial))
            except FileNotFoundError:
                raise UserError(f"{url}/{name}: missing, expected what {MANIFEST} names") from None
            except OSError as error:
                raise UserError(f"{url}/{name}: cannot be fetched ({first_line(error)})") from None
            if name in digests and _hash_file(partial) != digests[name]:
                raise UserError(f"{url}/{name}: differs from what {MANIFEST} says of it, expected it as it was written")
    return copy, manifest


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text_rows(path: Path, tokenizer: Tokenizer, length: int, end: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """A text file or JSON lines (their field `text`) as packed rows of tokens, and their weights, which are all 1."""
    ids = tokenize_file(path, tokenizer, end)
    tokens = cut_rows(ids, length)
    if not len(tokens):
        raise UserError(f"{path}: {len(ids)} tokens, expected at least {length} (one row)")
    return tokens, np.ones(tokens.shape, np.float16)


def tokenize_file(path: Path, tokenizer: Tokenizer, end: Sequence[int]) -> np.ndarray:
    """The tokens of all documents, one after another, each followed by the end tokens."""
    return np.concatenate([np.asarray([*tokenizer.encode(text), *end], np.int32) for text in _read_documents(path)])


def _read_documents(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(
            f"data '{path}': not found, expected a folder made by `jclt tokenize`, a text file, JSON lines or 'world'"
        )
    documents: list[str] = []
    for piece in read_pieces(Input(LocalFileSystem(), str(path))):
        if piece.begins:
            documents.append(piece.text)
        else:
            documents[-1] += piece.text
    if not any(text.strip() for text in documents):
        raise UserError(f"{path}: empty, expected text")
    return documents
