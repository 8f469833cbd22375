"""circuit-tracer's `.pt` graphs, read without torch."""

import io
import math
import pickle
import pickletools
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jclt.array_files import Archive
from jclt.errors import UserError, first_line
from jclt.files import check_file
from jclt.graphs.check import check_graph
from jclt.graphs.graph import Graph
from jclt.graphs.nodes import node_table


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
        nodes=node_table(
            layers=layers,
            features=features[selected],
            errors=np.stack(np.divmod(np.arange(layers * len(tokens)), len(tokens)), axis=1),
            tokens=tokens,
            positions=np.zeros(0, np.int64),
            logit_tokens=np.array([target.token if target.token < vocabulary else -1 for target in targets], np.int64),
            logit_positions=np.full(len(targets), len(tokens) - 1),
            values=adjacency.sum(axis=1, dtype=np.float64).astype(adjacency.dtype),
        ),
        bias=np.zeros(nodes, adjacency.dtype),
        rest=np.zeros(nodes, adjacency.dtype),
        rest_mass=np.zeros(nodes, adjacency.dtype),
        activations=activations,
        token_texts=tuple(texts.get(int(token), "") for token in tokens),
        logit_names=tuple(target.text for target in targets),
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
            return _array_view(storage, offset, shape, strides)

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


def _array_view(storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
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
