"""Text into packed token arrays, once: in parallel, the same for any number of workers, resumable."""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

from jclt.data.documents import Input, Piece, file_system, find_inputs, pieces
from jclt.data.prefetch import mapped_ahead
from jclt.errors import UserError
from jclt.files import parse_object, read_json, write_bytes
from jclt.models import Tokenizer, load_tokenizer

FORMAT = 1
MANIFEST, UNFINISHED = "manifest.json", "manifest.partial.json"
BATCH = 1 << 18  # characters that a worker tokenises at once
Position = tuple[int, int]
"""An input and a piece of it, by number."""
Batch = list[tuple[Position, Piece]]


@dataclass(frozen=True)
class Folder:
    """Where the arrays go: a local folder or a remote one. A file is there whole or not at all."""

    system: AbstractFileSystem
    path: str

    def write(self, name: str, content: bytes | memoryview) -> None:
        target = f"{self.path}/{name}"
        if isinstance(self.system, LocalFileSystem):
            write_bytes(Path(target), content)
        else:
            self.system.makedirs(self.path, exist_ok=True)
            with TemporaryDirectory() as scratch:
                (Path(scratch) / name).write_bytes(content)
                self.system.put_file(str(Path(scratch) / name), target)

    def manifest(self, name: str) -> dict[str, Any] | None:
        """One of ours, or None where there is no file of this name."""
        path = f"{self.path}/{name}"
        if not self.system.isfile(path):
            return None
        content: Any = self.system.cat_file(path)
        found = parse_object(content, path)
        check_manifest(found, path)
        return found

    @property
    def is_empty(self) -> bool:
        """But for what a process that was killed left."""
        if not self.system.exists(self.path):
            return True
        return self.system.isdir(self.path) and all(
            str(name).endswith(".partial") for name in self.system.ls(self.path, detail=False)
        )


def tokenize(
    inputs: Sequence[str],
    tokenizer: Path,
    out: str,
    *,
    workers: int | None = None,
    shard_tokens: int = 1 << 26,
    end: str | None = None,
    field: str = "text",
) -> dict[str, Any]:
    """Writes `tokens-00000.npy` ... and at last the manifest, which is returned.

    Documents follow one another, each opened as the tokenizer opens a text and closed by the end token. A shard ends
    with the first document that fills it. Run again with the same arguments it goes on after the last shard written.
    """
    workers = (os.cpu_count() or 1) if workers is None else workers
    for name, value in (("workers", workers), ("shard-tokens", shard_tokens)):
        if value < 1:
            raise UserError(f"{name}: {value}, expected at least 1")
    loaded = load_tokenizer(tokenizer)
    if loaded is None:
        raise UserError(f"tokenizer '{tokenizer}': no tokenizer.json there, expected the folder of a model")
    folder, sources = Folder(*file_system(out)), find_inputs(inputs)
    end_token = find_end(loaded, tokenizer, end)
    begun = begin(folder, out, settings(loaded, str(tokenizer), end_token, field, shard_tokens, sources))
    if "tokens" in begun:
        return begun
    folder.write("tokenizer.json", loaded.backend.to_str(pretty=True).encode())
    with one_thread_each():
        shards = fill(folder, begun, sources, encoder(loaded, end_token, begun["dtype"]), workers)
    totals = {name: sum(shard[name] for shard in shards) for name in ("tokens", "documents")}
    if not totals["tokens"]:
        raise UserError(f"{sources[0].name}{' and the other inputs' * (len(sources) > 1)}: empty, expected text")
    manifest = begun | {"shards": shards} | totals
    folder.write(MANIFEST, _json(manifest))
    folder.system.rm_file(f"{folder.path}/{UNFINISHED}")
    return manifest


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Our threads are the parallel ones; the library's own would come on top of them."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def settings(
    tokenizer: Tokenizer, name: str, end: int, field: str, shard_tokens: int, sources: Sequence[Input]
) -> dict[str, Any]:
    """All that decides which tokens are written."""
    vocabulary = max(tokenizer.backend.get_vocab().values()) + 1
    return {
        "format": FORMAT,
        "tokenizer": {"name": name, "digest": tokenizer_digest(tokenizer), "vocabulary": vocabulary},
        "end": end,
        "field": field,
        "dtype": "uint16" if vocabulary <= 1 << 16 else "uint32",
        "shard_tokens": shard_tokens,
        "inputs": [{"name": source.name, "size": source.size} for source in sources],
    }


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()


def find_end(tokenizer: Tokenizer, folder: Path, given: str | None) -> int:
    """The token that ends a document, by its number or text; by default the one that tokenizer_config.json names."""
    if given is None:
        path = folder / "tokenizer_config.json"
        named = read_json(path).get("eos_token") if path.exists() else None
        text = named.get("content") if isinstance(named, Mapping) else named
        if text is None:
            raise UserError(f"tokenizer '{folder}': names no end of text, expected --end with a token or its number")
    else:
        text = given
    vocabulary = tokenizer.backend.get_vocab()
    token = int(text) if text.isascii() and text.isdigit() else vocabulary.get(text)
    if token is None or token > max(vocabulary.values()):
        raise UserError(f"end token '{text}': not in the vocabulary of {folder}")
    return token


def begin(folder: Folder, out: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of what the folder holds already, finished or not; an error if it holds anything else."""
    try:
        found = folder.manifest(MANIFEST) or folder.manifest(UNFINISHED)
        ours = found is not None or folder.is_empty
    except UserError:  # another program's file
        found, ours = None, False
    if not ours:
        raise UserError(f"{out}: exists and holds no tokens, expected a new folder or one to resume")
    if found is None or not found["shards"]:
        folder.write(UNFINISHED, _json(begun := {**wanted, "shards": []}))
        return begun
    for name, value in wanted.items():
        was: Any = found.get(name)
        now = value
        detail = f" ({was}, now {now})"
        if name == "tokenizer":  # wherever it lies
            was, now, detail = was["digest"], now["digest"], f" ({was['name']}, now {now['name']})"
        if was != now:
            detail = "" if name == "inputs" else detail
            raise UserError(f"{out}: was begun with another '{name}'{detail}, expected the same or a new folder")
    return found


def check_manifest(found: Mapping[str, Any], where: str) -> None:
    """That it is built as `tokenize` builds it. The name of a shard is one within the folder, whoever wrote it."""

    def whole(x: Any, least: int = 1) -> bool:
        return type(x) is int and x >= least

    if found.get("format") != FORMAT:
        what = f"format {found['format']!s:.20}" if "format" in found else "not what `jclt tokenize` writes"
        raise UserError(f"{where}: {what}, expected format {FORMAT}")
    made_with: Any = found.get("tokenizer")
    dtype, shards = found.get("dtype"), found.get("shards")
    texts = isinstance(made_with, dict) and all(isinstance(made_with.get(name), str) for name in ("name", "digest"))
    if not (texts and whole(made_with.get("vocabulary"))):
        raise UserError(f"{where}: 'tokenizer' is damaged, expected its name, digest and vocabulary")
    if dtype not in ("uint16", "uint32"):
        raise UserError(f"{where}: 'dtype' is {dtype!r:.40}, expected uint16 or uint32")
    if not isinstance(shards, list):
        raise UserError(f"{where}: 'shards' is missing, expected a list")
    for number, shard in enumerate(shards):
        own: dict[str, Any] = shard if isinstance(shard, dict) else {}
        name, follows = own.get("name"), own.get("next")
        if not (isinstance(name, str) and isinstance(own.get("digest"), str) and whole(own.get("tokens"))):
            raise UserError(f"{where}: shard {number} is damaged, expected its name, tokens and digest")
        if not is_file_name(name):
            raise UserError(f"{where}: shard {name!r:.200} is no file's name, expected one such as tokens-00000.npy")
        if not (isinstance(follows, list) and len(follows) == 2 and all(whole(x, 0) for x in follows)):
            raise UserError(f"{where}: shard '{name}' is damaged, expected `next`, the place where the next one begins")


def is_file_name(name: str) -> bool:
    """Whether it names a file in a folder and nothing elsewhere."""
    return name.isprintable() and name not in ("", ".", "..") and not set(name) & set("/\\:")


def encoder(tokenizer: Tokenizer, end: int, dtype: str) -> Callable[[Sequence[Piece]], list[np.ndarray]]:
    """The function from pieces to their tokens: what opens a text where one begins, the end where it ends."""
    probe = tokenizer.backend.encode("a")
    marked = zip(probe.ids, probe.special_tokens_mask, strict=True)
    opening = [token for token, _ in takewhile(lambda pair: pair[1], marked)]

    def encode(batch: Sequence[Piece]) -> list[np.ndarray]:
        found = tokenizer.backend.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
        return [
            np.asarray([*(opening if piece.begins else ()), *tokens.ids, *([end] if piece.ends else ())], dtype)
            for piece, tokens in zip(batch, found, strict=True)
        ]

    return encode


def fill(
    folder: Folder,
    begun: Mapping[str, Any],
    sources: Sequence[Input],
    encode: Callable[[Sequence[Piece]], list[np.ndarray]],
    workers: int,
) -> list[dict[str, Any]]:
    """Writes the shards that are missing, and after each the manifest so far; returns the entries of all."""
    shards: list[dict[str, Any]] = list(begun["shards"])
    start: Position = tuple(shards[-1]["next"]) if shards else (0, 0)
    sizes = [entry["size"] for entry in begun["inputs"]]

    def tokens_of(batch: Batch) -> tuple[Batch, list[np.ndarray]]:
        return batch, encode([piece for _, piece in batch])

    read = batches(sources, start, begun["field"])
    with (
        tqdm(total=sum(sizes), initial=sum(sizes[: start[0]]), unit="B", unit_scale=True, mininterval=0.5) as progress,
        mapped_ahead(tokens_of, read, workers, depth=2 * workers) as results,
    ):
        for tokens, documents, position in pack_documents(shown(results, sizes, progress), begun["shard_tokens"]):
            name, content = f"tokens-{len(shards):05d}.npy", io.BytesIO()
            np.save(content, tokens)
            folder.write(name, content.getbuffer())
            digest = hashlib.sha256(content.getbuffer()).hexdigest()
            entry = {"name": name, "tokens": len(tokens), "documents": documents, "digest": digest, "next": [*position]}
            shards.append(entry)
            folder.write(UNFINISHED, _json({**begun, "shards": shards}))
    return shards


def batches(sources: Sequence[Input], start: Position, field: str) -> Iterator[Batch]:
    """The pieces from a position on, as many together as are worth handing to a thread."""
    batch: Batch = []
    size = 0
    for source in range(start[0], len(sources)):
        first = start[1] if source == start[0] else 0
        for number, piece in enumerate(islice(pieces(sources[source], field), first, None), first):
            batch.append(((source, number), piece))
            size += len(piece.text)
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def shown(
    results: Iterable[tuple[Batch, list[np.ndarray]]], sizes: Sequence[int], progress: tqdm
) -> Iterator[tuple[Position, Piece, np.ndarray]]:
    for batch, encoded in results:
        for (position, piece), tokens in zip(batch, encoded, strict=True):
            yield position, piece, tokens
        (source, _), piece = batch[-1]
        progress.update(sum(sizes[:source]) + piece.read - progress.n)


def pack_documents(
    encoded: Iterable[tuple[Position, Piece, np.ndarray]], shard_tokens: int
) -> Iterator[tuple[np.ndarray, int, Position]]:
    """The shards: their tokens, the number of documents that end in each, and where the next one begins."""
    waiting: list[np.ndarray] = []
    size = documents = 0
    follows: Position = (0, 0)
    for (source, number), piece, tokens in encoded:
        waiting.append(tokens)
        size, documents, follows = size + len(tokens), documents + piece.ends, (source, number + 1)
        if size >= shard_tokens:
            yield np.concatenate(waiting), documents, follows
            waiting, size, documents = [], 0, 0
    if waiting:
        yield np.concatenate(waiting), documents, follows


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
