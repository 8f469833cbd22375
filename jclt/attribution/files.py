"""Graphs on disk: one compressed `.npz` of ours, and circuit-tracer's `.pt`, read without torch."""

import io
import math
import pickle
import pickletools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jclt.attribution.graph import Graph
from jclt.attribution.influence import row_blocks, rows_at_once
from jclt.attribution.paths import name_of
from jclt.errors import UserError, first_line
from jclt.files import Archive, NpzFile, check_file, new_file, parse_json, to_json
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
MOST_LAYERS = 10_000
SUMMED = 1e-3
"""By how much a probability or share may exceed 1 for rounding."""


def save_graph(graph: Graph, path: str | Path) -> None:
    """Writes all of the graph in one file, which replaces an older one when it is complete."""
    with new_file(Path(path)) as beside:
        write_arrays(graph, beside)


def write_arrays(graph: Graph, path: Path) -> None:
    """The file itself, under this very name."""
    said = {name: getattr(graph, name) for name in (*TEXTS, *SAID)}
    version = 1 if graph.logit_weights is None else 2
    about = to_json(plain({"format": FORMAT, "version": version} | said, "graph"), "graph").encode()
    if len(about) > MOST_SAID:
        raise UserError(f"graph: its texts and annotations take {len(about)} bytes, expected at most {MOST_SAID}")
    arrays = {name: getattr(graph, name) for name in AXES}
    arrays |= {name: array for name in OPTIONAL if (array := getattr(graph, name)) is not None}
    arrays |= {"about": np.frombuffer(about, np.uint8)}
    for name, array in (arrays | {"edges": graph.adjacency}).items():
        if array.dtype.kind not in "fiu":  # numpy would write other numbers as bytes of no type
            raise UserError(f"graph: {name} is of type {array.dtype}, expected one of numpy's own number types")
    arrays |= _pack(graph.adjacency)
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def load_graph(path: str | Path) -> Graph:
    """Reads what `save_graph` wrote; nothing in the file is run."""
    path = Path(path)
    file = NpzFile(path, "a graph that jclt saved")
    about = _read_about(path, file)
    axes = AXES | {name: axis for name, axis in OPTIONAL.items() if name in file.header}
    nodes = _check_lengths(path, file, about, axes)
    arrays = {name: np.require(file.tensor(name), requirements="W") for name in axes}
    graph = Graph(
        adjacency=_unpack(path, file, nodes),
        **arrays,
        **{name: tuple(about[name]) for name in TEXTS},
        **{name: about[name] for name in ("layers", "provenance", "annotations")},
        supernodes={name: tuple(nodes) for name, nodes in about["supernodes"].items()},
    )
    check_graph(graph, path)
    return graph


def plain(value: Any, where: object) -> Any:
    """The same in Python's own numbers, lists and dictionaries, which JSON can say."""
    try:
        return _plain(value)
    except RecursionError:
        raise UserError(f"{where}: provenance or annotations are nested too deeply to be written") from None
    except TypeError as error:
        raise UserError(f"{where}: provenance or annotations hold {error}, expected what JSON can say") from None


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy's and JAX's arrays and numbers
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")


def check_graph(graph: Graph, where: object) -> None:
    """An error of one line unless all numbers are finite, all places exist and each edge leads into a higher layer, on
    which everything that walks a graph relies."""
    layers, length = graph.layers, len(graph.tokens)
    if not 0 <= layers <= MOST_LAYERS:
        raise UserError(f"{where}: {layers} layers, expected 0 to {MOST_LAYERS}")
    large = np.iinfo(np.int64).max
    single = graph.logit_tokens >= 0
    limits = {
        "bias": (graph.bias, -np.inf, np.inf),
        "rest": (graph.rest, -np.inf, np.inf),
        "rest_mass": (graph.rest_mass, 0, np.inf),
        "values": (graph.values, -np.inf, np.inf),
        "activations": (graph.activations, -np.inf, np.inf),
        "features, layer": (graph.features[:, 0], 0, layers - 1),
        "features, position": (graph.features[:, 1], 0, length - 1),
        "features, feature": (graph.features[:, 2], 0, large),
        "errors, layer": (graph.errors[:, 0], 0, layers - 1),
        "errors, position": (graph.errors[:, 1], 0, length - 1),
        "tokens": (graph.tokens, -1, large),
        "positions": (graph.positions, 0, length - 1),
        "logit_tokens": (graph.logit_tokens, -1, large),
        "logit_positions": (graph.logit_positions, 0, length - 1),
        "logit_probabilities": (graph.logit_probabilities, 0, np.inf),
        "logit_probabilities of tokens": (graph.logit_probabilities[single], 0, 1 + SUMMED),
        "logit_weights": (graph.logit_weights, 0, np.inf),
        "whole_shares": (graph.whole_shares, 0, 1 + SUMMED),
    }
    for name, (values, low, high) in limits.items():
        wrong = [] if values is None else values[~(np.isfinite(values) & (values >= low) & (values <= high))]
        if len(wrong):
            expected = "numbers" if low == -np.inf else f"at least {low}" if high in (np.inf, large) else None
            expected = expected or f"{low} to {round(high, 2)}"
            raise UserError(f"{where}: array '{name}' holds {wrong[0]}, expected {expected}")
    notes = graph.annotations.get("nodes")
    if notes is not None and not (
        isinstance(notes, list)
        and len(notes) == len(graph)
        and all(isinstance(note, dict) and isinstance(note.get("node_id", ""), str) for note in notes)
    ):
        raise UserError(f"{where}: annotations of nodes are damaged, expected an object for each of {len(graph)} nodes")
    for name in ("metadata", "qParams"):
        if not isinstance(graph.annotations.get(name, {}), dict):
            raise UserError(f"{where}: annotations of {name} are damaged, expected an object")
    _check_edges(graph, where)


def _check_edges(graph: Graph, where: object) -> None:
    """A few rows at a time: edges may fill half of the memory."""
    layers = graph.node_layers
    for rows in row_blocks(len(graph), graph.adjacency.itemsize, np.arange(len(graph))):
        block = graph.adjacency[rows]
        for wrong, reason in (
            (~np.isfinite(block), "is not finite, expected a number"),
            ((block != 0) & (layers >= layers[rows, None]), ""),
        ):
            if wrong.any():
                place, source = np.argwhere(wrong)[0]
                target = rows[place]
                along = f"leads from layer {layers[source]} to {layers[target]}, expected into a higher layer"
                names = f"{_called(graph, int(source))} -> {_called(graph, int(target))}"
                raise UserError(f"{where}: the edge {names} {reason or along}")


def _called(graph: Graph, node: int) -> str:
    """The node as the file that it came from calls it, or in words."""
    notes = graph.annotations.get("nodes")
    return str((notes[node] if notes else {}).get("node_id") or name_of(graph, node))


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


def read_circuit_tracer(path: str | Path) -> Graph:
    """Reads a graph that circuit-tracer saved; the file is a pickle, but nothing that it names is run.

    It holds no pre-activations or logits and nothing of biases or features left out: values are the sums of the edges,
    bias and rest 0. Of token texts it holds those of the outputs alone.
    """
    path = Path(path)
    found = _unpickle(path)
    try:
        graph = _graph_of(path, found)
    except UserError:
        raise
    except Exception as error:  # what is in it is whatever someone pickled
        raise UserError(f"{path}: not a graph that circuit-tracer saved ({first_line(error)})") from None
    check_graph(graph, path)
    return graph


NEEDED = {
    "adjacency_matrix",
    "cfg",
    "active_features",
    "selected_features",
    "activation_values",
    "input_tokens",
    "logit_targets",
    "logit_probabilities",
}


def _graph_of(path: Path, found: dict[str, Any]) -> Graph:
    missing = NEEDED - found.keys()
    if missing:
        raise UserError(f"{path}: not a graph that circuit-tracer saved, '{min(missing)}' is missing")
    model = vars(found["cfg"])
    layers, selected = int(model["n_layers"]), _whole(found["selected_features"])
    features = _whole(found["active_features"]).reshape(-1, 3)
    if len(selected) and not 0 <= selected.min() <= selected.max() < len(features):
        raise UserError(f"{path}: selected_features names others than the {len(features)} active ones")
    activations = _real(found["activation_values"])
    if len(activations) == len(features):  # of all active features, as version 0.5 saves them; else of those selected
        activations = activations[selected]
    tokens = _whole(found["input_tokens"]).reshape(-1)
    targets: Any = found.get("logit_targets")
    if isinstance(targets, np.ndarray):  # before targets had names
        targets = [_Target("", int(token)) for token in targets.reshape(-1)]
    vocabulary = int(found.get("vocab_size") or model["d_vocab"])
    texts = {target.token: target.text for target in targets}
    adjacency = _real(found["adjacency_matrix"])
    # Lengths are checked here: the graph's own check knows nothing of these lists.
    nodes = len(selected) + (layers + 1) * len(tokens) + len(targets)
    probabilities = _real(found["logit_probabilities"]).reshape(-1)
    lengths = (*adjacency.shape, len(activations), len(probabilities))
    if lengths != (nodes, nodes, len(selected), len(targets)):
        raise UserError(f"{path}: lists of {nodes} nodes do not go with edges {list(adjacency.shape)}, or their values")
    return Graph(
        adjacency=adjacency,
        bias=np.zeros(nodes, adjacency.dtype),
        rest=np.zeros(nodes, adjacency.dtype),
        rest_mass=np.zeros(nodes, adjacency.dtype),
        values=adjacency.sum(axis=1, dtype=np.float64).astype(adjacency.dtype),
        features=features[selected],
        activations=activations,
        errors=np.stack(np.divmod(np.arange(layers * len(tokens)), len(tokens)), axis=1),
        tokens=tokens,
        token_texts=tuple(texts.get(int(token), "") for token in tokens),
        positions=np.zeros(0, np.int64),
        logit_tokens=np.array([target.token if target.token < vocabulary else -1 for target in targets], np.int64),
        logit_names=tuple(target.text for target in targets),
        logit_positions=np.full(len(targets), len(tokens) - 1),
        logit_probabilities=probabilities,
        layers=layers,
        provenance={
            "program": "circuit-tracer",
            "model": model.get("model_name"),
            "coder": found.get("scan"),
            "prompt": found.get("input_string"),
        },
    )


class _Target(NamedTuple):
    text: str
    token: int


STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
TORCH_TYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


MOST_PICKLED = 1 << 22
"""Bytes of the pickle itself, beside which the tensors lie: a few names, and the outputs' texts."""


def _unpickle(path: Path) -> dict[str, Any]:
    size = check_file(path, "a graph that circuit-tracer saved")
    archive = Archive(path, "a file that torch saved")
    inside = [name for name in archive.entries if name.endswith("/data.pkl")]
    if len(inside) != 1:
        raise UserError(f"{path}: not a graph that circuit-tracer saved, expected one data.pkl in it")
    content = archive.read(inside[0], MOST_PICKLED)
    try:
        _check_numbering(content)
        found = _Reader(content, archive, inside[0].removesuffix("data.pkl"), size).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle fails in as many ways as there are parts of it
        raise UserError(f"{path}: not a file that torch saved, or damaged ({first_line(error)})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a graph that circuit-tracer saved, expected a dictionary in it")
    return found


def _check_numbering(content: bytes) -> None:
    """Things in a pickle are numbered, and Python takes memory for all numbers up to the highest."""
    for operation, argument, _ in pickletools.genops(content):
        number = argument if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") else 0
        if number is not None and number > len(content):
            raise ValueError(f"thing number {argument} in {len(content)} bytes")


class _Reader(pickle.Unpickler):
    """Knows stand-ins for the few names that such a file holds, all of them harmless, and refuses any other name."""

    def __init__(self, content: bytes, archive: Archive, folder: str, size: int):
        super().__init__(io.BytesIO(content))
        self.archive, self.folder, self.path = archive, folder, archive.path
        self.room = size  # torch stores tensors as they are: all together are no larger than the file
        self.storages: dict[str, bytes] = {}
        order = folder + "byteorder"
        if order in archive.entries and archive.read(order, 16) != b"little":
            raise UserError(f"{self.path}: numbers in big-endian order, expected little-endian")

        # Made anew for each file: a pickle may set attributes of what it is given.
        class Settings:
            pass

        class Target(_Target):
            pass

        def tensor(storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any):
            return _view(storage, offset, shape, strides)

        def device(*name: Any) -> str:
            return str(name)

        self.known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): dict,
            ("torch._utils", "_rebuild_tensor_v2"): tensor,
            ("torch", "device"): device,
            ("circuit_tracer.utils.tl_nnsight_mapping", "UnifiedConfig"): Settings,
            ("circuit_tracer.attribution.targets", "LogitTarget"): Target,
            ("transformer_lens.HookedTransformerConfig", "HookedTransformerConfig"): Settings,  # in older files
            ("transformer_lens.config.HookedTransformerConfig", "HookedTransformerConfig"): Settings,
        }
        self.known |= {("torch", name): name for name in (*STORAGES, *TORCH_TYPES)}

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in self.known:
            raise UserError(f"{self.path}: refers to '{module_name}.{global_name}', expected only a graph's own types")
        return self.known[module_name, global_name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, kind, key, _, count = pid
        if key not in self.storages:
            name = f"{self.folder}data/{key}"
            self.storages[key] = self.archive.read(name, self.room)
            self.room -= len(self.storages[key])
        return np.frombuffer(self.storages[key], STORAGES[kind], count)


def _view(storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    """A tensor as torch lays it over its storage, counted in numbers; never past the storage's ends."""
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 in shape:
        return np.zeros(shape, storage.dtype)
    if min(offset, *shape, *strides) < 0 or last >= len(storage):
        raise ValueError(f"a tensor of shape {list(shape)} reaches past its {len(storage)} numbers")
    if math.prod(shape) > len(storage):
        raise ValueError(f"a tensor of shape {list(shape)} repeats its {len(storage)} numbers")
    step = storage.itemsize
    return np.lib.stride_tricks.as_strided(
        storage[offset:], shape, tuple(stride * step for stride in strides), writeable=False
    )


def _real(array: np.ndarray) -> np.ndarray:
    """In the smallest of numpy's own types that holds it and is good to compute in."""
    return np.array(array, np.float64 if array.dtype == np.float64 else np.float32)


def _whole(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "b":  # a mask of those selected
        return np.flatnonzero(array)
    return np.array(array, np.int64)
