"""Ways to damage a file: each is a function of a random generator and the valid bytes, which returns damaged bytes."""

import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import PurePath
from typing import Any, NamedTuple

from numpy.random import Generator

Mutation = Callable[[Generator, bytes], bytes]


def pick(rng: Generator, items: Any) -> Any:
    return items[int(rng.integers(len(items)))]


# Bytes, whatever they mean.


def flip_bit(rng: Generator, data: bytes) -> bytes:
    at = int(rng.integers(len(data)))
    return data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :]


def change_byte(rng: Generator, data: bytes) -> bytes:
    at = int(rng.integers(len(data)))
    return data[:at] + bytes([data[at] ^ int(rng.integers(1, 256))]) + data[at + 1 :]


def change_bytes(rng: Generator, data: bytes) -> bytes:
    for _ in range(int(rng.integers(2, 20))):
        data = change_byte(rng, data)
    return data


def cut_off(rng: Generator, data: bytes) -> bytes:
    return data[: int(rng.integers(1, len(data)))]


def cut_in_front(rng: Generator, data: bytes) -> bytes:
    return data[int(rng.integers(1, len(data))) :]


def _block(rng: Generator, data: bytes) -> slice:
    """Never all of the file: two copies of a packed file in a row are a valid file."""
    start = int(rng.integers(1, len(data)))
    return slice(start, start + int(rng.integers(1, 65)))


def leave_out(rng: Generator, data: bytes) -> bytes:
    block = _block(rng, data)
    return data[: block.start] + data[block.stop :]


def repeat(rng: Generator, data: bytes) -> bytes:
    block = _block(rng, data)
    return data[: block.stop] + data[block] * int(rng.integers(1, 9)) + data[block.stop :]


def insert(rng: Generator, data: bytes) -> bytes:
    at = int(rng.integers(1, len(data)))
    return data[:at] + rng.bytes(int(rng.integers(1, 33))) + data[at:]


def blank(rng: Generator, data: bytes) -> bytes:
    block = _block(rng, data)
    return data[: block.start] + bytes(len(data[block])) + data[block.stop :]


def swap(rng: Generator, data: bytes) -> bytes:
    block = _block(rng, data)
    length = len(data[block])
    other = int(rng.integers(0, len(data) - length + 1))
    new = bytearray(data)
    new[block], new[other : other + length] = data[other : other + length], data[block]
    return bytes(new)


BYTES: tuple[Mutation, ...] = (
    flip_bit,
    change_byte,
    change_bytes,
    cut_off,
    cut_in_front,
    leave_out,
    repeat,
    insert,
    blank,
    swap,
)
"""Damage by a disk or a broken transfer, which a checksum detects."""


def empty(rng: Generator, data: bytes) -> bytes:
    return b""


def noise(rng: Generator, data: bytes) -> bytes:
    return rng.bytes(len(data))


# Text.

ODD_TEXTS = (
    "",
    "text",
    "\x1b[31mred\x1b[0m",
    "two\nlines",
    "\u202eright to left",
    "\x00",
    "\ud800",
    "ü\u2028é\x85\x0c\x1c",
    "../../outside",
    "/nowhere/outside",
    "a" * 100_000,
)


def insert_text(rng: Generator, data: bytes) -> bytes:
    at = int(rng.integers(len(data) + 1))
    return data[:at] + pick(rng, ODD_TEXTS).encode("utf-8", "surrogatepass") + data[at:]


def recode(rng: Generator, data: bytes) -> bytes:
    text = data.decode("utf-8", "replace")
    coding = pick(rng, ("utf-8-sig", "utf-16", "utf-32", "latin-1", "cp500"))
    return (text + "ü" * (coding == "latin-1")).encode(coding, "replace")


def nest(rng: Generator, data: bytes) -> bytes:
    sign = pick(rng, (b"[", b'{"a":', b"- "))
    return sign * 100_000 + data


def turn_lines(rng: Generator, data: bytes) -> bytes:
    lines = data.split(b"\n")
    rng.shuffle(lines)
    return pick(rng, (b"\n", b"\r\n", b"\r", b"\n\n", b" ")).join(lines)


TEXT: tuple[Mutation, ...] = (insert_text, recode, nest, turn_lines)

# JSON.

DEEP = "[" * 100_000 + "]" * 100_000
LONG = "9" * 6_000
RAW = (DEEP, '{"a":' * 50_000 + "1" + "}" * 50_000, LONG, "1e999", "-0", "NaN", "01", "")
"""Texts that stand for no value of Python."""
ODD_NUMBERS = (0, -1, 1, 2, 7, 10**6, 2**31, 2**63, 4 * 10**12, 10**400, -(10**30), 0.5, -0.5, 1e308, 1e-320)
ODD_VALUES = (
    *(None, True, False, float("nan"), float("inf"), [], {}, [[]], [None], [1, 2, 3], {"a": 1}, [{"a": []}]),
    *ODD_NUMBERS,
    *ODD_TEXTS,
)
_MARK = "the place of a raw text"


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Each container with each of its keys, at every depth."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    found = [(value, key) for key in keys]
    for key in keys:
        found += _places(value[key])
    return found


def _changed_value(rng: Generator, value: Any) -> Any:
    """A value near the old one, or an odd one."""
    kind = rng.random()
    if kind < 0.1:
        return _MARK
    if isinstance(value, int | float) and kind < 0.6:
        return pick(rng, (value + 1, value - 1, -value, value * 2, value * 10**9, value // 2, str(value), [value]))
    if isinstance(value, str) and kind < 0.4:
        return pick(rng, (value + "x", value[:-1], value.upper(), value * 3, [value], {value: value}))
    if isinstance(value, list) and value and kind < 0.5:
        return pick(rng, (value[:-1], value + value[:1], value[::-1], value * 50, [value], value[0]))
    return pick(rng, ODD_VALUES)


def change_value(rng: Generator, value: Any) -> Any:
    """Changes one part of the JSON."""
    places = _places(value)
    if not places or rng.random() < 0.02:
        return _changed_value(rng, value)
    holder, key = pick(rng, places)
    kind = rng.random()
    if kind < 0.7:
        holder[key] = _changed_value(rng, holder[key])
    elif kind < 0.8:
        del holder[key]
    elif kind < 0.9:
        other, other_key = pick(rng, places)
        holder[key] = json.loads(json.dumps(other[other_key]))
    elif isinstance(holder, dict):
        holder[pick(rng, (*ODD_TEXTS, str(key) + "x"))] = holder.pop(key)
    else:
        holder.insert(key, _changed_value(rng, holder[key]))
    return value


def json_text(rng: Generator, value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=bool(rng.random() < 0.5)).replace(f'"{_MARK}"', pick(rng, RAW))
    return text.encode("utf-8", "surrogatepass")


def change_json(rng: Generator, data: bytes) -> bytes:
    value = json.loads(data)
    for _ in range(int(rng.integers(1, 3))):
        value = change_value(rng, value)
    return json_text(rng, value)


def double_key(rng: Generator, data: bytes) -> bytes:
    value = json.loads(data)
    name = json.dumps(pick(rng, list(value))) if isinstance(value, dict) and value else '"a"'
    return b"{" + name.encode() + b":" + json_text(rng, _changed_value(rng, 1)) + b"," + data.strip()[1:]


def change_json_line(rng: Generator, data: bytes) -> bytes:
    lines = data.split(b"\n")
    at = int(rng.integers(max(1, len(lines) - 1)))
    if rng.random() < 0.2:
        lines[at] = pick(rng, (b"", b" ", b"5", b"null", b"[]", b'"text"', lines[at] + lines[at], lines[at][:-1]))
    else:
        lines[at] = change_json(rng, lines[at])
    return b"\n".join(lines)


# Safetensors.


def _safetensors(header: bytes, content: bytes, length: int | None = None) -> bytes:
    return ((len(header) if length is None else length) % 2**64).to_bytes(8, "little") + header + content


def _split_safetensors(data: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def header_length(rng: Generator, data: bytes) -> bytes:
    header, content = _split_safetensors(data)
    odd = (0, 1, len(header) - 1, len(header) + 1, len(header) + 8, len(data), 2**31, 2**63, 2**64 - 1)
    return _safetensors(header, content, pick(rng, odd))


def header_json(rng: Generator, data: bytes) -> bytes:
    header, content = _split_safetensors(data)
    return _safetensors(pick(rng, (change_json, double_key, *TEXT))(rng, header), content)


def header_entry(rng: Generator, data: bytes) -> bytes:
    """Changes the type, shape or offsets of a tensor, so that the header stays valid JSON."""
    raw, content = _split_safetensors(data)
    header = json.loads(raw)
    names = [name for name in header if name != "__metadata__"]
    entry, other = header[pick(rng, names)], header[pick(rng, names)]
    kind, shift = int(rng.integers(8)), int(rng.integers(-16, 17))
    if kind == 0:
        entry["dtype"] = pick(rng, ("F16", "BF16", "I32", "U32", "F64", "F8_E5M2", "F4", "C64", "BOOL", "f32"))
    elif kind == 1:
        entry["shape"] = pick(rng, (entry["shape"][::-1], [-1], [0], [], [10**9, 10**9], [*entry["shape"], 1]))
    elif kind == 2:
        entry["data_offsets"] = [place + shift for place in entry["data_offsets"]]
    elif kind == 3:
        entry["data_offsets"] = entry["data_offsets"][::-1]
    elif kind == 4:
        entry["data_offsets"] = [entry["data_offsets"][0], entry["data_offsets"][1] + shift]
    elif kind == 5:
        entry["data_offsets"] = list(other["data_offsets"])
    elif kind == 6:
        entry |= {"dtype": other["dtype"], "shape": other["shape"], "data_offsets": other["data_offsets"]}
    else:
        header[pick(rng, names) + "x"] = header.pop(pick(rng, names))
    return _safetensors(json.dumps(header).encode(), content)


SAFETENSORS: tuple[Mutation, ...] = (header_length, header_json, header_entry)

# Arrays of numpy.


def npy_header(rng: Generator, data: bytes) -> bytes:
    """Changes the header of a `.npy`, or removes its end."""
    length = int.from_bytes(data[8:10], "little")
    text, content = data[10 : 10 + length].decode("latin-1"), data[10 + length :]
    wrong = {
        "'shape': (": pick(
            rng, ("'shape': (-", "'shape': (10**9, ", "'shape': (9999999999, ", "'shape': ((", "'s': (")
        ),
        "'descr': '": pick(rng, ("'descr': '>", "'descr': 'O", "'descr': '|V", "'descr': 'M", "'descr': 'nonsense")),
        "False": pick(rng, ("True", "None", "2", "[")),
        "{": pick(rng, ("{{", "", "[" * 5_000, "'", "(lambda: {", "{'more': 1, ")),
        "}": pick(rng, ("", "}}", "\\", "\n\n\n", "}" + "\0")),
    }
    old = pick(rng, [old for old in wrong if old in text])
    text = text.replace(old, wrong[old])
    version = pick(rng, (b"\1\0", b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\x09\0"))
    size = len(text.encode("latin-1")) if rng.random() < 0.9 else int(rng.integers(1 << 16))
    return b"\x93NUMPY" + version + size.to_bytes(2 if version == b"\1\0" else 4, "little") + text.encode() + content


# Archives.


class Member(NamedTuple):
    name: bytes
    method: int
    packed: bytes
    checksum: int
    size: int


def members(data: bytes) -> list[Member]:
    parts = []
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for entry in archive.infolist():
            lengths = data[entry.header_offset + 26 : entry.header_offset + 30]
            start = entry.header_offset + 30 + int.from_bytes(lengths[:2], "little")
            start += int.from_bytes(lengths[2:], "little")
            packed = data[start : start + entry.compress_size]
            parts.append(Member(entry.filename.encode(), entry.compress_type, packed, entry.CRC, entry.file_size))
    return parts


def archive(parts: list[Member]) -> bytes:
    """A zip file with these members, even if their fields are wrong."""
    body, directory = b"", b""
    for part in parts:
        numbers = [(part.method, 2), (0, 4), (part.checksum, 4), (len(part.packed), 4), (part.size, 4)]
        fields = b"".join((number % 256**size).to_bytes(size, "little") for number, size in numbers)
        fields += len(part.name).to_bytes(2, "little") + bytes(2)
        place = len(body).to_bytes(4, "little")
        directory += b"PK\1\2" + b"\x14\0\x14\0\0\0" + fields + bytes(10) + place + part.name
        body += b"PK\3\4" + b"\x14\0\0\0" + fields + part.name + part.packed
    count = len(parts).to_bytes(2, "little")
    sizes = len(directory).to_bytes(4, "little") + len(body).to_bytes(4, "little")
    return body + directory + b"PK\5\6" + bytes(4) + count + count + sizes + bytes(2)


def store_member(name: bytes, content: bytes) -> Member:
    return Member(name, zipfile.ZIP_STORED, content, zlib.crc32(content), len(content))


def unpack(part: Member) -> bytes:
    return part.packed if part.method == zipfile.ZIP_STORED else zlib.decompress(part.packed, -15)


BOMB = 1 << 29
"""The size of the unpacked bomb, in bytes."""


@cache
def bomb() -> Member:
    """Half a gigabyte of zeros, deflated."""
    block, packer = bytes(1 << 20), zlib.compressobj(9, wbits=-15)
    once = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    checksum = 0
    for _ in range(BOMB >> 20):
        checksum = zlib.crc32(block, checksum)
    return Member(b"bomb.npy", zipfile.ZIP_DEFLATED, once * (BOMB >> 20) + packer.flush(), checksum, BOMB)


def zip_member(rng: Generator, data: bytes) -> bytes:
    """Changes the content of a member, with the right checksum: the reader must notice."""
    parts = members(data)
    at = int(rng.integers(len(parts)))
    content, name = unpack(parts[at]), parts[at].name
    mutations: tuple[Mutation, ...] = BYTES if len(content) > 1 else (noise,)
    if content[:1] == b"{":
        mutations = (change_json, change_json, double_key, *TEXT)
    elif content[:6] == b"\x93NUMPY":
        mutations = (npy_header, npy_header, *mutations, npy_json)
    parts[at] = store_member(name, pick(rng, mutations)(rng, content))
    return archive(parts)


def npy_json(rng: Generator, data: bytes) -> bytes:
    """Changes the JSON in an array of bytes; if it holds none, the bytes."""
    start = 10 + int.from_bytes(data[8:10], "little")
    header, content = data[10:start].decode("latin-1"), data[start:]
    try:
        changed = change_json(rng, content)
    except ValueError:
        changed = noise(rng, content)
    text = header.replace(f"({len(content)},)", f"({len(changed)},)").encode("latin-1")
    return data[:8] + len(text).to_bytes(2, "little") + text + changed


def zip_fields(rng: Generator, data: bytes) -> bytes:
    """Changes a number in a local header or in the directory."""
    sign = pick(rng, (b"PK\1\2", b"PK\3\4"))
    starts = [at for at in range(len(data) - 46) if data[at : at + 4] == sign]
    if not starts:
        return change_byte(rng, data)
    central = {10: 2, 16: 4, 20: 4, 24: 4, 28: 2, 30: 2, 42: 4}
    local = {8: 2, 14: 4, 18: 4, 22: 4, 26: 2, 28: 2}
    offset, size = pick(rng, list((central if sign == b"PK\1\2" else local).items()))
    at = pick(rng, starts) + offset
    old = int.from_bytes(data[at : at + size], "little")
    new = pick(rng, (0, 1, old + 1, max(0, old - 1), 2 * old, 8, 12, 14, 99, 2**31, 2**32 - 1)) % 256**size
    return data[:at] + new.to_bytes(size, "little") + data[at + size :]


def zip_names(rng: Generator, data: bytes) -> bytes:
    parts = members(data)
    at, kind = int(rng.integers(len(parts))), int(rng.integers(5))
    if kind == 0:
        del parts[at]
    elif kind == 1:
        parts.append(parts[at])
    elif kind == 2:
        name = pick(rng, (*ODD_TEXTS[:-1], "../" + parts[at].name.decode())).encode("utf-8", "surrogatepass")
        parts[at] = parts[at]._replace(name=name)
    elif kind == 3:
        parts.append(store_member(b"unknown.npy", rng.bytes(100)))
    else:
        other = int(rng.integers(len(parts)))
        parts[at], parts[other] = parts[at]._replace(name=parts[other].name), parts[other]._replace(name=parts[at].name)
    return archive(parts)


def zip_bomb(rng: Generator, data: bytes) -> bytes:
    """Adds a huge member, or replaces a known one by it, or by one that only claims its size."""
    parts = members(data)
    at = int(rng.integers(len(parts)))
    kind = rng.random()
    if kind < 0.4:
        parts.append(bomb())
    elif kind < 0.7:
        parts[at] = bomb()._replace(name=parts[at].name)
    else:
        parts[at] = parts[at]._replace(size=2**32 - 1)
    return archive(parts)


ARCHIVE: tuple[Mutation, ...] = (zip_member, zip_member, zip_fields, zip_names, zip_bomb)


def within_gzip(change: Mutation) -> Mutation:
    def changed(rng: Generator, data: bytes) -> bytes:
        return gzip.compress(change(rng, gzip.decompress(data)), 1)

    changed.__name__ = f"packed {change.__name__}"
    return changed


def gzip_bomb(rng: Generator, data: bytes) -> bytes:
    """Puts much white space before the content."""
    return gzip.compress(b" " * (1 << 20)) * (BOMB >> 20) + data


def mutations_of(name: str) -> tuple[Mutation, ...]:
    """The ways to damage a file of this name: those of its kind as often as those for any bytes."""
    any_kind: tuple[Mutation, ...] = (*BYTES, empty, noise)
    json_ways: tuple[Mutation, ...] = (*(change_json,) * 6, double_key, *TEXT)
    lines: tuple[Mutation, ...] = (*(change_json_line,) * 4, *TEXT)
    kinds: dict[str, tuple[Mutation, ...]] = {
        ".json": json_ways,
        ".yaml": json_ways,
        ".json.gz": (*map(within_gzip, json_ways), gzip_bomb),
        ".jsonl": lines,
        ".jsonl.gz": (*map(within_gzip, lines), gzip_bomb),
        ".txt": TEXT,
        ".safetensors": SAFETENSORS * 3,
        ".npz": ARCHIVE * 2,
        ".pt": ARCHIVE * 2,
        ".npy": (npy_header,) * 6,
    }
    suffixes = PurePath(name).suffixes
    return any_kind + kinds.get("".join(suffixes[-2:]), kinds.get("".join(suffixes[-1:]), ()))
