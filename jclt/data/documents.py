"""Documents of text files, JSON lines and Parquet, streamed from any file system that fsspec knows."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import fsspec
from fsspec.core import OpenFile
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import infer_compression

from jclt.errors import UserError, first_line
from jclt.files import parse_json

BLOCK_BYTES = 1 << 24  # read at once; a longer text is cut into pieces of about this size
MAX_LINE_BYTES = 1 << 30  # a small compressed file can unpack to a line without end
JSON_LINES = (".jsonl", ".ndjson", ".json")
COMPRESSED = (".gz", ".bz2", ".xz", ".lzma", ".zip", ".zst", ".lz4", ".snappy")


class Piece(NamedTuple):
    """A document, or a part of a long text, cut at line breaks."""

    text: str
    begins: bool  # the document begins here
    ends: bool
    read: int  # bytes of the input read so far, for a progress bar


@dataclass(frozen=True)
class Input:
    """One input file."""

    system: fsspec.AbstractFileSystem
    path: str

    @property
    def name(self) -> str:
        return self.path if isinstance(self.system, LocalFileSystem) else str(self.system.unstrip_protocol(self.path))

    @property
    def size(self) -> int:
        return int(self.system.size(self.path) or 0)

    @property
    def suffix(self) -> str:
        """The suffix of the name, without the suffix of a compression."""
        path = PurePosixPath(self.path)
        return (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def open_file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URL, and the path in it."""
    try:
        return fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"'{url}': cannot be opened ({error})") from None


def find_inputs(patterns: Sequence[str]) -> list[Input]:
    """All files that the paths, folders, globs and URLs name; those of one pattern are sorted by name."""
    inputs: list[Input] = []
    for pattern in patterns:
        system, path = open_file_system(pattern)
        if system.isfile(path):
            paths = [path]
        elif system.isdir(path):
            # A local folder can hold pipes too, and opening one could wait for ever.
            paths = [p for p in system.find(path) if not isinstance(system, LocalFileSystem) or system.isfile(p)]
            paths = [p for p in paths if Input(system, str(p)).suffix in (".txt", ".parquet", *JSON_LINES)]
        else:
            paths = [p for p in system.glob(path) if system.isfile(p)] if fsspec.core.has_magic(path) else []
        if not paths:
            raise UserError(f"input '{pattern}': nothing found, expected a file, a glob, or a folder with text in it")
        inputs += [Input(system, str(p)) for p in sorted(paths)]
    return inputs


def read_pieces(source: Input, field: str = "text") -> Iterator[Piece]:
    """The documents of one file, one after another. A text file is one document, of any length."""
    compression = infer_compression(source.path)
    if compression is None and PurePosixPath(source.path).suffix.lower() in COMPRESSED:
        raise UserError(f"{source.name}: fsspec finds no package installed that unpacks this (.zst needs zstandard)")
    opened = OpenFile(source.system, source.path, "rb", compression)
    try:
        with opened as raw:
            stream: Any = raw if compression is None else io.BufferedReader(raw)  # zstandard's stream has no readline
            if source.suffix == ".parquet":
                yield from _read_parquet(stream, source, field)
            elif source.suffix in JSON_LINES:
                yield from _read_json_lines(stream, opened, source.name, field)
            else:
                yield from _read_text(stream, opened, source.name)
    except UserError:
        raise
    except Exception as error:  # each decompressor raises other kinds of errors
        raise UserError(f"{source.name}: cannot be read ({first_line(error)})") from None


def _read_text(stream: Any, opened: OpenFile, name: str) -> Iterator[Piece]:
    waiting: Piece | None = None
    for text, read in _read_blocks(stream, opened, name):
        if waiting is not None:
            yield waiting
        waiting = Piece(text, begins=waiting is None, ends=False, read=read)
    if waiting is not None:
        yield waiting._replace(ends=True)


def _read_json_lines(stream: Any, opened: OpenFile, name: str, field: str) -> Iterator[Piece]:
    number = 0
    for block, read in _read_blocks(stream, opened, name):
        # `splitlines` would also split at characters that JSON allows within a string.
        for line in block.removesuffix("\n").split("\n"):
            number += 1
            if line.strip():
                yield Piece(_read_field(line, field, f"{name}:{number}"), begins=True, ends=True, read=read)


def _read_field(line: str, field: str, where: str) -> str:
    document = parse_json(line, where)
    text = document.get(field) if isinstance(document, dict) else None
    if not isinstance(text, str):
        raise UserError(f"{where}: expected a JSON object with '{field}'")
    # JSON can contain half of a surrogate pair, which is not text: it becomes the replacement character.
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_blocks(stream: Any, opened: OpenFile, name: str) -> Iterator[tuple[str, int]]:
    """Blocks of whole lines, of about `BLOCK_BYTES`, and how many bytes of the (compressed) file have been read."""
    done = 0
    while block := stream.read(BLOCK_BYTES):
        line = stream.readline(MAX_LINE_BYTES + 1)
        if len(line) > MAX_LINE_BYTES:
            raise UserError(
                f"{name}: a line of more than {MAX_LINE_BYTES} bytes (from byte {done} on), expected shorter ones"
            )
        block += line
        try:
            text = block.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{name}: not UTF-8 text (byte {done + error.start})") from None
        yield text, opened.fobjects[0].tell()
        done += len(block)


def _read_parquet(stream: Any, source: Input, field: str) -> Iterator[Piece]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{source.name}: Parquet needs pyarrow, expected `pip install 'jclt[parquet]'`") from None
    row = 0
    try:
        file: Any = ParquetFile(stream)
        if field not in file.schema_arrow.names:
            raise UserError(
                f"{source.name}: no column '{field}', expected one of: {', '.join(file.schema_arrow.names)}"
            )
        for batch in file.iter_batches(batch_size=1024, columns=[field]):
            for text in batch.column(0).to_pylist():
                row += 1
                if not isinstance(text, str):
                    raise UserError(f"{source.name}: row {row} has no text in '{field}'")
                yield Piece(text, begins=True, ends=True, read=source.size * row // file.metadata.num_rows)
    except pyarrow.ArrowException as error:
        raise UserError(f"{source.name}: not a Parquet file that pyarrow reads ({error})") from None
