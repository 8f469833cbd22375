"""Turns text into packed token shards, once: in parallel, with the same result for any number of workers, resumable."""

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from jclt.data.documents import Input, Piece, find_inputs, open_file_system, read_pieces
from jclt.data.manifest import MANIFEST, UNFINISHED, TokenFolder, describe_settings, open_manifest
from jclt.data.prefetch import map_ahead
from jclt.errors import UserError
from jclt.files import read_json
from jclt.models import Tokenizer, known_config, load_tokenizer

BATCH_CHARACTERS = 1 << 18
"""How much text a worker tokenises at once."""

Position = tuple[int, int]
"""The number of an input, and the number of a piece of it."""
Batch = list[tuple[Position, Piece]]
EncodedBatch = tuple[Batch, list[np.ndarray]]
Encode = Callable[[Sequence[Piece]], list[np.ndarray]]
"""From pieces to their tokens."""


class Shard(NamedTuple):
    """Tokens of consecutive pieces."""

    tokens: np.ndarray
    documents: int  # number of documents that end in it
    following: Position  # where the next shard begins


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
    """Writes the shards `tokens-00000.npy` ... and finally the manifest, and returns the manifest.

    The documents follow one another. Each begins with the tokenizer's opening tokens, if it has any, and is closed by
    the end token. A shard ends with the document, or the piece of a long one, that fills it. A second call with the
    same arguments resumes after the last shard that was written.
    """
    workers = (os.cpu_count() or 1) if workers is None else workers
    for name, value in (("workers", workers), ("shard-tokens", shard_tokens)):
        if value < 1:
            raise UserError(f"{name}: {value}, expected at least 1")
    loaded = load_tokenizer(tokenizer)
    if loaded is None:
        raise UserError(f"tokenizer '{tokenizer}': no tokenizer.json there, expected the folder of a model")
    folder, sources = TokenFolder(*open_file_system(out)), find_inputs(inputs)
    end_token = find_end_token(loaded, tokenizer, end)
    settings = describe_settings(loaded, str(tokenizer), end_token, field, shard_tokens, sources)
    manifest = open_manifest(folder, out, settings)
    if "tokens" in manifest:  # the folder is complete
        return manifest
    folder.write("tokenizer.json", loaded.backend.to_str(pretty=True).encode())
    with disable_library_threads():
        shards = write_shards(folder, manifest, sources, make_encoder(loaded, end_token, manifest["dtype"]), workers)
    totals = {name: sum(shard[name] for shard in shards) for name in ("tokens", "documents")}
    if not totals["tokens"]:
        raise UserError(f"{sources[0].name}{' and the other inputs' * (len(sources) > 1)}: empty, expected text")
    manifest = manifest | {"shards": shards} | totals
    folder.write_manifest(MANIFEST, manifest)
    folder.system.rm_file(f"{folder.path}/{UNFINISHED}")
    return manifest


@contextmanager
def disable_library_threads() -> Iterator[None]:
    """Batches are tokenised in parallel here, so the library's threads would only compete with them."""
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


def find_end_token(tokenizer: Tokenizer, folder: Path, end: str | None) -> int:
    """The token that ends a document: `end` is its number or text; by default tokenizer_config.json or the GGUF file
    names it."""
    if end is None and folder.is_file() and (stops := known_config(str(folder)).stop_tokens):
        return stops[0]
    if end is None:
        path = folder / "tokenizer_config.json"
        named = read_json(path).get("eos_token") if path.exists() else None
        text = named.get("content") if isinstance(named, Mapping) else named
        if text is None:
            raise UserError(f"tokenizer '{folder}': names no end of text, expected --end with a token or its number")
    else:
        text = end
    vocabulary = tokenizer.backend.get_vocab()
    token = int(text) if text.isascii() and text.isdigit() else vocabulary.get(text)
    if token is None or token > max(vocabulary.values()):
        raise UserError(f"end token '{text}': not in the vocabulary of {folder}")
    return token


def make_encoder(tokenizer: Tokenizer, end: int, dtype: str) -> Encode:
    """Opening tokens are added where a document begins, and the end token where it ends."""
    probe = tokenizer.backend.encode("a")
    with_mask = zip(probe.ids, probe.special_tokens_mask, strict=True)
    opening = [token for token, _ in takewhile(lambda pair: pair[1], with_mask)]

    def encode(batch: Sequence[Piece]) -> list[np.ndarray]:
        encodings = tokenizer.backend.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
        return [
            np.asarray([*(opening if piece.begins else ()), *tokens.ids, *([end] if piece.ends else ())], dtype)
            for piece, tokens in zip(batch, encodings, strict=True)
        ]

    return encode


def write_shards(
    folder: TokenFolder, manifest: Mapping[str, Any], sources: Sequence[Input], encode: Encode, workers: int
) -> list[dict[str, Any]]:
    """Writes the missing shards, and the unfinished manifest after each of them; returns the entries of all shards."""
    entries: list[dict[str, Any]] = list(manifest["shards"])
    start: Position = tuple(entries[-1]["next"]) if entries else (0, 0)
    sizes = [entry["size"] for entry in manifest["inputs"]]

    def encode_batch(batch: Batch) -> EncodedBatch:
        return batch, encode([piece for _, piece in batch])

    batches = read_batches(sources, start, manifest["field"])
    with (
        tqdm(total=sum(sizes), initial=sum(sizes[: start[0]]), unit="B", unit_scale=True, mininterval=0.5) as progress,
        map_ahead(encode_batch, batches, workers, depth=2 * workers) as results,
    ):
        for shard in pack_documents(report_progress(results, sizes, progress), manifest["shard_tokens"]):
            name, content = f"tokens-{len(entries):05d}.npy", io.BytesIO()
            np.save(content, shard.tokens)
            folder.write(name, content.getbuffer())
            entries.append(
                {
                    "name": name,
                    "tokens": len(shard.tokens),
                    "documents": shard.documents,
                    "digest": hashlib.sha256(content.getbuffer()).hexdigest(),
                    "next": [*shard.following],
                }
            )
            folder.write_manifest(UNFINISHED, {**manifest, "shards": entries})
    return entries


def read_batches(sources: Sequence[Input], start: Position, field: str) -> Iterator[Batch]:
    """The pieces from a position on, in batches of about `BATCH_CHARACTERS`."""
    batch: Batch = []
    size = 0
    for source in range(start[0], len(sources)):
        first = start[1] if source == start[0] else 0
        for number, piece in enumerate(islice(read_pieces(sources[source], field), first, None), first):
            batch.append(((source, number), piece))
            size += len(piece.text)
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def report_progress(
    results: Iterable[EncodedBatch], sizes: Sequence[int], progress: tqdm
) -> Iterator[tuple[Position, Piece, np.ndarray]]:
    """Passes on the pieces of the batches one by one, and moves the progress bar after each batch."""
    for batch, encoded in results:
        for (position, piece), tokens in zip(batch, encoded, strict=True):
            yield position, piece, tokens
        (source, _), piece = batch[-1]
        progress.update(sum(sizes[:source]) + piece.read - progress.n)


def pack_documents(encoded: Iterable[tuple[Position, Piece, np.ndarray]], shard_tokens: int) -> Iterator[Shard]:
    """Collects pieces until they have `shard_tokens` tokens; the last shard can have fewer."""
    pieces: list[np.ndarray] = []
    size = documents = 0
    following: Position = (0, 0)
    for (source, number), piece, tokens in encoded:
        pieces.append(tokens)
        size, documents, following = size + len(tokens), documents + piece.ends, (source, number + 1)
        if size >= shard_tokens:
            yield Shard(np.concatenate(pieces), documents, following)
            pieces, size, documents = [], 0, 0
    if pieces:
        yield Shard(np.concatenate(pieces), documents, following)
