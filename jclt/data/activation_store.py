"""A store of harvested activations, for training on them over several epochs: two zarr arrays, one chunk per row."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from jclt.errors import UserError
from jclt.files import parse_object

DTYPES = ("bfloat16", "float16", "float32")
CONTEXT: Any = ts.Context()  # all stores of a process share its threads and connections


@dataclass(frozen=True)
class ActivationStore:
    """Arrays `inputs` and `targets` `[rows, L, T, D]`. Processes can read, and write different rows, at once."""

    path: str
    inputs: Any
    targets: Any
    written: Any  # [rows], 1 for rows that are in both arrays

    def __len__(self) -> int:
        return int(self.written.shape[0])

    def find_written(self) -> np.ndarray:
        """Whether each row has been written, `[rows]`."""
        return self.written.read().result().astype(bool)

    def count_written(self) -> int:
        """The number of rows before the first one that is missing: a harvest that was killed goes on there."""
        return int(np.append(self.find_written(), False).argmin())

    def write(self, start: int, inputs: Any, targets: Any) -> None:
        """Writes rows from `start` on, given as arrays `[b, L, T, D]`, and returns when they are stored."""
        values = [np.asarray(x).astype(self.dtype, copy=False) for x in (inputs, targets)]
        rows = slice(start, start + len(values[0]))
        for x in values:
            if x.shape != (rows.stop - start, *self.inputs.shape[1:]) or rows.stop > len(self):
                raise ValueError(f"rows {start} on of shape {x.shape} do not fit into {self.inputs.shape}")
        writes = [array[rows].write(x) for array, x in zip((self.inputs, self.targets), values, strict=True)]
        for write in writes:
            write.result()
        self.written[rows].write(np.ones(rows.stop - start, np.uint8)).result()

    def read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of the rows with these numbers, in this order."""
        if len(index) == 0:
            empty = np.zeros((0, *self.inputs.shape[1:]), self.dtype)
            return empty, empty
        try:
            inputs, targets = (array[ts.d[0][np.asarray(index)]].read() for array in (self.inputs, self.targets))
            return inputs.result(), targets.result()
        except ValueError as error:
            raise UserError(f"store '{self.path}': rows cannot be read ({_shorten_error(error)})") from None

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.inputs.dtype.numpy_dtype


def create_store(
    path: str | Path, description: Mapping[str, Any], rows: int, shape: tuple[int, int, int], dtype: str = "bfloat16"
) -> ActivationStore:
    """Makes a store of `rows` rows of `shape` = (L, T, D), or opens it again to fill it further.

    `description` tells what the activations are made from (model, sites, data). A store that exists already and was
    made from anything else is refused. The path is a folder or a URL for tensorstore, such as `gs://bucket/folder`.
    """
    if dtype not in DTYPES:
        raise UserError(f"store '{path}': dtype '{dtype}', expected one of: {', '.join(DTYPES)}")
    folder = _open_folder(path)
    wanted = {"format": 1, **description, "rows": rows, "shape": list(shape), "dtype": dtype}
    stored = _read_description(folder)
    if stored is None:
        folder.write("description.json", (json.dumps(wanted, indent=2) + "\n").encode()).result()
    else:
        _check_description(path, stored, wanted)
    return _open_arrays(path, folder, wanted, create=True)


def open_store(path: str | Path, description: Mapping[str, Any]) -> ActivationStore:
    """A store that is complete; a store that was not made from `description` is refused."""
    folder = _open_folder(path)
    stored = _read_description(folder)
    if stored is None:
        raise UserError(f"store '{path}': no description.json, expected a store of activations")
    _check_description(path, stored, description)
    store = _open_arrays(path, folder, stored, create=False)
    if not (written := store.find_written()).all():
        raise UserError(f"store '{path}': {written.sum()} of {len(store)} rows are written, expected all of them")
    return store


def _open_arrays(path: str | Path, folder: Any, description: Mapping[str, Any], create: bool) -> ActivationStore:
    rows, shape, dtype = description["rows"], description["shape"], description["dtype"]

    def open_array(name: str, dtype: str, shape: tuple[int, ...], chunk: tuple[int, ...]) -> Any:
        is_flags = name == "written"  # a missing chunk of flags reads as 0; a missing row of activations is an error
        spec = {
            "driver": "zarr3",
            "kvstore": (folder / f"{name}/").spec().to_json(),
            "fill_missing_data_reads": is_flags,
            "store_data_equal_to_fill_value": not is_flags,
        }
        layout = ts.ChunkLayout(chunk_shape=chunk)
        return ts.open(
            spec, create=create, open=True, dtype=ts.dtype(dtype), shape=shape, chunk_layout=layout, context=CONTEXT
        )

    opening = (
        # A chunk is one row, so a batch reads only its rows.
        open_array("inputs", dtype, (rows, *shape), (1, *shape)),
        open_array("targets", dtype, (rows, *shape), (1, *shape)),
        open_array("written", "uint8", (rows,), (256,)),
    )
    try:
        return ActivationStore(str(path), *(array.result() for array in opening))
    except ValueError as error:
        raise UserError(f"store '{path}': cannot be opened ({_shorten_error(error)})") from None


def _open_folder(path: str | Path) -> Any:
    url = f"{str(path).rstrip('/')}/"
    spec = url if "://" in url else {"driver": "file", "path": f"{Path(path).expanduser().absolute()}/"}
    try:
        return ts.KvStore.open(spec, context=CONTEXT).result()
    except ValueError as error:
        raise UserError(f"store '{path}': cannot be opened ({_shorten_error(error)})") from None


def _read_description(folder: Any) -> dict[str, Any] | None:
    file = folder.read("description.json").result()
    return parse_object(file.value, f"{folder.path}description.json") if file.state == "value" else None


def _check_description(path: str | Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, value in json.loads(json.dumps(dict(wanted))).items():
        if name not in stored:
            raise UserError(f"store '{path}': does not say with which {name} it was made, expected {name}={value}")
        if stored[name] != value:
            raise UserError(f"store '{path}': was made with {name}={stored[name]}, expected {name}={value}")


def _shorten_error(error: Exception) -> str:
    """The message of tensorstore, without the specification that follows it."""
    return str(error).split(" [", 1)[0]
