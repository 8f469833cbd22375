"""GGUF files: the keys and the tensors of one file, checked against its size.

The container is read here, and not by the `gguf` package: its reader goes through tens of thousands of strings one view
at a time, and trusts every length in the file. What the package does is dequantise.
"""

import math
import mmap
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import ml_dtypes
import numpy as np

from jclt.array_files import forget_pages, open_for_reading
from jclt.errors import UserError, first_line
from jclt.files import check_file

Result = TypeVar("Result")
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""How `struct` names the types of numbers in keys."""
FLOAT, STRING, ARRAY = 6, 8, 9
PLAIN: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}
"""The types of tensors that are not quantised."""
MOST_DIMENSIONS = 4


class Entry(NamedTuple):
    """Where a tensor is in the file, and what it is."""

    shape: tuple[int, ...]
    kind: str  # the type's name, such as Q4_K
    start: int
    nbytes: int


class GgufFile:
    """The keys of a file, and its tensors as float numbers: only the tensors that are used are read."""

    def __init__(self, path: Path):
        check_file(path, "a GGUF file")
        with open_for_reading(path) as file:
            magic = file.read(4)
            if magic != b"GGUF":
                raise UserError(f"{path}: not a GGUF file, begins with {magic!r}")
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.path = path
        cursor = Cursor(self.map, 4, path)
        version, tensors, keys = cursor.unpack("<IQQ")
        if version not in (2, 3):
            raise UserError(f"{path}: GGUF version {version}, expected 2 or 3, little-endian")
        self.keys = cursor.read_by_name("key", keys, lambda name: cursor.read_value(name, cursor.unpack("<I")[0]))
        raw = cursor.read_by_name("tensor", tensors, cursor.read_tensor_entry)
        self.header = _place_tensors(path, raw, cursor.at, self.keys.get("general.alignment", 32), len(self.map))

    def read_shape(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        entry = self.header[name]
        return entry.shape, np.dtype(PLAIN.get(entry.kind, np.float32))

    def read_tensor(self, name: str) -> np.ndarray:
        """The numbers of a tensor: a view of the memory map, or a new array where they are quantised."""
        entry = self.header[name]
        if entry.kind in PLAIN:
            return np.frombuffer(self.map, PLAIN[entry.kind], math.prod(entry.shape), entry.start).reshape(entry.shape)
        stored = np.frombuffer(self.map, np.uint8, entry.nbytes, entry.start).reshape(*entry.shape[:-1], -1)
        return _dequantize(entry.kind, stored)

    def forget_pages(self) -> None:
        forget_pages(self.map)


class Cursor:
    """Reads one value after another. No length in the file is trusted."""

    def __init__(self, data: mmap.mmap, at: int, path: Path):
        self.data, self.at, self.path = data, at, path

    def skip(self, count: int, size: int = 1) -> int:
        """The place of `count` items of `size` bytes, behind which the cursor goes on."""
        start, self.at = self.at, self.at + count * size
        if self.at > len(self.data):
            raise UserError(f"{self.path}: damaged or cut off, has {len(self.data)} bytes, expected {self.at} or more")
        return start

    def unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack_from(form, self.data, self.skip(struct.calcsize(form)))

    def read_string(self) -> str:
        (length,) = self.unpack("<Q")
        start = self.skip(length)
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError:
            raise UserError(f"{self.path}: damaged, the text at byte {start} is not UTF-8") from None

    def read_by_name(self, what: str, count: int, read: Callable[[str], Result]) -> dict[str, Result]:
        found: dict[str, Result] = {}
        for _ in range(count):
            name = self.read_string()
            if name in found:
                raise UserError(f"{self.path}: {what} '{name}' is there twice, expected it once")
            found[name] = read(name)
        return found

    def read_value(self, name: str, kind: int) -> Any:
        """A number, a text, or a list of one of them."""
        if kind == ARRAY:
            item, count = self.unpack("<IQ")
            if item in SCALARS:
                dtype = np.dtype(SCALARS[item]).newbyteorder("<")
                return np.frombuffer(self.data, dtype, count, self.skip(count, dtype.itemsize)).tolist()
            if item == STRING:
                self.skip(count, 8)  # as many lengths must be there at least
                self.at -= 8 * count
                return [self.read_string() for _ in range(count)]
            raise UserError(f"{self.path}: key '{name}' is an array of type {item}, expected numbers or texts")
        if kind == STRING:
            return self.read_string()
        if kind not in SCALARS:
            raise UserError(f"{self.path}: key '{name}' is of type {kind}, expected a number, a text or an array")
        (value,) = self.unpack(f"<{SCALARS[kind]}")
        # A float32 becomes the shortest number that rounds to it: 1e-05, not 9.99999974738e-06.
        return float(str(np.float32(value))) if kind == FLOAT else value

    def read_tensor_entry(self, name: str) -> tuple[tuple[int, ...], int, int]:
        """Shape, number of the type, and offset."""
        (dimensions,) = self.unpack("<I")
        if dimensions > MOST_DIMENSIONS:
            raise UserError(f"{self.path}: tensor '{name}' has {dimensions} axes, expected at most {MOST_DIMENSIONS}")
        *shape, kind, offset = self.unpack(f"<{dimensions}QIQ")
        return tuple(reversed(shape)), kind, offset


def _place_tensors(
    path: Path, raw: dict[str, tuple[tuple[int, ...], int, int]], end: int, alignment: Any, size: int
) -> dict[str, Entry]:
    """The place of each tensor; an error unless they follow one another, each in the same alignment."""
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise UserError(f"{path}: 'general.alignment' is {alignment!r}, expected a power of two")
    base, entries, expected = -(-end // alignment) * alignment, dict[str, Entry](), 0
    for name, (shape, number, offset) in raw.items():
        kind, block, block_bytes = _find_type(path, name, number)
        columns = shape[-1] if shape else 1
        if not all(shape) or columns % block:
            wanted = f"positive sizes, the last a multiple of {block}"
            raise UserError(f"{path}: tensor '{name}' of type {kind} has shape {list(shape)}, expected {wanted}")
        if offset != expected:
            raise UserError(f"{path}: tensor '{name}' is damaged: lies at byte {offset} of all, expected {expected}")
        nbytes = math.prod(shape) // block * block_bytes
        if base + offset + nbytes > size:
            raise UserError(f"{path}: cut off, has {size} bytes, expected at least {base + offset + nbytes}")
        entries[name] = Entry(shape, kind, base + offset, nbytes)
        expected = -(-(offset + nbytes) // alignment) * alignment
    return entries


def _find_type(path: Path, tensor: str, number: int) -> tuple[str, int, int]:
    """Name, numbers in a block, and bytes of a block of a tensor's type."""
    gguf = load_gguf_package()
    try:
        kind = gguf.GGMLQuantizationType(number)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise UserError(f"{path}: tensor '{tensor}' is of type {number}, expected one that GGUF has") from None
    if kind.name not in PLAIN and (reason := _find_refusal(kind.name)):
        raise UserError(f"{path}: tensor '{tensor}' is of type {kind.name}, expected one that is read ({reason})")
    return kind.name, block, block_bytes


@cache
def _find_refusal(kind: str) -> str | None:
    """Why the package does not dequantise this type; it is tried on one block."""
    _, block_bytes = load_gguf_package().GGML_QUANT_SIZES[load_gguf_package().GGMLQuantizationType[kind]]
    try:
        _dequantize(kind, np.zeros((1, block_bytes), np.uint8))
    except Exception as error:
        return first_line(error)
    return None


def _dequantize(kind: str, stored: np.ndarray) -> np.ndarray:
    gguf = load_gguf_package()
    with np.errstate(all="ignore"):  # what is not finite is found later, and reported with the tensor's name
        return gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind])


def load_gguf_package() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise UserError(
            "GGUF: the package gguf is not installed, expected it (pip install 'jclt[gguf]') to read GGUF files"
        ) from None
    return gguf
