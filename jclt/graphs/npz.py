"""The graph file: one compressed `.npz`, with the array `about` for texts and other JSON."""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jclt.array_files import NpzFile
from jclt.errors import UserError
from jclt.files import create_file, parse_json, to_json
from jclt.graphs.adjacency import Adjacency, count_edges, count_rows_per_block, is_large, stack_blocks
from jclt.memory import check_memory
from jclt.shapes import Float

FORMAT, VERSIONS = "jclt-graph", (1, 2, 3)
"""Version 2 adds weights of the outputs. A reader that ignored them would compute other influences. Version 3 adds
heads and residual streams as nodes."""

ARRAY_AXES = {
    "bias": "N",
    "rest": "N",
    "rest_mass": "N",
    "values": "N",
    "features": "n3",
    "activations": "n",
    "errors": "e2",
    "tokens": "T",
    "positions": "q",
    "logit_tokens": "k",
    "logit_positions": "k",
    "logit_probabilities": "k",
}
"""The arrays except the edges. A letter is an axis, a digit the length of an axis."""

OPTIONAL_AXES = {"logit_weights": "k", "whole_shares": "N", "heads": "h3", "streams": "r2"}

OPTIONAL_NODES = ("heads", "streams")
"""Not in the file of a graph without such nodes."""

INTEGER_ARRAYS = ("features", "errors", "tokens", "positions", "logit_tokens", "logit_positions", *OPTIONAL_NODES)

TEXT_AXES = {"token_texts": "T", "logit_names": "k"}

OPTIONAL_TEXTS = {"labels": "N"}
"""Empty where a graph has none, and absent from older files."""

JSON_FIELDS: dict[str, type] = {"layers": int, "provenance": dict, "supernodes": dict, "annotations": dict}

MAX_ABOUT_BYTES = 1 << 28
"""Most bytes of texts, provenance and annotations in a file. Those of 100,000 nodes take a tenth of it."""

STORED_FIELDS = (*ARRAY_AXES, *OPTIONAL_AXES, *TEXT_AXES, *OPTIONAL_TEXTS, *JSON_FIELDS)
"""The fields of a `Graph` in the file, except the edges."""


def write_file(path: str | Path, fields: Mapping[str, Any], adjacency: Adjacency) -> None:
    """Writes the `STORED_FIELDS` and the edges to one file. An older file is replaced when the new one is complete."""
    with create_file(Path(path)) as partial:
        _write_archive(partial, fields, adjacency)


def _write_archive(path: Path, fields: Mapping[str, Any], adjacency: Adjacency) -> None:
    texts = {name: fields[name] for name in (*TEXT_AXES, *JSON_FIELDS)}
    texts |= {name: fields[name] for name in OPTIONAL_TEXTS if fields[name]}
    has_optional_nodes = any(len(fields[name]) for name in OPTIONAL_NODES)
    version = 3 if has_optional_nodes else 1 if fields["logit_weights"] is None else 2
    about = to_json(to_plain({"format": FORMAT, "version": version} | texts, "graph"), "graph").encode()
    if len(about) > MAX_ABOUT_BYTES:
        raise UserError(f"graph: its texts and annotations take {len(about)} bytes, expected at most {MAX_ABOUT_BYTES}")
    arrays = {name: fields[name] for name in (*ARRAY_AXES, *OPTIONAL_AXES) if fields[name] is not None}
    arrays = {name: array for name, array in arrays.items() if name not in OPTIONAL_NODES or len(array)}
    arrays |= {"about": np.frombuffer(about, np.uint8)}
    for name, array in (arrays | {"edges": adjacency}).items():
        if array.dtype.kind not in "fiu":  # numpy writes other number types as bytes without a type
            raise UserError(f"graph: {name} is of type {array.dtype}, expected one of numpy's own number types")
    arrays |= _pack(adjacency)
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_file(path: Path) -> tuple[dict[str, Any], Adjacency]:
    """Reads the `STORED_FIELDS` and the edges from a file of `write_file`, and checks that their lengths agree. No code
    in the file is executed."""
    file = NpzFile(path, "a graph that jclt saved")
    about = _read_about(path, file)
    axes = ARRAY_AXES | {name: axis for name, axis in OPTIONAL_AXES.items() if name in file.header}
    nodes = _check_lengths(path, file, about, axes)
    fields: dict[str, Any] = dict.fromkeys(OPTIONAL_AXES)
    fields |= {name: np.require(file.read_tensor(name), requirements="W") for name in axes}
    fields |= {name: tuple(about[name]) for name in TEXT_AXES} | {name: about[name] for name in JSON_FIELDS}
    fields |= {name: tuple(about.get(name, ())) for name in OPTIONAL_TEXTS}
    return fields, _unpack(path, file, nodes)


def to_plain(value: Any, where: object) -> Any:
    """The value with all arrays and numbers converted to Python's types, so that it can be written as JSON."""
    try:
        return _to_plain(value)
    except RecursionError:
        raise UserError(f"{where}: provenance or annotations are nested too deeply to be written") from None
    except TypeError as error:
        raise UserError(f"{where}: provenance or annotations hold {error}, expected what JSON can say") from None


def _to_plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_to_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy's and JAX's arrays and numbers
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")


def _read_about(path: Path, file: NpzFile) -> dict[str, Any]:
    if "about" not in file.header:
        raise UserError(f"{path}: not a graph that jclt saved, holds the arrays {', '.join(list(file.header)[:9])}")
    shape, dtype = file.read_shape("about")
    if len(shape) != 1 or dtype != np.uint8 or shape[0] > MAX_ABOUT_BYTES:
        raise UserError(f"{path}: 'about' is damaged: {dtype}{list(shape)}, expected at most {MAX_ABOUT_BYTES} bytes")
    about = parse_json(file.read_tensor("about").tobytes(), f"{path}: 'about' is damaged")
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise UserError(f"{path}: not a graph that jclt saved, expected format '{FORMAT}' in 'about'")
    version = about.get("version")
    if type(version) is not int or version not in VERSIONS:
        newer = ": written by a newer jclt" if type(version) is int and version > max(VERSIONS) else ""
        known = f"{min(VERSIONS)} to {max(VERSIONS)}"
        raise UserError(f"{path}: version {version}, expected {known}, those that this jclt reads{newer}")
    texts = [*TEXT_AXES, *(name for name in OPTIONAL_TEXTS if name in about)]
    for name, kind in JSON_FIELDS.items() | dict.fromkeys(texts, list).items():
        if type(about.get(name)) is not kind:
            raise UserError(f"{path}: '{name}' in 'about' is damaged or missing, expected {kind.__name__}")
    if not all(isinstance(text, str) for name in texts for text in about[name]):
        raise UserError(f"{path}: {' or '.join(texts)} in 'about' is damaged, expected texts")
    return about


def _check_lengths(path: Path, file: NpzFile, about: dict[str, Any], all_axes: dict[str, str]) -> int:
    """Checks that all lengths in the file agree and that the graph fits into memory, before anything is unpacked.
    Returns the number of nodes."""
    shapes: dict[str, tuple[int, ...]] = {}
    memory = 0
    for name in (*all_axes, "edges", "edges_present"):
        if name not in file.header:
            raise UserError(f"{path}: array '{name}' is missing, expected in a saved graph")
        kind = "u" if name == "edges_present" else "iu" if name in INTEGER_ARRAYS else "f"
        shape, dtype = file.read_shape(name)
        if dtype.kind not in kind or len(shape) != len(all_axes.get(name, "1")):
            raise UserError(f"{path}: array '{name}' is damaged: {dtype}{list(shape)}")
        shapes[name] = shape
        memory += math.prod(shape) * dtype.itemsize
    optional_nodes = [name for name in OPTIONAL_NODES if name in all_axes]
    lists = ("features", "errors", "tokens", "positions", *optional_nodes, "logit_tokens")
    sizes = {all_axes[name][0]: shapes[name][0] for name in lists}
    nodes = sizes["N"] = sum(sizes.values())
    for name, axes in all_axes.items():
        expected = tuple(int(axis) if axis.isdigit() else sizes[axis] for axis in axes)
        if shapes[name] != expected:
            raise UserError(f"{path}: array '{name}' has shape {list(shapes[name])}, expected {list(expected)}")
    optional = {name: axis for name, axis in OPTIONAL_TEXTS.items() if about.get(name)}
    for name, axis in (TEXT_AXES | optional).items():
        if len(about[name]) != sizes[axis]:
            raise UserError(f"{path}: '{name}' in 'about' has {len(about[name])} entries, expected {sizes[axis]}")
    for name, members in about["supernodes"].items():
        if not isinstance(members, list) or not all(type(node) is int and 0 <= node < nodes for node in members):
            raise UserError(f"{path}: supernode '{name}' names nodes that are not there, expected below {nodes}")
    if shapes["edges_present"][0] != -(-nodes * nodes // 8):
        raise UserError(f"{path}: edges of another number of nodes, expected those of {nodes}")
    if shapes["edges"][0] > nodes * nodes:
        raise UserError(f"{path}: {shapes['edges'][0]} edges have values, expected at most those among {nodes} nodes")
    itemsize = file.read_shape("edges")[1].itemsize
    memory += 2 * shapes["edges"][0] * (itemsize + 4) if is_large(nodes, itemsize) else nodes * nodes * itemsize
    check_memory(memory, f"{path}: {nodes} nodes", "load it where there is more, or prune it there first", host=True)
    return nodes


def _pack(adjacency: Adjacency) -> dict[str, np.ndarray]:
    """The non-zero edges, and one bit for each possible edge that is 1 if the edge is not zero. Packs a few rows at a
    time."""
    size = len(adjacency)
    edges = np.empty(count_edges(adjacency), adjacency.dtype)
    bits, start = [], 0
    for first, last in _split_rows_at_bytes(size):
        block = adjacency[first:last]
        present = block != 0
        values = block[present]
        edges[start : start + len(values)] = values
        start += len(values)
        bits.append(np.packbits(present))
    return {"edges_present": np.concatenate([np.zeros(0, np.uint8), *bits]), "edges": edges}


def _unpack(path: Path, file: NpzFile, size: int) -> Adjacency:
    bits, edges = file.read_tensor("edges_present"), file.read_tensor("edges")
    starts = [0]

    def unpack_rows(first: int, last: int) -> Float[np.ndarray, "r N"]:
        packed = bits[first * size // 8 : -(-last * size // 8)]
        present = np.unpackbits(packed, count=(last - first) * size).view(bool).reshape(last - first, size)
        block, start = np.zeros(present.shape, edges.dtype), starts[-1]
        starts.append(start + int(np.count_nonzero(present)))
        if starts[-1] <= len(edges):
            block[present] = edges[start : starts[-1]]
        return block

    blocks = itertools.starmap(unpack_rows, _split_rows_at_bytes(size))
    adjacency = stack_blocks(blocks, size, edges.dtype, is_large(size, edges.itemsize))
    if starts[-1] != len(edges):
        raise UserError(f"{path}: {len(edges)} edges have values, expected {starts[-1]}")
    return adjacency


def _split_rows_at_bytes(size: int) -> list[tuple[int, int]]:
    """Ranges of rows whose first bits are the first bits of a byte."""
    count = -(-count_rows_per_block(size, 4) // 8) * 8
    return [(first, min(first + count, size)) for first in range(0, size, count)]
