"""The JSON format of published graph viewers: what `export_json.py` and `import_json.py` share."""

import gzip
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jclt.errors import UserError, first_line
from jclt.files import parse_object, read_bytes
from jclt.graphs.graph import Graph
from jclt.graphs.names import name_apart
from jclt.graphs.nodes import Kind
from jclt.memory import check_memory
from jclt.shapes import Float

Json = dict[str, Any]

FEATURE_TYPES: dict[Kind, str] = {
    "feature": "cross layer transcoder",  # the viewers know no other name, so per-layer transcoders use it too
    "error": "mlp reconstruction error",
    "token": "embedding",
    "position": "embedding",
    "head": "lorsa",  # an attention node; viewers that do not know it draw it as a feature
    "stream": "lorsa",
    "output": "logit",
}

FIELDS = ("metadata", "qParams", "nodes", "links")
"""The objects of a viewer's file."""

MAX_UNPACKED_RATIO = 100
"""By what factor a compressed file may grow when it is unpacked. Graphs grow about tenfold."""

MEMORY_PER_BYTE = 10
"""How much memory the objects of a JSON text may need, per byte of text. Links need about 6."""


def read_viewer_file(path: Path) -> Json:
    """The object in a JSON file, which may be compressed with gzip."""
    data = read_bytes(path, "a graph's JSON file")
    if data[:2] == b"\x1f\x8b":
        data = unpack_gzip(path, data)
    check_memory(
        MEMORY_PER_BYTE * len(data), f"{path}: {len(data)} bytes of JSON", "read it where there is more", host=True
    )
    return parse_object(data, path)


def unpack_gzip(path: Path | str, data: bytes) -> bytes:
    limit = MAX_UNPACKED_RATIO * len(data) + 1_000_000
    try:
        with gzip.open(io.BytesIO(data)) as file:
            text = file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not valid gzip ({first_line(error)})") from None
    if len(text) > limit:
        raise UserError(
            f"{path}: unpacks to more than {limit} bytes, expected at most {MAX_UNPACKED_RATIO} times its size"
        )
    return text


def encode_json(content: Json, path: Path) -> bytes:
    """The JSON file's bytes, compressed if its name ends in .gz."""
    try:
        text = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    except ValueError as error:
        raise UserError(f"{path}: not written, a number is not finite ({error})") from None
    return gzip.compress(text, 6, mtime=0) if path.suffix == ".gz" else text


def get_annotations(graph: Graph) -> list[Json]:
    """For each node, the fields of the file that it was read from; empty for other graphs."""
    return graph.annotations.get("nodes") or [{}] * len(graph)


def to_shortest_decimals(values: Float[np.ndarray, "n"]) -> list[float]:
    """The numbers as Python floats. A float32 becomes the shortest decimal that reads back as the same float32."""
    if values.dtype == np.float64:
        return values.tolist()
    return values.astype(np.float32).astype("U32").astype(np.float64).tolist()


def is_list_of_groups(groups: Any) -> bool:
    """Whether this is a list of lists of texts, each a name and node ids."""
    return isinstance(groups, list) and all(
        isinstance(group, list) and group and all(isinstance(text, str) for text in group) for group in groups
    )


def name_groups(groups: Sequence[Sequence[str]], number: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Supernodes from a file's groups, each a name and node ids. Repeated names get a number; unknown ids are left
    out."""
    names = name_apart([name for name, *_ in groups])
    members = [tuple(number[node_id] for node_id in ids if node_id in number) for _, *ids in groups]
    return dict(zip(names, members, strict=True))
