"""The manifest of a folder of `jclt tokenize`: how the tokens were made, and one entry per shard.

A manifest holds `format`, `tokenizer` (`name`, `digest`, `vocabulary`), `end`, `field`, `dtype`, `shard_tokens`,
`inputs`, `shards` and, once the folder is complete, the totals `tokens` and `documents`. While the folder is being
written, the manifest has the name `UNFINISHED`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from jclt.data.documents import Input
from jclt.errors import UserError
from jclt.files import parse_object, write_bytes
from jclt.models import Tokenizer

FORMAT = 1
MANIFEST, UNFINISHED = "manifest.json", "manifest.partial.json"


@dataclass(frozen=True)
class TokenFolder:
    """The folder for the shards, local or remote. Files are written atomically."""

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

    def write_manifest(self, name: str, manifest: Mapping[str, Any]) -> None:
        self.write(name, (json.dumps(manifest, indent=2) + "\n").encode())

    def read_manifest(self, name: str) -> dict[str, Any] | None:
        """The manifest in the file of this name, checked; None if there is no such file."""
        path = f"{self.path}/{name}"
        if not self.system.isfile(path):
            return None
        content: Any = self.system.cat_file(path)
        manifest = parse_object(content, path)
        check_manifest(manifest, path)
        return manifest

    @property
    def is_empty(self) -> bool:
        """Whether the folder has no files, or only partial files of a process that was killed."""
        if not self.system.exists(self.path):
            return True
        return self.system.isdir(self.path) and all(
            str(name).endswith(".partial") for name in self.system.ls(self.path, detail=False)
        )


def describe_settings(
    tokenizer: Tokenizer, name: str, end: int, field: str, shard_tokens: int, inputs: Sequence[Input]
) -> dict[str, Any]:
    """The part of the manifest that determines all tokens."""
    vocabulary = max(tokenizer.backend.get_vocab().values()) + 1
    return {
        "format": FORMAT,
        "tokenizer": {"name": name, "digest": hash_tokenizer(tokenizer), "vocabulary": vocabulary},
        "end": end,
        "field": field,
        "dtype": "uint16" if vocabulary <= 1 << 16 else "uint32",
        "shard_tokens": shard_tokens,
        "inputs": [{"name": source.name, "size": source.size} for source in inputs],
    }


def hash_tokenizer(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()


def open_manifest(folder: TokenFolder, out: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest that the folder has already, finished or not, or a new one in an empty folder.

    A folder that was begun with other settings, or that holds anything else, is refused.
    """
    try:
        stored = folder.read_manifest(MANIFEST) or folder.read_manifest(UNFINISHED)
        is_usable = stored is not None or folder.is_empty
    except UserError:  # another program's file
        stored, is_usable = None, False
    if not is_usable:
        raise UserError(f"{out}: exists and holds no tokens, expected a new folder or one to resume")
    if stored is None or not stored["shards"]:
        manifest = {**settings, "shards": []}
        folder.write_manifest(UNFINISHED, manifest)
        return manifest
    for name, value in settings.items():
        before: Any = stored.get(name)
        now = value
        detail = f" ({before}, now {now})"
        if name == "tokenizer":  # compared by its content; its folder can have moved
            before, now, detail = before["digest"], now["digest"], f" ({before['name']}, now {now['name']})"
        if before != now:
            detail = "" if name == "inputs" else detail
            raise UserError(f"{out}: was begun with another '{name}'{detail}, expected the same or a new folder")
    return stored


def check_manifest(manifest: Mapping[str, Any], where: str) -> None:
    """Checks the fields that readers use; `where` names the manifest in errors."""
    if manifest.get("format") != FORMAT:
        what = f"format {manifest['format']!s:.20}" if "format" in manifest else "not what `jclt tokenize` writes"
        raise UserError(f"{where}: {what}, expected format {FORMAT}")
    tokenizer: Any = manifest.get("tokenizer")
    dtype, shards = manifest.get("dtype"), manifest.get("shards")
    texts = isinstance(tokenizer, dict) and all(isinstance(tokenizer.get(name), str) for name in ("name", "digest"))
    if not (texts and _is_count(tokenizer.get("vocabulary"))):
        raise UserError(f"{where}: 'tokenizer' is damaged, expected its name, digest and vocabulary")
    if dtype not in ("uint16", "uint32"):
        raise UserError(f"{where}: 'dtype' is {dtype!r:.40}, expected uint16 or uint32")
    if not isinstance(shards, list):
        raise UserError(f"{where}: 'shards' is missing, expected a list")
    for number, shard in enumerate(shards):
        _check_shard(number, shard if isinstance(shard, dict) else {}, where)


def _check_shard(number: int, shard: Mapping[str, Any], where: str) -> None:
    """The name of a shard must stay within the folder, since a manifest can come from anywhere."""
    name, following = shard.get("name"), shard.get("next")
    if not (isinstance(name, str) and isinstance(shard.get("digest"), str) and _is_count(shard.get("tokens"))):
        raise UserError(f"{where}: shard {number} is damaged, expected its name, tokens and digest")
    if not is_file_name(name):
        raise UserError(f"{where}: shard {name!r:.200} is no file's name, expected one such as tokens-00000.npy")
    if not (isinstance(following, list) and len(following) == 2 and all(_is_count(x, 0) for x in following)):
        raise UserError(f"{where}: shard '{name}' is damaged, expected `next`, the place where the next one begins")


def _is_count(x: Any, least: int = 1) -> bool:
    return type(x) is int and x >= least


def is_file_name(name: str) -> bool:
    """Whether it is the name of a file in a folder, and no path out of it."""
    return name.isprintable() and name not in ("", ".", "..") and not set(name) & set("/\\:")
