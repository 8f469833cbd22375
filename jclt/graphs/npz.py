"""Our graph file: one compressed `.npz`."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jclt.array_files import NpzFile
from jclt.errors import UserError
from jclt.files import new_file, parse_json, to_json
from jclt.graphs.influence import rows_at_once
from jclt.memory import check_memory
from jclt.shapes import Float

FORMAT, VERSIONS = "jclt-graph", (1, 2)
"""In version 2 outputs have weights beside their probabilities, without which influences would be others."""


AXES = {
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
"""The arrays beside the edges; a digit is a length."""


OPTIONAL = {"logit_weights": "k", "whole_shares": "N"}


WHOLE_NUMBERS = ("features", "errors", "tokens", "positions", "logit_tokens", "logit_positions")


TEXTS = {"token_texts": "T", "logit_names": "k"}


SAID: dict[str, type] = {"layers": int, "provenance": dict, "supernodes": dict, "annotations": dict}


MOST_SAID = 1 << 28
"""Bytes of texts, provenance and annotations in a file: those of a hundred thousand nodes take a tenth of it."""


STORED = (*AXES, *OPTIONAL, *TEXTS, *SAID)
"""What the file holds of a graph, beside the edges."""


def write_file(path: str | Path, found: Mapping[str, Any], adjacency: Float[np.ndarray, "N N"]) -> None:
    """Writes `FIELDS` and edges in one file, which replaces an older one when it is complete."""
    with new_file(Path(path)) as beside:
        write_here(beside, found, adjacency)


def write_here(path: Path, found: Mapping[str, Any], adjacency: Float[np.ndarray, "N N"]) -> None:
    """The file itself, under this very name."""
    said = {name: found[name] for name in (*TEXTS, *SAID)}
    version = 1 if found["logit_weights"] is None else 2
    about = to_json(to_plain({"format": FORMAT, "version": version} | said, "graph"), "graph").encode()
    if len(about) > MOST_SAID:
        raise UserError(f"graph: its texts and annotations take {len(about)} bytes, expected at most {MOST_SAID}")
    arrays = {name: found[name] for name in (*AXES, *OPTIONAL) if found[name] is not None}
    arrays |= {"about": np.frombuffer(about, np.uint8)}
    for name, array in (arrays | {"edges": adjacency}).items():
        if array.dtype.kind not in "fiu":  # numpy would write other numbers as bytes of no type
            raise UserError(f"graph: {name} is of type {array.dtype}, expected one of numpy's own number types")
    arrays |= _pack(adjacency)
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_file(path: Path) -> tuple[dict[str, Any], Float[np.ndarray, "N N"]]:
    """`FIELDS` and edges as `write_file` wrote them, with lengths that agree; nothing in the file is run."""
    file = NpzFile(path, "a graph that jclt saved")
    about = _read_about(path, file)
    axes = AXES | {name: axis for name, axis in OPTIONAL.items() if name in file.header}
    nodes = _check_lengths(path, file, about, axes)
    found: dict[str, Any] = dict.fromkeys(OPTIONAL)
    found |= {name: np.require(file.tensor(name), requirements="W") for name in axes}
    found |= {name: tuple(about[name]) for name in TEXTS} | {name: about[name] for name in SAID}
    return found, _unpack(path, file, nodes)


def to_plain(value: Any, where: object) -> Any:
    """The same in Python's own numbers, lists and dictionaries, which JSON can say."""
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
    shape, dtype = file.shape("about")
    if len(shape) != 1 or dtype != np.uint8 or shape[0] > MOST_SAID:
        raise UserError(f"{path}: 'about' is damaged: {dtype}{list(shape)}, expected at most {MOST_SAID} bytes")
    about = parse_json(file.tensor("about").tobytes(), f"{path}: 'about' is damaged")
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise UserError(f"{path}: not a graph that jclt saved, expected format '{FORMAT}' in 'about'")
    version = about.get("version")
    if type(version) is not int or version not in VERSIONS:
        newer = ": written by a newer jclt" if type(version) is int and version > max(VERSIONS) else ""
        known = " or ".join(map(str, VERSIONS))
        raise UserError(f"{path}: version {version}, expected {known}, those that this jclt reads{newer}")
    for name, kind in SAID.items() | dict.fromkeys(TEXTS, list).items():
        if type(about.get(name)) is not kind:
            raise UserError(f"{path}: '{name}' in 'about' is damaged or missing, expected {kind.__name__}")
    if not all(isinstance(text, str) for name in TEXTS for text in about[name]):
        raise UserError(f"{path}: {' or '.join(TEXTS)} in 'about' is damaged, expected texts")
    return about


def _check_lengths(path: Path, file: NpzFile, about: dict[str, Any], all_axes: dict[str, str]) -> int:
    """The number of nodes, after a check that everything in the file agrees on it and that there is memory for it:
    nothing is unpacked before."""
    shapes: dict[str, tuple[int, ...]] = {}
    need = 0
    for name in (*all_axes, "edges", "edges_present"):
        if name not in file.header:
            raise UserError(f"{path}: array '{name}' is missing, expected in a saved graph")
        kind = "u" if name == "edges_present" else "iu" if name in WHOLE_NUMBERS else "f"
        shape, dtype = file.shape(name)
        if dtype.kind not in kind or len(shape) != len(all_axes.get(name, "1")):
            raise UserError(f"{path}: array '{name}' is damaged: {dtype}{list(shape)}")
        shapes[name] = shape
        need += math.prod(shape) * dtype.itemsize
    lists = ("features", "errors", "tokens", "positions", "logit_tokens")
    sizes = {AXES[name][0]: shapes[name][0] for name in lists}
    nodes = sizes["N"] = sum(sizes.values())
    for name, axes in all_axes.items():
        expected = tuple(int(axis) if axis.isdigit() else sizes[axis] for axis in axes)
        if shapes[name] != expected:
            raise UserError(f"{path}: array '{name}' has shape {list(shapes[name])}, expected {list(expected)}")
    for name, axis in TEXTS.items():
        if len(about[name]) != sizes[axis]:
            raise UserError(f"{path}: '{name}' in 'about' has {len(about[name])} entries, expected {sizes[axis]}")
    for name, members in about["supernodes"].items():
        if not isinstance(members, list) or not all(type(node) is int and 0 <= node < nodes for node in members):
            raise UserError(f"{path}: supernode '{name}' names nodes that are not there, expected below {nodes}")
    if shapes["edges_present"][0] != -(-nodes * nodes // 8):
        raise UserError(f"{path}: edges of another number of nodes, expected those of {nodes}")
    if shapes["edges"][0] > nodes * nodes:
        raise UserError(f"{path}: {shapes['edges'][0]} edges have values, expected at most those among {nodes} nodes")
    need += nodes * nodes * file.shape("edges")[1].itemsize
    check_memory(need, f"{path}: {nodes} nodes", "load it where there is more, or prune it there first", host=True)
    return nodes


def _pack(adjacency: Float[np.ndarray, "N N"]) -> dict[str, np.ndarray]:
    """The edges that are there, and a bit for each possible one; a few rows at a time."""
    size = len(adjacency)
    edges = np.empty(np.count_nonzero(adjacency), adjacency.dtype)
    bits, start = [], 0
    for first, last in _byte_rows(size):
        block = adjacency[first:last]
        present = block != 0
        found = block[present]
        edges[start : start + len(found)] = found
        start += len(found)
        bits.append(np.packbits(present))
    return {"edges_present": np.concatenate([np.zeros(0, np.uint8), *bits]), "edges": edges}


def _unpack(path: Path, file: NpzFile, size: int) -> Float[np.ndarray, "N N"]:
    bits, edges = file.tensor("edges_present"), file.tensor("edges")
    adjacency, start = np.zeros((size, size), edges.dtype), 0
    for first, last in _byte_rows(size):
        packed = bits[first * size // 8 : -(-last * size // 8)]
        present = np.unpackbits(packed, count=(last - first) * size).view(bool).reshape(last - first, size)
        count = int(np.count_nonzero(present))
        if start + count <= len(edges):
            adjacency[first:last][present] = edges[start : start + count]
        start += count
    if start != len(edges):
        raise UserError(f"{path}: {len(edges)} edges have values, expected {start}")
    return adjacency


def _byte_rows(size: int) -> list[tuple[int, int]]:
    """Ranges of rows whose bits begin at whole bytes."""
    many = -(-rows_at_once(size, 1) // 8) * 8
    return [(first, min(first + many, size)) for first in range(0, size, many)]
