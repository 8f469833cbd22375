"""Models on disk in the Hugging Face layout: `config.json`, `.safetensors` files, a tokenizer's files."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple, Protocol, runtime_checkable

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jclt.array_files import SafetensorsFile, write_tensors
from jclt.errors import UserError
from jclt.files import create_folder, read_json, write_json
from jclt.memory import check_memory
from jclt.mesh import fetch_to_host
from jclt.models.config import ModelConfig
from jclt.models.formats.config_json import find_family, read_config, write_config
from jclt.models.formats.families import Family, Tensor
from jclt.models.ops import find_finite_rows
from jclt.models.tokenizer import Tokenizer
from jclt.models.weights import abstract_params, count_local_bytes, declare
from jclt.shapes import Array, DTypeLike, Params


def load_config(folder: Path) -> ModelConfig:
    raw = read_json(folder / "config.json", "a model's settings")
    # Chat models list further stop tokens in this file.
    generation = folder / "generation_config.json"
    if os.path.lexists(generation):
        raw |= {k: v for k, v in read_json(generation).items() if k == "eos_token_id"}
    return read_config(raw, str(folder / "config.json"))


@runtime_checkable
class TensorFile(Protocol):
    """A file of tensors by name. What is read may be a view of its memory map."""

    @property
    def path(self) -> Path: ...
    @property
    def header(self) -> Mapping[str, Any]: ...
    def read_shape(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]: ...
    def read_tensor(self, name: str) -> np.ndarray: ...
    def forget_pages(self) -> None: ...


class StoredWeight(NamedTuple):
    """One of our weights on disk: the published tensors that hold it, one for each layer if it is stacked."""

    files: list[TensorFile]
    names: list[str]
    stacked: bool
    extract: Callable[[np.ndarray], np.ndarray]
    """The weight in a published tensor, as a view where that is possible."""


def load_params(folder: Path, config: ModelConfig, dtype: DTypeLike, mesh: Mesh | None = None) -> dict[str, Array]:
    """Every weight of a folder."""
    return read_params(_open_files(folder), find_family(config), config, dtype, mesh, folder)


def read_params(
    files: Sequence[TensorFile], family: Family, config: ModelConfig, dtype: DTypeLike, mesh: Mesh | None, where: Path
) -> dict[str, Array]:
    """Every weight, read directly into its shards, one at a time; `where` names the model in errors."""
    file_of = _index_tensors(files)
    names = _list_tensor_names(family, config, file_of, where)
    targets = abstract_params(config, mesh, dtype)
    stored = {}
    for weight, target in targets.items():
        tensor = next(tensor for tensor in family.tensors if weight in tensor.weights)
        stored[weight] = _find_stored(weight, target.shape, tensor, names[tensor.published], file_of, config)
    check_memory(
        count_local_bytes(targets.values()),
        f"model {where}",
        "dtype='bfloat16' takes half of float32, a mesh spreads it",
    )
    return {weight: _read_weight(stored[weight], target, dtype) for weight, target in targets.items()}


def _find_stored(
    weight: str,
    shape: tuple[int, ...],
    tensor: Tensor,
    names: list[str],
    file_of: Mapping[str, TensorFile],
    config: ModelConfig,
) -> StoredWeight:
    stacked = "{}" in tensor.published
    expected = shape[1:] if stacked else shape
    files = [file_of[name] for name in names]
    for file, name in zip(files, names, strict=True):
        published, dtype = file.read_shape(name)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise UserError(f"{file.path}: tensor '{name}' is of type {dtype}, expected floating-point numbers")
        try:  # on an array that takes no memory
            got = _extract(tensor, weight, config, np.broadcast_to(np.zeros((), np.float32), published)).shape
        except einops.EinopsError:
            axes = f"{tensor.pattern.split(' -> ')[0]} with {_find_sizes(tensor, config)}"
            raise UserError(f"{file.path}: tensor '{name}' has shape {list(published)}, expected {axes}") from None
        if got != expected:
            shapes = f"{list(got)}, expected {list(expected)}"
            raise UserError(f"{file.path}: tensor '{name}' gives weight '{weight}' the shape {shapes}")
    return StoredWeight(files, names, stacked, partial(_extract, tensor, weight, config))


def _extract(tensor: Tensor, weight: str, config: ModelConfig, source: np.ndarray) -> np.ndarray:
    """A weight in a published tensor."""
    view = einops.rearrange(source, tensor.pattern, **_find_sizes(tensor, config))
    view = view[tensor.weights.index(weight)] if len(tensor.weights) > 1 else view
    return view - np.asarray(tensor.offset, view.dtype) if tensor.offset else view


def _find_sizes(tensor: Tensor, config: ModelConfig) -> dict[str, int]:
    """Sizes of axes that the shape of a published tensor does not tell. `r` are the two of a rotating pair."""
    sizes = {"H": config.heads, "G": config.key_heads, "K": config.head_size, "c": len(tensor.weights), "r": 2}
    return {axis: size for axis, size in sizes.items() if axis in tensor.pattern}


def _read_weight(stored: StoredWeight, target: jax.ShapeDtypeStruct, dtype: DTypeLike) -> Array:
    if target.sharding is None:
        (piece,) = _read_pieces(stored, dtype, [(slice(None),) * len(target.shape)])
        array = jax.device_put(piece)
    else:
        indices = {str(x): x for x in target.sharding.addressable_devices_indices_map(target.shape).values()}
        pieces = dict(zip(indices, _read_pieces(stored, dtype, list(indices.values())), strict=True))
        array = jax.make_array_from_callback(target.shape, target.sharding, lambda index: pieces[str(index)])
    finite = fetch_to_host(find_finite_rows(array))
    if not finite.all():
        bad = int(np.argmin(finite)) if stored.stacked else 0
        place = f"{stored.files[bad].path}: tensor '{stored.names[bad]}'"
        raise UserError(f"{place} holds NaN or infinity as {np.dtype(dtype)}, expected finite numbers")
    return array


def _read_pieces(stored: StoredWeight, dtype: DTypeLike, indices: list[Any]) -> list[np.ndarray]:
    """The shards of a weight for several devices. Every published tensor is read once: layers are never split."""
    pieces: list[np.ndarray] = []
    for row, (file, name) in enumerate(zip(stored.files, stored.names, strict=True)):
        tensor = stored.extract(file.read_tensor(name))
        for number, index in enumerate(indices):
            part = tensor[index[1:] if stored.stacked else index]
            if not row:
                pieces.append(_make_aligned((len(stored.files), *part.shape), np.dtype(dtype)))
            pieces[number][row] = part
        file.forget_pages()
    return pieces if stored.stacked else [piece[0] for piece in pieces]


def _make_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array, aligned so that a CPU device takes it without a copy."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def _open_files(folder: Path) -> list[SafetensorsFile]:
    index = folder / "model.safetensors.index.json"
    if os.path.lexists(index):
        paths = [folder / name for name in _list_files(index)]
        for path in paths:
            if not os.path.lexists(path):
                raise UserError(f"{path}: not found, though {index.name} names it")
    else:
        single = folder / "model.safetensors"
        paths = [single] if os.path.lexists(single) else sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UserError(f"{folder}: no .safetensors file found, expected model.safetensors")
    return [SafetensorsFile(path) for path in paths]


def _list_files(index: Path) -> list[str]:
    """The files that an index names, all of them beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: 'weight_map' is {short(weight_map)}, expected each tensor's file")
    for tensor, name in weight_map.items():
        is_file_name = isinstance(name, str) and name.endswith(".safetensors") and not {"/", "\\", "\0"} & set(name)
        if not is_file_name:
            raise UserError(f"{index}: tensor '{tensor}' is in {short(name)}, expected a .safetensors file beside it")
    return sorted(set(weight_map.values()))


def _index_tensors(files: Sequence[TensorFile]) -> dict[str, TensorFile]:
    """The file of each tensor."""
    file_of: dict[str, TensorFile] = {}
    for file in files:
        for name in file.header:
            if name in file_of:
                raise UserError(f"{file.path}: tensor '{name}' is in {file_of[name].path.name} too, expected it once")
            file_of[name] = file
    return file_of


def _list_tensor_names(
    family: Family, config: ModelConfig, file_of: Mapping[str, TensorFile], where: Path
) -> dict[str, list[str]]:
    """For each published tensor that this model needs, its names in the files, one for each layer."""
    wanted = set(declare(config))
    needed = [tensor for tensor in family.tensors if wanted & set(tensor.weights)]
    prefix = next((p for p in family.prefixes if p + needed[0].published in file_of), family.prefixes[0])
    names: dict[str, list[str]] = {tensor.published: [] for tensor in needed}
    for tensor in needed:
        for name in _name_tensors(tensor, prefix, config.layers):
            if name not in file_of:
                raise UserError(
                    f"{where}: tensor '{name}' is missing, expected of a {family.name} model of this configuration"
                )
            names[tensor.published].append(name)
    used = {name for tensor_names in names.values() for name in tensor_names}
    tied_copy = {
        name
        for tensor in family.tensors
        for name in _name_tensors(tensor, prefix, 0)
        if "unembedding" in tensor.weights
    }
    known = used | tied_copy
    for name in file_of:
        if name.startswith(prefix) and name not in known and not name.endswith(family.ignored):
            raise UserError(f"{where}: tensor '{name}' has no place in a {family.name} model of this configuration")
    return names


def _name_tensors(tensor: Tensor, prefix: str, layers: int) -> Iterator[str]:
    """The tensor's names in the files: one for each layer, or just one. `^` marks a name without prefix."""
    name = tensor.published[1:] if tensor.published.startswith("^") else prefix + tensor.published
    if "{}" in name:
        yield from (name.format(layer) for layer in range(layers))
    else:
        yield name


def save_params(
    folder: Path, config: ModelConfig, params: Params, tokenizer: Tokenizer | None, shard_bytes: int
) -> None:
    """Writes a model folder. Nothing appears under its name before everything is written."""
    family = find_family(config)
    dtype = str(params["token_embedding"].dtype)
    raw = write_config(config, dtype)
    with create_folder(folder) as beside:
        _write_shards(beside, family, config, params, shard_bytes)
        write_json(beside / "config.json", raw)
        if tokenizer is not None:
            tokenizer.save(beside, config)


def _write_shards(folder: Path, family: Family, config: ModelConfig, params: Params, shard_bytes: int) -> None:
    shards: list[dict[str, Callable[[], np.ndarray]]] = [{}]
    size = 0
    for name, nbytes, build in _list_tensors(family, config, params):
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = build
        size += nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        write_tensors(folder / file, {name: build() for name, build in shard.items()})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _list_tensors(
    family: Family, config: ModelConfig, params: Params
) -> Iterator[tuple[str, int, Callable[[], np.ndarray]]]:
    """Name, size and a function for the content of every tensor that the family publishes."""
    for tensor in family.tensors:
        if tensor.weights[0] not in params:
            continue
        parts, stacked = [params[name] for name in tensor.weights], "{}" in tensor.published
        for layer, name in enumerate(_name_tensors(tensor, family.prefixes[0], config.layers)):
            nbytes = sum(part.nbytes for part in parts) // (config.layers if stacked else 1)
            yield name, nbytes, partial(_build_tensor, tensor, parts, layer if stacked else None)


def _build_tensor(tensor: Tensor, parts: list[Array], layer: int | None) -> np.ndarray:
    """A published tensor from the weights that it holds."""
    before, after = tensor.pattern.split(" -> ")
    arrays = [np.asarray(part if layer is None else part[layer]) for part in parts]
    joined = np.stack(arrays) if len(arrays) > 1 else arrays[0]
    return np.ascontiguousarray(einops.rearrange(joined, f"{after} -> {before}"))
