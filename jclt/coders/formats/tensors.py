"""Weights in coder files, under their published names: viewed, loaded onto devices, and written."""

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
from jclt.mesh import fetch_to_host
from jclt.models.ops import find_finite_rows
from jclt.shapes import Array, ArrayLike, DTypeLike

DTYPES = ("float32", "bfloat16", "float16")
"""The types that a coder's weights may have."""

Names = Mapping[str, tuple[str, str]]
"""For each of our weights its published name, with `{}` for the layer's number, and how its axes become ours."""


TensorFile = SafetensorsFile | NpzFile


def open_file(path: Path) -> TensorFile:
    if not os.path.lexists(path):
        raise UserError(f"{path}: not found, expected beside the coder's other files")
    return NpzFile(path) if path.suffix == ".npz" else SafetensorsFile(path)


IGNORED_TENSORS = ("scaling_factor",)  # without effect unless the settings turn it on


def keep_unchanged(weight: str, array: np.ndarray) -> np.ndarray:
    return array


@dataclass(frozen=True)
class StoredLayer:
    """One layer of a coder on disk. `change(weight, array)` converts a stored weight to our conventions; a decoder may
    be some of its rows."""

    number: int
    files: tuple[TensorFile, ...]
    names: Names
    change: Callable[[str, np.ndarray], np.ndarray] = keep_unchanged
    computes: bool = False
    """Whether `change` computes new numbers, which are kept in float32."""
    first_row: int = 0
    """The first decoder row that is used; rows before it write to no layer."""
    settings: tuple[str, ...] = ()
    """Names of tensors that hold settings in place of weights."""

    def has(self, weight: str) -> bool:
        return weight in self.names and any(self._name(weight) in file.header for file in self.files)

    def view(self, weight: str, rows: Any = ...) -> np.ndarray:
        """A weight in our axes, or some rows of it. Other rows are not read, unless they lie in a compressed archive;
        and of plain tensors nothing is, before the view's numbers are used."""
        name, file = self.locate(weight)
        array = self._to_our_axes(weight, file.read_tensor(name))
        return self.change(weight, array if rows is ... else array[rows])

    def read(self, weight: str, dtype: DTypeLike, rows: Any = ...) -> np.ndarray:
        """A copy of a weight, or of some rows, in this type."""
        copy = copy_to_type(self.view(weight, rows), dtype, weight)
        self.locate(weight)[1].forget_pages()
        return copy

    def shape(self, weight: str) -> tuple[int, ...]:
        """The shape in our axes; no numbers are read."""
        name, file = self.locate(weight)
        shape, dtype = file.read_shape(name)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise UserError(f"{file.path}: tensor '{name}' is of type {dtype}, expected floating-point numbers")
        return self._to_our_axes(weight, np.broadcast_to(np.zeros((), np.bool_), shape)).shape

    def dtype(self, weight: str) -> np.dtype[Any]:
        """The type that a weight is kept in: the stored one, if it is one of `DTYPES` and holds what is read."""
        name, file = self.locate(weight)
        stored = file.read_shape(name)[1]
        return np.dtype(np.float32) if self.computes or stored.name not in DTYPES else stored

    def locate(self, weight: str) -> tuple[str, TensorFile]:
        if not self.has(weight):
            paths = " and ".join(str(file.path) for file in self.files)
            name = f"tensor '{self._name(weight)}'" if weight in self.names else f"the {weight}"
            raise UserError(f"{paths}: {name} is missing, expected of this coder's layer {self.number}")
        name = self._name(weight)
        return name, next(file for file in self.files if name in file.header)

    def _to_our_axes(self, weight: str, array: np.ndarray) -> np.ndarray:
        """A view of the array in our axes."""
        axes = self.names[weight][1]
        try:
            ours = einops.rearrange(array, axes)
        except einops.EinopsError:
            name, file = self.locate(weight)
            shape, wanted = list(array.shape), axes.split(" -> ")[0]
            raise UserError(f"{file.path}: tensor '{name}' has shape {shape}, expected the axes {wanted}") from None
        return ours[:, self.first_row :] if weight == "decoder" else ours

    def report_not_finite(self, weight: str, dtype: DTypeLike) -> UserError:
        name, file = self.locate(weight)
        return UserError(
            f"{file.path}: tensor '{name}' holds NaN or infinity as {np.dtype(dtype)}, expected finite numbers"
        )

    def check_used(self, weights: Iterable[str]) -> None:
        """Raises an error if a tensor belongs to none of these weights: the coder would then not be the stored one."""
        used = {self._name(weight) for weight in weights if weight in self.names}
        for file in self.files:
            for name in file.header:
                if name not in used and name not in (*IGNORED_TENSORS, *self.settings):
                    raise UserError(f"{file.path}: tensor '{name}' has no place in this coder, expected {sorted(used)}")

    def _name(self, weight: str) -> str:
        return self.names[weight][0].format(self.number)


class StoredCoder(NamedTuple):
    """A coder whose weights are still on disk. Its sites are empty if the files do not name them."""

    config: CoderConfig
    layers: list[StoredLayer]


def describe_coder(layers: Iterable[StoredLayer], **settings: Any) -> StoredCoder:
    """A stored coder with sizes and rule taken from its tensors, unless `settings` give them."""
    layers = list(layers)
    shape = layers[0].shape("encoder")
    has_threshold = any(layer.has("threshold") for layer in layers)
    activation = "topk" if settings.get("k") is not None else "jumprelu" if has_threshold else "relu"
    from_tensors = {"activation": activation, "skip": any(layer.has("skip") for layer in layers)}
    numbers = tuple(layer.number for layer in layers)
    return StoredCoder(
        CoderConfig(**from_tensors | settings, features=shape[0], width=shape[-1], layers=numbers), layers
    )


def declare_stored(stored: StoredCoder, dtype: DTypeLike | None, mesh: Mesh | None = None) -> SparseCoder:
    """The shapes, types and shardings of a stored coder's weights; an error of one line where its files hold others
    than its settings say. No weight is read. `dtype` stands for the stored types."""
    config, layers = stored

    def declare(path: tuple[Any, ...], target: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        weight, layer = path[-1].name, layers[path[1].idx]
        if (shape := layer.shape(weight)) != target.shape:
            name, file = layer.locate(weight)
            shapes = f"{list(shape)}, expected {list(target.shape)}"
            raise UserError(f"{file.path}: tensor '{name}' gives the {weight} the shape {shapes}")
        kept = layer.dtype(weight) if dtype is None else dtype
        return jax.ShapeDtypeStruct(target.shape, kept, sharding=target.sharding)

    target = abstract_coder(config, mesh)
    for layer, weights in zip(layers, target.layers, strict=True):
        names = [name for name, leaf in vars(weights).items() if leaf is not None]
        layer.check_used([*names, "decoder"])  # where it is tied, files may hold a copy of the encoder
    return jax.tree_util.tree_map_with_path(declare, target)


def load_weights(stored: StoredCoder, target: SparseCoder) -> SparseCoder:
    """The coder with its weights loaded as `declare_stored` says. With a mesh each shard is read separately, straight
    to its device."""

    def read(path: tuple[Any, ...], target: jax.ShapeDtypeStruct) -> Array:
        weight, layer = path[-1].name, stored.layers[path[1].idx]
        if target.sharding is None:
            array = jax.device_put(layer.read(weight, target.dtype))
        else:
            view = layer.view(weight)
            array = jax.make_array_from_callback(
                target.shape, target.sharding, lambda index: copy_to_type(view[index], target.dtype, weight)
            )
            layer.locate(weight)[1].forget_pages()
        if not fetch_to_host(find_finite_rows(array)).all():
            raise layer.report_not_finite(weight, target.dtype)
        return array

    return jax.tree_util.tree_map_with_path(read, target)


def weights_by_name(layer: CoderLayer) -> dict[str, Array]:
    """A layer's weights by name; the decoder also where it is tied, since published layouts know no tied decoders."""
    weights = {name: getattr(layer, name) for name in ("encoder", "encoder_bias", "threshold", "decoder_bias", "skip")}
    return {name: array for name, array in weights.items() if array is not None} | {"decoder": layer.decoder_rows}


def to_published(arrays: Mapping[str, ArrayLike], names: Names, number: int = 0) -> dict[str, np.ndarray]:
    """The weights under their published names and in their published axes."""
    tensors = {}
    for weight, array in arrays.items():
        name, axes = names[weight]
        tensors[name.format(number)] = einops.rearrange(fetch_to_host(array), " -> ".join(reversed(axes.split(" -> "))))
    return tensors


def copy_to_type(array: np.ndarray, dtype: DTypeLike, weight: str) -> np.ndarray:
    """A copy, since no array may keep a view of a file. Numbers beyond the range of the type become infinite, but for
    thresholds."""
    narrow = clip_to_type(array, dtype) if weight == "threshold" else array
    with np.errstate(over="ignore"):  # found by `find_finite_rows`
        return narrow.astype(dtype, order="C")


def clip_to_type(array: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Finite numbers clipped to the range of a type: the threshold of a feature that writes almost nothing may exceed
    the range of float16."""
    largest = float(jnp.finfo(dtype).max)
    if largest >= float(jnp.finfo(array.dtype).max):
        return array
    return np.where(np.isfinite(array), np.clip(array, -largest, largest), array)


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], dtype: DTypeLike) -> None:
    narrow, largest = {}, float(jnp.finfo(dtype).max)
    for name, array in tensors.items():
        in_range = clip_to_type(array, dtype) if "threshold" in name else array
        if in_range.size and largest < float(jnp.finfo(in_range.dtype).max) and np.abs(in_range).max() > largest:
            raise UserError(
                f"{path.name}: tensor '{name}' exceeds {np.dtype(dtype)}, expected a dtype of a wider range"
            )
        narrow[name] = np.ascontiguousarray(in_range.astype(dtype))
    array_files.write_tensors(path, narrow)
