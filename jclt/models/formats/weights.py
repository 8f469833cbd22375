"""Models on disk in the Hugging Face layout: `config.json`, one or many `.safetensors`, a tokenizer's files."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jclt.array_files import SafetensorsFile, write_tensors
from jclt.errors import UserError
from jclt.files import new_folder, read_json, write_json
from jclt.memory import check_memory
from jclt.mesh import fetched
from jclt.models.config import ModelConfig
from jclt.models.formats.config_json import family_of, read_config, write_config
from jclt.models.formats.families import Family, Tensor
from jclt.models.ops import finite_rows
from jclt.models.tokenizer import Tokenizer
from jclt.models.weights import abstract_params, bytes_at_once, declare
from jclt.shapes import Array, DTypeLike, Params


def load_config(folder: Path) -> ModelConfig:
    raw = read_json(folder / "config.json", "a model's settings")
    # Chat models list there what else ends an answer.
    more = folder / "generation_config.json"
    if os.path.lexists(more):
        raw |= {k: v for k, v in read_json(more).items() if k == "eos_token_id"}
    return read_config(raw, str(folder / "config.json"))


class Sources(NamedTuple):
    """One of our weights on disk: views of the published tensors that hold it, layer by layer where it is stacked."""

    files: list[SafetensorsFile]
    names: list[str]
    views: list[np.ndarray]
    stacked: bool


def load_params(folder: Path, config: ModelConfig, dtype: DTypeLike, mesh: Mesh | None = None) -> dict[str, Array]:
    """Every weight, read from the memory map straight to its place on the mesh, one piece at a time."""
    where = _tensors_of(_open_files(folder))
    family = family_of(config)
    names = _published_names(family, config, where, folder)
    targets = abstract_params(config, mesh, dtype)
    sources = {}
    for weight, target in targets.items():
        tensor = next(tensor for tensor in family.tensors if weight in tensor.weights)
        sources[weight] = _sources(weight, target.shape, tensor, names[tensor.published], where, config)
    check_memory(
        bytes_at_once(targets.values()), f"model {folder}", "dtype='bfloat16' takes half of float32, a mesh spreads it"
    )
    return {weight: _read(weight, sources[weight], target, dtype) for weight, target in targets.items()}


def _sources(
    weight: str,
    shape: tuple[int, ...],
    tensor: Tensor,
    names: list[str],
    where: Mapping[str, SafetensorsFile],
    config: ModelConfig,
) -> Sources:
    stacked = "{}" in tensor.published
    expected = shape[1:] if stacked else shape
    files, views = [where[name] for name in names], []
    for file, name in zip(files, names, strict=True):
        views.append(_view(file, name, tensor, weight, config))
        if views[-1].shape != expected:
            shapes = f"{list(views[-1].shape)}, expected {list(expected)}"
            raise UserError(f"{file.path}: tensor '{name}' gives weight '{weight}' the shape {shapes}")
    return Sources(files, names, views, stacked)


def _read(weight: str, sources: Sources, target: jax.ShapeDtypeStruct, dtype: DTypeLike) -> Array:
    piece = partial(_piece, sources, dtype)
    if target.sharding is None:
        array = jax.device_put(piece((slice(None),) * len(target.shape)))
    else:
        array = jax.make_array_from_callback(target.shape, target.sharding, piece)
    finite = fetched(finite_rows(array))
    if not finite.all():
        bad = int(np.argmin(finite)) if sources.stacked else 0
        place = f"{sources.files[bad].path}: tensor '{sources.names[bad]}'"
        raise UserError(f"{place} holds NaN or infinity as {np.dtype(dtype)}, expected finite numbers")
    return array


def _piece(sources: Sources, dtype: DTypeLike, index: Any) -> np.ndarray:
    """The part of a weight that one device holds, read layer by layer where layers are stacked."""
    layers, within = (index[0], index[1:]) if sources.stacked else (slice(None), index)
    files, views = sources.files[layers], sources.views[layers]
    out = _aligned((len(views), *views[0][within].shape), np.dtype(dtype))
    for row, file, view in zip(out, files, views, strict=True):
        row[...] = view[within]
        file.forget_pages()
    return out if sources.stacked else out[0]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that starts where a CPU device takes it as it is; any other would be copied once more."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


def _open_files(folder: Path) -> list[SafetensorsFile]:
    index = folder / "model.safetensors.index.json"
    if os.path.lexists(index):
        paths = [folder / name for name in _listed_files(index)]
        for path in paths:
            if not os.path.lexists(path):
                raise UserError(f"{path}: not found, though {index.name} names it")
    else:
        whole = folder / "model.safetensors"
        paths = [whole] if os.path.lexists(whole) else sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UserError(f"{folder}: no .safetensors file found, expected model.safetensors")
    return [SafetensorsFile(path) for path in paths]


def _listed_files(index: Path) -> list[str]:
    """The files beside an index that it says tensors are in."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: 'weight_map' is {short(weight_map)}, expected each tensor's file")
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and name.endswith(".safetensors") and not {"/", "\\", "\0"} & set(name)
        if not plain:
            raise UserError(f"{index}: tensor '{tensor}' is in {short(name)}, expected a .safetensors file beside it")
    return sorted(set(weight_map.values()))


def _tensors_of(files: list[SafetensorsFile]) -> dict[str, SafetensorsFile]:
    """Which file each tensor is in."""
    where: dict[str, SafetensorsFile] = {}
    for file in files:
        for name in file.header:
            if name in where:
                raise UserError(f"{file.path}: tensor '{name}' is in {where[name].path.name} too, expected it once")
            where[name] = file
    return where


def _published_names(
    family: Family, config: ModelConfig, where: Mapping[str, SafetensorsFile], folder: Path
) -> dict[str, list[str]]:
    """For each published tensor that this model needs, its name in the files, layer by layer."""
    wanted = set(declare(config))
    needed = [tensor for tensor in family.tensors if wanted & set(tensor.weights)]
    prefix = next((p for p in family.prefixes if p + needed[0].published in where), family.prefixes[0])
    names: dict[str, list[str]] = {tensor.published: [] for tensor in needed}
    for tensor in needed:
        for name in _names(tensor, prefix, config.layers):
            if name not in where:
                raise UserError(
                    f"{folder}: tensor '{name}' is missing, expected of a {family.name} model of this configuration"
                )
            names[tensor.published].append(name)
    used = {name for tensor_names in names.values() for name in tensor_names}
    tied_copy = {
        name for tensor in family.tensors for name in _names(tensor, prefix, 0) if "unembedding" in tensor.weights
    }
    placed = used | tied_copy
    for name in where:
        if name.startswith(prefix) and name not in placed and not name.endswith(family.ignored):
            raise UserError(f"{folder}: tensor '{name}' has no place in a {family.name} model of this configuration")
    return names


def _names(tensor: Tensor, prefix: str, layers: int) -> Iterator[str]:
    """The tensor's names in a file: one a layer, or just one; `^` marks a name that takes no prefix."""
    name = tensor.published[1:] if tensor.published.startswith("^") else prefix + tensor.published
    if "{}" in name:
        yield from (name.format(layer) for layer in range(layers))
    else:
        yield name


def _view(file: SafetensorsFile, name: str, tensor: Tensor, weight: str, config: ModelConfig) -> np.ndarray:
    """The weight inside a published tensor, as a view of it."""
    source = file.tensor(name)
    if not jnp.issubdtype(source.dtype, jnp.floating):
        raise UserError(f"{file.path}: tensor '{name}' is of type {source.dtype}, expected floating-point numbers")
    known = {"H": config.heads, "G": config.key_heads, "K": config.head_size, "c": 3}
    sizes = {axis: size for axis, size in known.items() if axis in tensor.pattern}
    try:
        view = einops.rearrange(source, tensor.pattern, **sizes)
    except einops.EinopsError:
        axes = f"{tensor.pattern.split(' -> ')[0]} with {sizes}"
        raise UserError(f"{file.path}: tensor '{name}' has shape {list(source.shape)}, expected {axes}") from None
    return view[tensor.weights.index(weight)] if len(tensor.weights) > 1 else view


def save_params(
    folder: Path, config: ModelConfig, params: Params, tokenizer: Tokenizer | None, shard_bytes: int
) -> None:
    """Writes a whole model folder; nothing appears under its name before all is written."""
    family = family_of(config)
    dtype = str(params["token_embedding"].dtype)
    raw = write_config(config, dtype)
    with new_folder(folder) as beside:
        _write_shards(beside, family, config, params, shard_bytes)
        write_json(beside / "config.json", raw)
        if tokenizer is not None:
            tokenizer.save(beside, config)


def _write_shards(folder: Path, family: Family, config: ModelConfig, params: Params, shard_bytes: int) -> None:
    shards: list[dict[str, Callable[[], np.ndarray]]] = [{}]
    size = 0
    for name, nbytes, build in _published_tensors(family, config, params):
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


def _published_tensors(
    family: Family, config: ModelConfig, params: Params
) -> Iterator[tuple[str, int, Callable[[], np.ndarray]]]:
    """Name, size and content of every tensor that the family publishes, the content made when it is asked for."""
    for tensor in family.tensors:
        if tensor.weights[0] not in params:
            continue
        parts, stacked = [params[name] for name in tensor.weights], "{}" in tensor.published
        for layer, name in enumerate(_names(tensor, family.prefixes[0], config.layers)):
            nbytes = sum(part.nbytes for part in parts) // (config.layers if stacked else 1)
            yield name, nbytes, partial(_build, tensor, parts, layer if stacked else None)


def _build(tensor: Tensor, parts: list[Array], layer: int | None) -> np.ndarray:
    """A published tensor out of the weights that it holds."""
    before, after = tensor.pattern.split(" -> ")
    arrays = [np.asarray(part if layer is None else part[layer]) for part in parts]
    whole = np.stack(arrays) if len(arrays) > 1 else arrays[0]
    return np.ascontiguousarray(einops.rearrange(whole, f"{after} -> {before}"))
