"""The weights of coder files under their published names: views of the files, placed on devices, and written."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jclt import array_files
from jclt.array_files import NpzFile, SafetensorsFile
from jclt.coders.coder import CoderLayer, SparseCoder, abstract_coder
from jclt.coders.config import CoderConfig
from jclt.errors import UserError
from jclt.memory import check_memory
from jclt.mesh import fetched
from jclt.models.ops import finite_rows
from jclt.models.weights import bytes_at_once
from jclt.shapes import Array, ArrayLike, DTypeLike

Names = Mapping[str, tuple[str, str]]
"""For each weight its published name, with `{}` where the layer's number stands, and how its axes become ours."""


TensorFile = SafetensorsFile | NpzFile


def open_file(path: Path) -> TensorFile:
    if not os.path.lexists(path):
        raise UserError(f"{path}: not found, expected beside the coder's other files")
    return NpzFile(path) if path.suffix == ".npz" else SafetensorsFile(path)


class Source(NamedTuple):
    """A weight on disk in our axes, often a view, and what to call it in an error."""

    array: np.ndarray
    name: str
    file: TensorFile


IGNORED = ("scaling_factor",)  # idle unless the settings say otherwise


def unchanged(weight: str, array: np.ndarray) -> np.ndarray:
    return array


@dataclass(frozen=True)
class LayerSource:
    """One layer of a coder on disk; `change(weight, array)` makes of what is stored what we mean by it."""

    number: int
    files: tuple[TensorFile, ...]
    names: Names
    change: Callable[[str, np.ndarray], np.ndarray] = unchanged
    first_row: int = 0
    """Of the decoder: rows before it write to no layer."""
    settings: tuple[str, ...] = ()
    """Names of tensors that hold no weights, and are read elsewhere."""

    def has(self, weight: str) -> bool:
        return weight in self.names and any(self._name(weight) in file.header for file in self.files)

    def __getitem__(self, weight: str) -> Source:
        name, file = self.locate(weight)
        array = file.tensor(name)
        return Source(self.change(weight, self._ours(weight, array)), name, file)

    def shape(self, weight: str) -> tuple[int, ...]:
        """In our axes, before any memory is taken for its numbers."""
        name, file = self.locate(weight)
        shape, dtype = stored_shape(file, name)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise UserError(f"{file.path}: tensor '{name}' is of type {dtype}, expected floating-point numbers")
        return self._ours(weight, np.broadcast_to(np.zeros((), np.bool_), shape)).shape

    def locate(self, weight: str) -> tuple[str, TensorFile]:
        if not self.has(weight):
            paths = " and ".join(str(file.path) for file in self.files)
            name = f"tensor '{self._name(weight)}'" if weight in self.names else f"the {weight}"
            raise UserError(f"{paths}: {name} is missing, expected of this coder's layer {self.number}")
        name = self._name(weight)
        return name, next(file for file in self.files if name in file.header)

    def _ours(self, weight: str, array: np.ndarray) -> np.ndarray:
        """A view in our axes."""
        axes = self.names[weight][1]
        try:
            ours = einops.rearrange(array, axes)
        except einops.EinopsError:
            name, file = self.locate(weight)
            shape, wanted = list(array.shape), axes.split(" -> ")[0]
            raise UserError(f"{file.path}: tensor '{name}' has shape {shape}, expected the axes {wanted}") from None
        return ours[:, self.first_row :] if weight == "decoder" else ours

    def check_used(self, weights: Iterable[str]) -> None:
        """An error naming the first tensor that these weights leave unread: it would mean another coder."""
        used = {self._name(weight) for weight in weights if weight in self.names}
        for file in self.files:
            for name in file.header:
                if name not in used and name not in (*IGNORED, *self.settings):
                    raise UserError(f"{file.path}: tensor '{name}' has no place in this coder, expected {sorted(used)}")

    def _name(self, weight: str) -> str:
        return self.names[weight][0].format(self.number)


def stored_shape(file: TensorFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """A tensor's shape and type as its file's header says."""
    if isinstance(file, NpzFile):
        return file.shape(name)
    entry = file.header[name]
    return tuple(entry["shape"]), np.dtype(array_files.DTYPES[entry["dtype"]])


class Found(NamedTuple):
    """What a folder holds; its sites are empty where nothing in it names them."""

    config: CoderConfig
    layers: list[LayerSource]


def found(layers: Iterable[LayerSource], **said: Any) -> Found:
    """What the tensors say of a coder, beside what is said of it elsewhere."""
    layers = list(layers)
    shape = layers[0].shape("encoder")
    threshold = any(layer.has("threshold") for layer in layers)
    rule = "topk" if said.get("k") is not None else "jumprelu" if threshold else "relu"
    known = {"activation": rule, "skip": any(layer.has("skip") for layer in layers)}
    numbers = tuple(layer.number for layer in layers)
    return Found(CoderConfig(**known | said, features=shape[0], width=shape[-1], layers=numbers), layers)


def place(config: CoderConfig, layers: list[LayerSource], dtype: DTypeLike, mesh: Mesh | None) -> SparseCoder:
    """The coder with each weight read from its file straight to its place on the mesh, one piece at a time."""

    def check(path: tuple[Any, ...], target: jax.ShapeDtypeStruct) -> None:
        weight, layer = path[-1].name, layers[path[1].idx]
        if (shape := layer.shape(weight)) != target.shape:
            name, file = layer.locate(weight)
            shapes = f"{list(shape)}, expected {list(target.shape)}"
            raise UserError(f"{file.path}: tensor '{name}' gives the {weight} the shape {shapes}")

    def read(path: tuple[Any, ...], target: jax.ShapeDtypeStruct) -> Array:
        source = layers[path[1].idx][path[-1].name]

        def piece(index: Any) -> np.ndarray:
            array = source.array[index]
            narrow = clipped(array, dtype) if path[-1].name == "threshold" else array
            with np.errstate(over="ignore"):  # seen below
                return narrow.astype(dtype, order="C")  # a copy: no array may hang on the file

        if target.sharding is None:
            array = jax.device_put(piece(...))
        else:
            array = jax.make_array_from_callback(target.shape, target.sharding, piece)
        finite = fetched(finite_rows(array)).all()
        source.file.forget_pages()
        if not finite:
            what = f"{source.file.path}: tensor '{source.name}'"
            raise UserError(f"{what} holds NaN or infinity as {np.dtype(dtype)}, expected finite numbers")
        return array

    target = abstract_coder(config, mesh, dtype)
    for layer, own in zip(layers, target.layers, strict=True):
        read_weights = [name for name, leaf in vars(own).items() if leaf is not None]
        layer.check_used([*read_weights, "decoder"])  # of tied ones the decoder is a copy
    jax.tree_util.tree_map_with_path(check, target)
    remedy = "dtype='bfloat16' takes half of float32, a mesh spreads it"
    check_memory(bytes_at_once(jax.tree.leaves(target)), f"coder {layers[0].files[0].path.parent}", remedy)
    return jax.tree_util.tree_map_with_path(read, target)


def weights(layer: CoderLayer) -> dict[str, Array]:
    """A layer's weights by name; the decoder too where it is the encoder, for readers that know no tied ones."""
    named = {name: getattr(layer, name) for name in ("encoder", "encoder_bias", "threshold", "decoder_bias", "skip")}
    return {name: array for name, array in named.items() if array is not None} | {"decoder": layer.rows}


def published(arrays: Mapping[str, ArrayLike], names: Names, number: int = 0) -> dict[str, np.ndarray]:
    """The weights under their published names and in their published axes."""
    tensors = {}
    for weight, array in arrays.items():
        name, axes = names[weight]
        tensors[name.format(number)] = einops.rearrange(fetched(array), " -> ".join(reversed(axes.split(" -> "))))
    return tensors


def clipped(array: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Finite numbers held to a type's range: the threshold of a feature that writes next to nothing exceeds
    float16's."""
    largest = float(jnp.finfo(dtype).max)
    if largest >= float(jnp.finfo(array.dtype).max):
        return array
    return np.where(np.isfinite(array), np.clip(array, -largest, largest), array)


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], dtype: DTypeLike) -> None:
    narrow, largest = {}, float(jnp.finfo(dtype).max)
    for name, array in tensors.items():
        own = clipped(array, dtype) if "threshold" in name else array
        if own.size and largest < float(jnp.finfo(own.dtype).max) and np.abs(own).max() > largest:
            raise UserError(
                f"{path.name}: tensor '{name}' exceeds {np.dtype(dtype)}, expected a dtype of a wider range"
            )
        narrow[name] = np.ascontiguousarray(own.astype(dtype))
    array_files.write_tensors(path, narrow)
