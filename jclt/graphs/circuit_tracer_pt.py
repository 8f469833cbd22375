"""Reads circuit-tracer's `.pt` graphs, without torch."""

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
from jclt.graphs.nodes import build_node_table


def read_circuit_tracer(path: str | Path) -> Graph:
    """Reads a graph that circuit-tracer saved. The file is a pickle, but no code in it is executed.

    The file has no pre-activations, logits or biases, and nothing about features outside the graph. So values are the
    sums of the edges, and bias and rest are 0. Of all token texts, the file has only those of the outputs.
    """
    path = Path(path)
    content = _unpickle(path)
    try:
        graph = _build_graph(path, content)
    except UserError:
        raise
    except Exception as error:  # the pickled values may be of any type
        raise UserError(f"{path}: not a graph that circuit-tracer saved ({first_line(error)})") from None
    check_graph(graph, path)
    return graph


REQUIRED = {
    "adjacency_matrix",
    "cfg",
    "active_features",
    "selected_features",
    "activation_values",
    "input_tokens",
    "logit_targets",
    "logit_probabilities",
}


def _build_graph(path: Path, content: dict[str, Any]) -> Graph:
    missing = REQUIRED - content.keys()
    if missing:
        raise UserError(f"{path}: not a graph that circuit-tracer saved, '{min(missing)}' is missing")
    model = vars(content["cfg"])
    layers, selected = int(model["n_layers"]), _to_integers(content["selected_features"])
    features = _to_integers(content["active_features"]).reshape(-1, 3)
    if len(selected) and not 0 <= selected.min() <= selected.max() < len(features):
        raise UserError(f"{path}: selected_features names others than the {len(features)} active ones")
    activations = _to_floats(content["activation_values"])
    if len(activations) == len(features):  # version 0.5 saves all active features, other versions the selected ones
        activations = activations[selected]
    tokens = _to_integers(content["input_tokens"]).reshape(-1)
    targets: Any = content.get("logit_targets")
    if isinstance(targets, np.ndarray):  # older versions save tokens without names
        targets = [_Target(text="", token=int(token)) for token in targets.reshape(-1)]
    vocabulary = int(content.get("vocab_size") or model["d_vocab"])
    texts = {target.token: target.text for target in targets}
    adjacency = _to_floats(content["adjacency_matrix"])
    # `check_graph` cannot check these lengths, because the lists are not part of a `Graph`.
    nodes = len(selected) + (layers + 1) * len(tokens) + len(targets)
    probabilities = _to_floats(content["logit_probabilities"]).reshape(-1)
    lengths = (*adjacency.shape, len(activations), len(probabilities))
    if lengths != (nodes, nodes, len(selected), len(targets)):
        raise UserError(f"{path}: lists of {nodes} nodes do not go with edges {list(adjacency.shape)}, or their values")
    return Graph(
        adjacency=adjacency,
        nodes=build_node_table(
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
            "coder": content.get("scan"),
            "prompt": content.get("input_string"),
        },
    )


class _Target(NamedTuple):
    """An output."""

    text: str
    token: int


STORAGE_DTYPES = {
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


TORCH_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


MAX_PICKLE_BYTES = 1 << 22
"""Most bytes of the pickle without its tensors: a few names, and the texts of the outputs."""


def _unpickle(path: Path) -> dict[str, Any]:
    size = check_file(path, "a graph that circuit-tracer saved")
    archive = Archive(path, "a file that torch saved")
    names = [name for name in archive.members if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise UserError(f"{path}: not a graph that circuit-tracer saved, expected one data.pkl in it")
    data = archive.read(names[0], MAX_PICKLE_BYTES)
    try:
        _check_memo_numbers(data)
        content = _SafeUnpickler(data, archive, names[0].removesuffix("data.pkl"), size).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle may raise any error
        raise UserError(f"{path}: not a file that torch saved, or damaged ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a graph that circuit-tracer saved, expected a dictionary in it")
    return content


def _check_memo_numbers(data: bytes) -> None:
    """A pickle numbers its objects, and Python allocates memory for all numbers up to the highest. So a small file with
    a large number could fill the memory."""
    for operation, argument, _ in pickletools.genops(data):
        number = argument if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") else 0
        if number is not None and number > len(data):
            raise ValueError(f"thing number {argument} in {len(data)} bytes")


class _SafeUnpickler(pickle.Unpickler):
    """Loads a pickle that may contain only the types of a circuit-tracer graph. Each of these names is replaced by a
    harmless type or function; any other name raises an error."""

    def __init__(self, data: bytes, archive: Archive, folder: str, size: int):
        super().__init__(io.BytesIO(data))
        self.archive, self.folder, self.path = archive, folder, archive.path
        self.bytes_left = size  # torch does not compress tensors, so all tensors together are no larger than the file
        self.storages: dict[str, bytes] = {}
        order = folder + "byteorder"
        if order in archive.members and archive.read(order, 16) != b"little":
            raise UserError(f"{self.path}: numbers in big-endian order, expected little-endian")

        # New types for each file, because a pickle may set their attributes.
        class Settings:
            pass

        class Target(_Target):
            pass

        def build_tensor(storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any):
            return _view_storage(storage, offset, shape, strides)

        def name_device(*name: Any) -> str:
            return str(name)

        self.allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): dict,
            ("torch._utils", "_rebuild_tensor_v2"): build_tensor,
            ("torch", "device"): name_device,
            ("circuit_tracer.utils.tl_nnsight_mapping", "UnifiedConfig"): Settings,
            ("circuit_tracer.attribution.targets", "LogitTarget"): Target,
            ("transformer_lens.HookedTransformerConfig", "HookedTransformerConfig"): Settings,  # in older files
            ("transformer_lens.config.HookedTransformerConfig", "HookedTransformerConfig"): Settings,
        }
        self.allowed |= {("torch", name): name for name in (*STORAGE_DTYPES, *TORCH_DTYPES)}

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in self.allowed:
            raise UserError(f"{self.path}: refers to '{module_name}.{global_name}', expected only a graph's own types")
        return self.allowed[module_name, global_name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, kind, key, _, count = pid
        if key not in self.storages:
            name = f"{self.folder}data/{key}"
            self.storages[key] = self.archive.read(name, self.bytes_left)
            self.bytes_left -= len(self.storages[key])
        return np.frombuffer(self.storages[key], STORAGE_DTYPES[kind], count)


def _view_storage(storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    """The tensor with this shape and these strides in its storage. Offset and strides count numbers, not bytes. Raises
    an error if the tensor would reach past the storage, or repeat its numbers."""
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


def _to_floats(array: np.ndarray) -> np.ndarray:
    """float64 stays; all other types become float32."""
    return np.array(array, np.float64 if array.dtype == np.float64 else np.float32)


def _to_integers(array: np.ndarray) -> np.ndarray:
    """Integers as int64; a mask as the indices of its true elements."""
    if array.dtype.kind == "b":
        return np.flatnonzero(array)
    return np.array(array, np.int64)
