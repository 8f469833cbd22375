"""Token rows from a text file or a folder of token shards."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from jclt.array_files import map_array
from jclt.config import cache_folder
from jclt.data.documents import Input, file_system, pieces
from jclt.data.token_rows import PackedRows, TokenRows, in_rows, unreserved_tokens
from jclt.data.tokenize import MANIFEST, UNFINISHED, check_manifest, tokenizer_digest
from jclt.errors import UserError, first_line
from jclt.files import new_file, parse_object
from jclt.models import Tokenizer


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
    tokens = pack_rows(shards, length, digest)
    return TokenRows(tokens, np.broadcast_to(np.float32(1), tokens.shape))


def pack_rows(shards: Sequence[np.ndarray], length: int, digest: str) -> PackedRows:
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
