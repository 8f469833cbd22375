"""Arrays on disk: safetensors, `.npz`, `.npy`. Everything that a file says about itself is checked."""

import json
import math
import mmap
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np
from numpy.lib import format as npy
from safetensors.numpy import save_file

from jclt.errors import UserError, first_line, reason_of
from jclt.files import check_file, create_file

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
"""The numpy type of each dtype name of safetensors files."""

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""


class SafetensorsFile:
    """The tensors of one file, as views of its memory map: only the tensors that are used are read."""

    def __init__(self, path: Path):
        size = check_file(path, "a safetensors file")
        with open_for_reading(path) as file:
            self.version = _get_version(os.fstat(file.fileno()))
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
                raise UserError(f"{path}: not a safetensors file, or cut off in its header ({size} bytes)")
            header = _parse_header(file.read(length), path)
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header.pop("__metadata__", None)
        _check_header(path, header, size - 8 - length)
        self.header, self.start, self.path = header, 8 + length, path

    def read_shape(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """A tensor's shape and type, from the header."""
        entry = self.header[name]
        return tuple(entry["shape"]), np.dtype(DTYPES[entry["dtype"]])

    def read_tensor(self, name: str) -> np.ndarray:
        _check_version(self.path, self.version)
        entry = self.header[name]
        count = math.prod(entry["shape"])
        start = self.start + entry["data_offsets"][0]
        return np.frombuffer(self.map, DTYPES[entry["dtype"]], count, start).reshape(entry["shape"])

    def forget_pages(self) -> None:
        """Drops the pages read so far, so that host memory does not hold a second copy of the checkpoint."""
        forget_pages(self.map)


def _parse_header(data: bytes, path: Path) -> dict[str, Any]:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            raise ValueError("a name twice")
        return entries

    try:
        header = json.loads(data.decode(), object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise UserError(f"{path}: not a safetensors file, its header is no JSON object")
    return header


def _check_header(path: Path, header: Mapping[str, Any], size: int) -> None:
    """Checks that each tensor has a type, shape and place, and that they fill the file without gaps or overlap."""

    def is_list_of_counts(x: Any, length: int | None = None) -> bool:
        numbers = isinstance(x, list) and all(type(item) is int and item >= 0 for item in x)
        return numbers and length in (None, len(x))

    for name, entry in header.items():
        if not isinstance(entry, dict) or not (
            is_list_of_counts(entry.get("shape")) and is_list_of_counts(entry.get("data_offsets"), 2)
        ):
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
    """A zip file. Sizes of members are known before anything is unpacked, and content is compared with its checksum."""

    def __init__(self, path: Path, expected: str):
        check_file(path, expected)
        self.path, self.expected = path, expected
        with self._report_damage(""), zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        self.members = {member.filename: member for member in members}
        if len(self.members) < len(members):
            raise UserError(f"{path}: a member is there twice, expected {expected}")

    def get_size(self, name: str) -> int:
        """The bytes of a member once it is unpacked."""
        return self.members[name].file_size

    def read(self, name: str, max_bytes: int) -> bytes:
        """A member's content; an error if it is longer than `max_bytes`."""
        if self.get_size(name) > max_bytes:
            raise UserError(
                f"{self.path}: '{name}' unpacks to {self.get_size(name)} bytes, expected at most {max_bytes}"
            )
        with self._report_damage(name), zipfile.ZipFile(self.path) as archive:
            return archive.read(name)

    @contextmanager
    def _report_damage(self, name: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # each part of the reader fails in another way on damaged files
            which = f"'{name}' is damaged" if name else f"damaged, or not {self.expected}"
            raise UserError(f"{self.path}: {which} ({first_line(error)})") from None


class NpzFile(Archive):
    """The arrays of a `.npz` file by name. Uncompressed arrays are views of its memory map."""

    def __init__(self, path: Path, expected: str = "a .npz file"):
        super().__init__(path, expected)
        self.header = {name.removesuffix(".npy"): entry for name, entry in self.members.items()}
        self.checked = set[str]()
        """The arrays whose checksum has been compared: one that stays on disk is read again and again."""
        with open_for_reading(path) as file:
            self.version = _get_version(os.fstat(file.fileno()))
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read_shape(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """An array's shape and type, read before any memory is allocated for it."""
        entry = self.header[name]
        with self._report_damage(name), zipfile.ZipFile(self.path) as archive, archive.open(entry) as file:
            shape, _, dtype, length = _read_npy_header(file)
            if length + math.prod(shape) * dtype.itemsize != entry.file_size:
                raise ValueError(f"{entry.file_size} bytes, not those of {dtype} of shape {list(shape)}")
            return shape, dtype

    def read_tensor(self, name: str) -> np.ndarray:
        _check_version(self.path, self.version)
        shape, dtype = self.read_shape(name)
        entry = self.header[name]
        with self._report_damage(name):
            if entry.compress_type != zipfile.ZIP_STORED:
                with zipfile.ZipFile(self.path) as archive, archive.open(entry) as file:
                    _, fortran, _, _ = _read_npy_header(file)
                    return _read_array(file, shape, dtype, fortran)
            # The member's header has 30 bytes. Its last 4 are the lengths of the name and extra field after it.
            start = entry.header_offset + 30
            start += sum(int.from_bytes(self.map[start - n : start - n + 2], "little") for n in (4, 2))
            stop = start + entry.file_size
            if name not in self.checked:
                if stop > len(self.map) or _compute_checksum(self.map, start, stop) != entry.CRC:
                    raise ValueError("its checksum differs from its content's")
                self.checked.add(name)
            with open_for_reading(self.path) as file:
                file.seek(start)
                _, fortran, _, length = _read_npy_header(file)
            return np.ndarray(shape, dtype, self.map, start + length, order="F" if fortran else "C")

    def forget_pages(self) -> None:
        forget_pages(self.map)


def _read_array(file: Any, shape: tuple[int, ...], dtype: np.dtype[Any], fortran: bool) -> np.ndarray:
    """Reads the numbers after the header into a new array, up to the end, where zipfile compares the checksum."""
    array = np.empty(shape, dtype, order="F" if fortran else "C")
    remaining = array.reshape(-1, order="A").view(np.uint8).data
    while len(remaining):
        block = file.read(min(len(remaining), 1 << 24))
        if not block:
            raise ValueError(f"{len(remaining)} bytes are missing at its end")
        remaining[: len(block)] = block
        remaining = remaining[len(block) :]
    if file.read(1):
        raise ValueError("bytes follow its end")
    return array


def map_array(path: Path, expected: str) -> np.ndarray:
    """The array of a `.npy` file as a view of its memory map."""
    size = check_file(path, expected)
    try:
        with path.open("rb") as file:
            shape, fortran, dtype, length = _read_npy_header(file)
            if length + math.prod(shape) * dtype.itemsize != size:
                raise ValueError(f"{size} bytes, not those of {dtype} of shape {list(shape)}")
            if not math.prod(shape):
                return np.zeros(shape, dtype)
            return np.memmap(path, dtype, "r", length, shape, "F" if fortran else "C")
    except SystemError:  # in CPython 3.11 threads that parse source at the same time can disturb each other
        return map_array(path, expected)
    except Exception as error:  # numpy parses headers as Python source, which fails in many ways
        raise UserError(f"{path}: damaged ({first_line(error)}), expected {expected}") from None


def _read_npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, whether the order is Fortran's, type, and length of the header."""
    start = file.tell()
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("holds Python objects")
    if any(size < 0 for size in shape):
        raise ValueError(f"shape {list(shape)}")
    return shape, bool(fortran), dtype, file.tell() - start


def _compute_checksum(map: mmap.mmap, start: int, stop: int) -> int:
    """The CRC-32 of a part of the memory map."""
    checksum, step = 0, 1 << 24
    with memoryview(map) as view:
        for first in range(start, stop, step):
            with view[first : min(first + step, stop)] as part:
                checksum = zlib.crc32(part, checksum)
    return checksum


def _get_version(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is written to, or another takes its place."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _check_version(path: Path, version: tuple[int, ...]) -> None:
    """An error if the file is no longer the one that was opened: parts of a map that were cut off end the process."""
    try:
        current = _get_version(path.stat())
    except OSError as error:
        raise UserError(f"{path}: cannot be read any more ({reason_of(error)}), expected it as it was opened") from None
    if current != version:
        raise UserError(f"{path}: has changed since it was opened, expected it to stay as it was")


def forget_pages(map: mmap.mmap) -> None:
    if hasattr(mmap, "MADV_DONTNEED"):
        map.madvise(mmap.MADV_DONTNEED)


@contextmanager
def open_for_reading(path: Path) -> Iterator[IO[bytes]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)})") from None
    with file:
        yield file


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors by name, as `.npz` or safetensors by the suffix of the path."""
    with create_file(path) as partial:
        if path.suffix == ".npz":
            with partial.open("wb") as file:
                np.savez(file, **dict(tensors))  # type: ignore[arg-type]
        else:
            save_file(dict(tensors), partial, metadata={"format": "pt"})
            partial.chmod(0o644)  # the library makes files that only their owner can read
