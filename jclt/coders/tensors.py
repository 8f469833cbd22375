"""The weights of coder files under their published names: views of the files, placed on devices, and written."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jclt import files
from jclt.coders.coder import CoderLayer, SparseCoder, abstract_coder
from jclt.coders.config import CoderConfig
from jclt.errors import UserError
from jclt.files import NpzFile, SafetensorsFile
from jclt.shapes import Array, ArrayLike, DTypeLike
from jclt.sharding import fetched

Names = Mapping[str, tuple[str, str]]
"""For each weight its published name, with `{}` where the layer's number stands, and how its axes become ours."""


TensorFile = SafetensorsFile | NpzFile


def open_file(path: Path) -> TensorFile:
    if not path.is_file():
        raise UserError(f"{path}: not found, expected beside the coder's other files")
    return NpzFile(path) if path.suffix == ".npz" else SafetensorsFile(path)


class Source(NamedTuple):
    """A weight on disk in our axes, often a view, and what to call it in an error."""

    array: np.ndarray
    name: str
    file: TensorFile


IGNORED = ("k", "scaling_factor")  # the first is in the settings too, the second idle unless they say otherwise


def unchanged(weight: str, array: np.ndarray) -> np.ndarray:
    return array


@dataclass(frozen=True)
class LayerSource:
    """One layer of a coder on disk; `change(weight, array)` makes of what is stored what we mean by it."""

    number: int
    files: tuple[TensorFile, ...]
    names: Names
    change: Callable[[str, np.ndarray], np.ndarray] = unchanged

    def has(self, weight: str) -> bool:
        return weight in self.names and any(self._name(weight) in file.header for file in self.files)

    def __getitem__(self, weight: str) -> Source:
        if not self.has(weight):
            paths = " and ".join(str(file.path) for file in self.files)
            name = f"tensor '{self._name(weight)}'" if weight in self.names else f"the {weight}"
            raise UserError(f"{paths}: {name} is missing, expected of this coder's layer {self.number}")
        name, axes = self._name(weight), self.names[weight][1]
        file = next(file for file in self.files if name in file.header)
        array = file.tensor(name)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"{file.path}: tensor '{name}' is of type {array.dtype}, expected floating-point numbers")
        try:
            return Source(self.change(weight, einops.rearrange(array, axes)), name, file)
        except einops.EinopsError:
            wanted = axes.split(" -> ")[0]
            shape = list(array.shape)
            raise UserError(f"{file.path}: tensor '{name}' has shape {shape}, expected the axes {wanted}") from None

    def check_used(self, weights: Iterable[str]) -> None:
        """An error naming the first tensor that these weights leave unread: it would mean another coder."""
        used = {self._name(weight) for weight in weights}
        for file in self.files:
            for name in file.header:
                if name not in used and name not in IGNORED:
                    raise UserError(f"{file.path}: tensor '{name}' has no place in this coder, expected {sorted(used)}")

    def _name(self, weight: str) -> str:
        return self.names[weight][0].format(self.number)


class Found(NamedTuple):
    """What a folder holds; its sites are empty where nothing in it names them."""

    config: CoderConfig
    layers: list[LayerSource]


def found(layers: Iterable[LayerSource], **said: Any) -> Found:
    """What the tensors say of a coder, beside what is said of it elsewhere."""
    layers = list(layers)
    shape = layers[0]["encoder"].array.shape
    threshold = any(layer.has("threshold") for layer in layers)
    rule = "topk" if said.get("k") is not None else "jumprelu" if threshold else "relu"
    known = {"activation": rule, "skip": any(layer.has("skip") for layer in layers)}
    numbers = tuple(layer.number for layer in layers)
    return Found(CoderConfig(**known | said, features=shape[0], width=shape[-1], layers=numbers), layers)


def place(config: CoderConfig, layers: list[LayerSource], dtype: DTypeLike, mesh: Mesh | None) -> SparseCoder:
    """The coder with each weight read from its file straight to its place on the mesh, one piece at a time."""

    def read(path: tuple[Any, ...], target: jax.ShapeDtypeStruct) -> Array:
        weight = path[-1].name
        source = layers[path[1].idx][weight]
        if source.array.shape != target.shape:
            shapes = f"{list(source.array.shape)}, expected {list(target.shape)}"
            raise UserError(f"{source.file.path}: tensor '{source.name}' gives the {weight} the shape {shapes}")

        def piece(index: Any) -> np.ndarray:
            return source.array[index].astype(dtype, order="C")  # a copy: no array may hang on the file

        if target.sharding is None:
            array = jax.device_put(piece(...))
        else:
            array = jax.make_array_from_callback(target.shape, target.sharding, piece)
        array.block_until_ready()
        source.file.forget_pages()
        return array

    target = abstract_coder(config, mesh, dtype)
    for layer, own in zip(layers, target.layers, strict=True):
        read_weights = [name for name, leaf in vars(own).items() if leaf is not None]
        layer.check_used([*read_weights, "decoder"])  # of tied ones the decoder is a copy
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


def within(array: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """In this type, held to its range: the threshold of a feature that writes next to nothing exceeds float16's."""
    largest = float(jnp.finfo(dtype).max)
    return (array if largest >= float(jnp.finfo(array.dtype).max) else np.clip(array, -largest, largest)).astype(dtype)


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], dtype: DTypeLike) -> None:
    files.write_tensors(path, {name: np.ascontiguousarray(within(array, dtype)) for name, array in tensors.items()})
