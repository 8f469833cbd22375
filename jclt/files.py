"""Files: one way to read each kind, and one way to write a file or a folder whole.

Whoever reads a file here gets its content or a `UserError` of one line, whatever the file holds: text is UTF-8 whatever
the locale, JSON may be nested too deeply or hold numbers too long, archives may claim to unpack to any size, what is no
plain file is not opened. Whoever writes one sees it under its name only when it is whole, and nothing of it otherwise.
"""

import glob
import json
import math
import mmap
import os
import shutil
import socket
import stat
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np
from numpy.lib import format as npy
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jclt.errors import UserError, first_line, reason_of
from jclt.interrupts import undone

# Reading.


def check_file(path: Path, expected: str = "a file") -> int:
    """The size of a plain file; an error for anything else, a pipe among them, which would be waited for."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path}: not found, expected {expected}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)}), expected {expected}") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "no plain file"
        raise UserError(f"{path}: is {kind}, expected {expected}")
    return found.st_size


def read_bytes(path: Path, expected: str = "a file") -> bytes:
    check_file(path, expected)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)}), expected {expected}") from None


def read_text(path: Path, expected: str = "a text file") -> str:
    """UTF-8, with or without a byte-order mark; line ends as they are."""
    return decode(read_bytes(path, expected), path)


def decode(data: bytes, where: object) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start})") from None


def parse_json(data: bytes | str, where: object) -> Any:
    """Any JSON value; `where` names it in errors."""
    text = decode(data, where) if isinstance(data, bytes) else data
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{where}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({first_line(error)})") from None


def parse_object(data: bytes | str, where: object) -> dict[str, Any]:
    """A JSON object; `where` names it in errors."""
    found = parse_json(data, where)
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected a JSON object")
    return found


def read_json(path: Path, expected: str = "a JSON file") -> dict[str, Any]:
    """The object that a JSON file holds."""
    return parse_object(read_bytes(path, expected), path)


DEEPEST_YAML = 100


def read_yaml(path: Path) -> dict[str, Any]:
    """The `name: value` lines of a YAML file."""
    import yaml  # imported where it is needed: most folders have no YAML

    text, depth = read_text(path, "a YAML file"), 0
    try:
        # Looked through first: the time that loading takes grows with the square of the depth.
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST_YAML:
                raise UserError(f"{path}: not valid YAML (nested too deeply)")
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected `name: value` lines")
    return found


def read_lines(path: Path, expected: str = "a text file") -> list[str]:
    """The lines of a text file, without their ends. Not `splitlines`, which also splits at signs that may stand within
    a line (form feed, U+2028 ...)."""
    lines = read_text(path, expected).split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


# Arrays.

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
"""The types of safetensors files."""
LONGEST_HEADER = 100_000_000
"""Bytes, as the format's own reader has it."""


class SafetensorsFile:
    """The tensors of one file as views of its memory map: what is not looked at is not read."""

    def __init__(self, path: Path):
        size = check_file(path, "a safetensors file")
        with _opened(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, LONGEST_HEADER):
                raise UserError(f"{path}: not a safetensors file, or cut off in its header ({size} bytes)")
            header = _parse_header(file.read(length), path)
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header.pop("__metadata__", None)
        _check_header(path, header, size - 8 - length)
        self.header, self.start, self.path = header, 8 + length, path

    def tensor(self, name: str) -> np.ndarray:
        entry = self.header[name]
        count = math.prod(entry["shape"])
        start = self.start + entry["data_offsets"][0]
        return np.frombuffer(self.map, DTYPES[entry["dtype"]], count, start).reshape(entry["shape"])

    def forget_pages(self) -> None:
        """Lets go of the pages read so far, so that host memory holds no second copy of the checkpoint."""
        _forget(self.map)


def _parse_header(data: bytes, path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name twice")
        return found

    try:
        header = json.loads(data.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise UserError(f"{path}: not a safetensors file, its header is no JSON object")
    return header


def _check_header(path: Path, header: Mapping[str, Any], size: int) -> None:
    """That each tensor says its type, shape and place, and that they follow one another up to the end of the file."""

    def whole(x: Any, length: int | None = None) -> bool:
        numbers = isinstance(x, list) and all(type(item) is int and item >= 0 for item in x)
        return numbers and length in (None, len(x))

    for name, entry in header.items():
        if not isinstance(entry, dict) or not (whole(entry.get("shape")) and whole(entry.get("data_offsets"), 2)):
            raise UserError(f"{path}: tensor '{name}' is damaged, expected its dtype, shape and two data_offsets")
        if not isinstance(entry.get("dtype"), str) or entry["dtype"] not in DTYPES:
            raise UserError(f"{path}: tensor '{name}' is of type {entry.get('dtype')!r}, expected one that numpy knows")
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        nbytes = math.prod(entry["shape"]) * np.dtype(DTYPES[entry["dtype"]]).itemsize
        if first != end or last - first != nbytes:
            raise UserError(
                f"{path}: tensor '{name}' of type {entry['dtype']} and shape {entry['shape']} is damaged: "
                f"lies at bytes {first} to {last}, expected {end} to {end + nbytes}"
            )
        end = last
    if size < end:
        raise UserError(f"{path}: cut off, has {size} bytes of tensors, expected {end}")
    if size > end:
        raise UserError(f"{path}: has {size} bytes of tensors, expected {end} by its header")


class Archive:
    """A zip file's members by their names; their sizes are known before anything is unpacked, and what is unpacked is
    compared with its checksum."""

    def __init__(self, path: Path, expected: str):
        check_file(path, expected)
        self.path, self.expected = path, expected
        with self._reading(""), zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        self.entries = {entry.filename: entry for entry in entries}
        if len(self.entries) < len(entries):
            raise UserError(f"{path}: a member is there twice, expected {expected}")

    def size(self, name: str) -> int:
        return self.entries[name].file_size

    def read(self, name: str, most: int) -> bytes:
        """A member's content, of at most so many bytes."""
        if self.size(name) > most:
            raise UserError(f"{self.path}: '{name}' unpacks to {self.size(name)} bytes, expected at most {most}")
        with self._reading(name), zipfile.ZipFile(self.path) as archive:
            return archive.read(name)

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # a damaged archive fails in as many ways as there are parts of it
            which = f"'{name}' is damaged" if name else f"damaged, or not {self.expected}"
            raise UserError(f"{self.path}: {which} ({first_line(error)})") from None


class NpzFile(Archive):
    """The arrays of a `.npz`, by name: those stored uncompressed as views of its memory map."""

    def __init__(self, path: Path, expected: str = "a .npz file"):
        super().__init__(path, expected)
        self.header = {name.removesuffix(".npy"): entry for name, entry in self.entries.items()}
        with _opened(path) as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def shape(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """An array's shape and type, before any memory is taken for it."""
        entry = self.header[name]
        with self._reading(name), zipfile.ZipFile(self.path) as archive, archive.open(entry) as file:
            shape, _, dtype, length = _npy_header(file)
            if length + math.prod(shape) * dtype.itemsize != entry.file_size:
                raise ValueError(f"{entry.file_size} bytes, not those of {dtype} of shape {list(shape)}")
            return shape, dtype

    def tensor(self, name: str) -> np.ndarray:
        shape, dtype = self.shape(name)
        entry = self.header[name]
        with self._reading(name):
            if entry.compress_type != zipfile.ZIP_STORED:
                with zipfile.ZipFile(self.path) as archive, archive.open(entry) as file:
                    _, fortran, _, _ = _npy_header(file)
                    return _read_array(file, shape, dtype, fortran)
            start = entry.header_offset + 30
            start += sum(int.from_bytes(self.map[start - n : start - n + 2], "little") for n in (4, 2))
            stop = start + entry.file_size
            if stop > len(self.map) or _checksum(self.map, start, stop) != entry.CRC:
                raise ValueError("its checksum differs from its content's")
            with _opened(self.path) as file:
                file.seek(start)
                _, fortran, _, length = _npy_header(file)
            return np.ndarray(shape, dtype, self.map, start + length, order="F" if fortran else "C")

    def forget_pages(self) -> None:
        _forget(self.map)


def _read_array(file: Any, shape: tuple[int, ...], dtype: np.dtype[Any], fortran: bool) -> np.ndarray:
    """The numbers after the header, read straight to their place; to the end, where the checksum is looked at."""
    array = np.empty(shape, dtype, order="F" if fortran else "C")
    left = array.reshape(-1, order="A").view(np.uint8).data
    while len(left):
        block = file.read(min(len(left), 1 << 24))
        if not block:
            raise ValueError(f"{len(left)} bytes are missing at its end")
        left[: len(block)] = block
        left = left[len(block) :]
    if file.read(1):
        raise ValueError("bytes follow its end")
    return array


def map_array(path: Path, expected: str) -> np.ndarray:
    """The array of a `.npy` file as a view of its memory map."""
    size = check_file(path, expected)
    try:
        with path.open("rb") as file:
            shape, fortran, dtype, length = _npy_header(file)
            if length + math.prod(shape) * dtype.itemsize != size:
                raise ValueError(f"{size} bytes, not those of {dtype} of shape {list(shape)}")
            if not math.prod(shape):
                return np.zeros(shape, dtype)
            return np.memmap(path, dtype, "r", length, shape, "F" if fortran else "C")
    except Exception as error:  # numpy's reader of headers is one of Python's source code, and fails as that does
        raise UserError(f"{path}: damaged ({first_line(error)}), expected {expected}") from None


def _npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, whether in Fortran's order, type, and the header's own length."""
    start = file.tell()
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("holds Python objects")
    if any(size < 0 for size in shape):
        raise ValueError(f"shape {list(shape)}")
    return shape, bool(fortran), dtype, file.tell() - start


def _checksum(map: mmap.mmap, start: int, stop: int) -> int:
    found, step = 0, 1 << 24
    with memoryview(map) as view:
        for first in range(start, stop, step):
            with view[first : min(first + step, stop)] as part:
                found = zlib.crc32(part, found)
    return found


def _forget(map: mmap.mmap) -> None:
    if hasattr(mmap, "MADV_DONTNEED"):
        map.madvise(mmap.MADV_DONTNEED)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)})") from None
    with file:
        yield file


# Writing.


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A name to write under, in the folder of `path`, which is made: when the block ends well the file takes the place
    of an older one under its own name, else it vanishes."""
    beside = _beside(path)
    with _writing(path, beside), undone():
        path.parent.mkdir(parents=True, exist_ok=True)
        _forget_dead(path)
        try:
            yield beside
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write in that gets its name when the block ends well, and vanishes when something fails."""
    check_new_folder(folder)
    folder = folder.absolute()
    beside = _beside(folder)
    with _writing(folder, beside), undone():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _forget_dead(folder)
        try:
            beside.mkdir()
            yield beside
            if folder.exists():
                folder.rmdir()
            os.replace(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def check_new_folder(folder: Path) -> None:
    """An error unless the folder is absent or empty; the working folder cannot be replaced."""
    try:
        if not os.path.lexists(folder):
            return
        if not folder.is_dir() or any(folder.iterdir()):
            raise UserError(f"{folder}: exists already, expected a new folder")
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({reason_of(error)}), expected a new folder") from None
    if folder.resolve() == Path.cwd().resolve():
        raise UserError(f"{folder}: is the working folder, expected the name of a new one")


def check_writable(folder: Path) -> None:
    """Makes the folder and sees that files can be written in it: before the work whose result is to lie there."""
    with _writing(folder, folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not folder.is_dir():
            raise UserError(f"{folder}: is a file, expected a folder to write in")
        probe = _beside(folder / "probe")
        try:
            probe.write_bytes(b"")
        finally:
            probe.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    with new_file(path) as beside:
        beside.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, to_json(content, path, indent=2) + "\n")


def write_json_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """One object a line."""
    with new_file(path) as beside, beside.open("w", encoding="utf-8") as file:
        for entry in entries:
            file.write(to_json(entry, path) + "\n")


def to_json(content: Any, where: object, indent: int | None = None) -> str:
    """JSON as all read it: NaN and infinity are none."""
    try:
        return json.dumps(content, indent=indent, allow_nan=False)
    except ValueError as error:
        raise UserError(f"{where}: not written, a number is not finite ({first_line(error)})") from None


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Tensors by name, as `.npz` or safetensors."""
    with new_file(path) as beside:
        if path.suffix == ".npz":
            with beside.open("wb") as file:
                np.savez(file, **dict(tensors))  # type: ignore[arg-type]
        else:
            save_file(dict(tensors), beside, metadata={"format": "pt"})
            beside.chmod(0o644)  # the library leaves it to its owner alone


def _beside(path: Path) -> Path:
    """Of several processes, on several hosts, each may write the same file."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.partial")


_cleared: set[Path] = set()


def _forget_dead(path: Path) -> None:
    """Removes what processes of this host that were killed left in the path's folder; looks once, for a folder may hold
    many files."""
    folder = path.parent.absolute()
    if folder in _cleared:
        return
    _cleared.add(folder)
    for other in folder.glob(f"*.{glob.escape(socket.gethostname())}-*.partial"):
        number = other.name.removesuffix(".partial").rpartition("-")[2]
        if number.isdigit() and not _is_alive(int(number)):
            shutil.rmtree(other, ignore_errors=True) if other.is_dir() else other.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True


@contextmanager
def _writing(path: Path, beside: Path) -> Iterator[None]:
    """Says in one line that the file cannot be written; what has to do with other files passes."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be written ({first_line(error)})") from None
    except OSError as error:
        named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
        inside = named is None or any(other in (named, *named.parents) for other in (path, beside, path.parent))
        if not inside and named not in path.parents:
            raise
        raise UserError(f"{path}: cannot be written ({reason_of(error)})") from None
