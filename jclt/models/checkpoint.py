"""Models on disk in the Hugging Face layout: `config.json`, one or many `.safetensors`, a tokenizer's files."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import einops
import jax
import numpy as np
from jax.sharding import Mesh

from jclt.errors import UserError
from jclt.files import SafetensorsFile, new_folder, read_json, write_json, write_tensors
from jclt.models.config import ModelConfig
from jclt.models.families import Family, Tensor
from jclt.models.published import family_of, read_config, write_config
from jclt.models.tokenizer import Tokenizer
from jclt.models.weights import abstract_params, declare
from jclt.shapes import Array, DTypeLike, Params


def load_config(folder: Path) -> ModelConfig:
    raw = read_json(folder / "config.json")
    # Chat models list there what else ends an answer.
    if (folder / "generation_config.json").exists():
        raw |= {k: v for k, v in read_json(folder / "generation_config.json").items() if k == "eos_token_id"}
    return read_config(raw, str(folder / "config.json"))


def load_params(folder: Path, config: ModelConfig, dtype: DTypeLike, mesh: Mesh | None = None) -> dict[str, Array]:
    """Every weight, read from the memory map straight to its place on the mesh, one piece at a time."""
    files = _open_files(folder)
    where = {name: file for file in files for name in file.header}
    family = family_of(config)
    names = _published_names(family, config, where, folder)
    params = {}
    for weight, target in abstract_params(config, mesh, dtype).items():
        tensor = next(tensor for tensor in family.tensors if weight in tensor.weights)
        sources = [(where[name], _view(where[name], name, tensor, weight, config)) for name in names[tensor.published]]
        stacked = "{}" in tensor.published
        expected = target.shape[1:] if stacked else target.shape
        for (file, view), name in zip(sources, names[tensor.published], strict=True):
            if view.shape != expected:
                shapes = f"{list(view.shape)}, expected {list(expected)}"
                raise UserError(f"{file.path}: tensor '{name}' gives weight '{weight}' the shape {shapes}")
        piece = partial(_piece, sources, stacked, dtype)
        if target.sharding is None:
            params[weight] = jax.device_put(piece((slice(None),) * len(target.shape)))
        else:
            params[weight] = jax.make_array_from_callback(target.shape, target.sharding, piece)
        params[weight].block_until_ready()
    return params


def _piece(
    sources: list[tuple[SafetensorsFile, np.ndarray]], stacked: bool, dtype: DTypeLike, index: Any
) -> np.ndarray:
    """The part of a weight that one device holds, read layer by layer where layers are stacked."""
    within = index[1:] if stacked else index
    chosen = sources[index[0]] if stacked else sources
    out = _aligned((len(chosen), *chosen[0][1][within].shape), np.dtype(dtype))
    for row, (file, view) in zip(out, chosen, strict=True):
        row[...] = view[within]
        file.forget_pages()
    return out if stacked else out[0]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that starts where a CPU device takes it as it is; any other would be copied once more."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


def _open_files(folder: Path) -> list[SafetensorsFile]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        paths = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    else:
        whole = folder / "model.safetensors"
        paths = [whole] if whole.exists() else sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UserError(f"{folder}: no .safetensors file found, expected model.safetensors")
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: not found, though {index.name} names it")
    return [SafetensorsFile(path) for path in paths]


def _published_names(
    family: Family, config: ModelConfig, where: Mapping[str, SafetensorsFile], folder: Path
) -> dict[str, list[str]]:
    """For each published tensor that this model needs, its name in the files, layer by layer."""
    wanted = set(declare(config))
    needed = [tensor for tensor in family.tensors if wanted & set(tensor.weights)]
    prefix = next((p for p in family.prefixes if p + needed[0].published in where), family.prefixes[0])
    names = {tensor.published: list(_names(tensor, prefix, config.layers)) for tensor in needed}
    for tensor_names in names.values():
        for name in tensor_names:
            if name not in where:
                raise UserError(
                    f"{folder}: tensor '{name}' is missing, expected of a {family.name} model of this configuration"
                )
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
