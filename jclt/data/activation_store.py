"""A store of harvested activations, for several epochs over the same ones: two zarr arrays, one chunk a row."""

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
CONTEXT: Any = ts.Context()  # one for all, so that every store of a process shares its threads and connections


@dataclass(frozen=True)
class ActivationStore:
    """Arrays `inputs` and `targets` `[rows, L, T, D]`. Every process may read and write rows, each its own."""

    path: str
    inputs: Any
    targets: Any
    written: Any  # [rows], 1 where both arrays hold the row

    def __len__(self) -> int:
        return int(self.written.shape[0])

    @property
    def done(self) -> np.ndarray:
        """For each row whether it has been written."""
        return self.written.read().result().astype(bool)

    @property
    def finished(self) -> int:
        """How many rows are written from the first one on: where a harvest that was killed goes on."""
        return int(np.append(self.done, False).argmin())

    def write(self, start: int, inputs: Any, targets: Any) -> None:
        """Writes the rows from `start` on, given as arrays `[b, L, T, D]`; on return they are there."""
        given = [np.asarray(x).astype(self.dtype, copy=False) for x in (inputs, targets)]
        rows = slice(start, start + len(given[0]))
        for x in given:
            if x.shape != (rows.stop - start, *self.inputs.shape[1:]) or rows.stop > len(self):
                raise ValueError(f"rows {start} on of shape {x.shape} do not fit into {self.inputs.shape}")
        writes = [array[rows].write(x) for array, x in zip((self.inputs, self.targets), given, strict=True)]
        for write in writes:
            write.result()
        self.written[rows].write(np.ones(rows.stop - start, np.uint8)).result()

    def read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows of these numbers, in this order."""
        if len(index) == 0:
            empty = np.zeros((0, *self.inputs.shape[1:]), self.dtype)
            return empty, empty
        try:
            inputs, targets = (array[ts.d[0][np.asarray(index)]].read() for array in (self.inputs, self.targets))
            return inputs.result(), targets.result()
        except ValueError as error:
            raise UserError(f"store '{self.path}': rows cannot be read ({_brief(error)})") from None

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.inputs.dtype.numpy_dtype


def create_store(
    path: str | Path, description: Mapping[str, Any], rows: int, shape: tuple[int, int, int], dtype: str = "bfloat16"
) -> ActivationStore:
    """Makes a store of `rows` rows of `shape` = (L, T, D), or opens the same one again to go on filling it.

    `description` says what the activations are made from (model, sites, data); a store made from anything else is
    refused. The path is a folder or a URL of tensorstore, such as `gs://bucket/folder`.
    """
    if dtype not in DTYPES:
        raise UserError(f"store '{path}': dtype '{dtype}', expected one of: {', '.join(DTYPES)}")
    folder = _folder(path)
    wanted = {"format": 1, **description, "rows": rows, "shape": list(shape), "dtype": dtype}
    found = _description(folder)
    if found is None:
        folder.write("description.json", (json.dumps(wanted, indent=2) + "\n").encode()).result()
    else:
        _check(path, found, wanted)
    return _store(path, folder, wanted, create=True)


def open_store(path: str | Path, description: Mapping[str, Any]) -> ActivationStore:
    """A store that has been filled, checked against what it should be made from."""
    folder = _folder(path)
    found = _description(folder)
    if found is None:
        raise UserError(f"store '{path}': no description.json, expected a store of activations")
    _check(path, found, description)
    store = _store(path, folder, found, create=False)
    if not (done := store.done).all():
        raise UserError(f"store '{path}': {done.sum()} of {len(store)} rows are written, expected all of them")
    return store


def _store(path: str | Path, folder: Any, description: Mapping[str, Any], create: bool) -> ActivationStore:
    rows, shape, dtype = description["rows"], description["shape"], description["dtype"]

    def array(name: str, dtype: str, shape: tuple[int, ...], chunk: tuple[int, ...]) -> Any:
        flags = name == "written"  # what was never written reads as 0 there; of activations it is an error
        spec = {
            "driver": "zarr3",
            "kvstore": (folder / f"{name}/").spec().to_json(),
            "fill_missing_data_reads": flags,
            "store_data_equal_to_fill_value": not flags,
        }
        layout = ts.ChunkLayout(chunk_shape=chunk)
        return ts.open(
            spec, create=create, open=True, dtype=ts.dtype(dtype), shape=shape, chunk_layout=layout, context=CONTEXT
        )

    opening = (
        # A chunk is one row, so that a batch of any rows reads only those.
        array("inputs", dtype, (rows, *shape), (1, *shape)),
        array("targets", dtype, (rows, *shape), (1, *shape)),
        array("written", "uint8", (rows,), (256,)),
    )
    try:
        return ActivationStore(str(path), *(array.result() for array in opening))
    except ValueError as error:
        raise UserError(f"store '{path}': cannot be opened ({_brief(error)})") from None


def _folder(path: str | Path) -> Any:
    url = f"{str(path).rstrip('/')}/"
    spec = url if "://" in url else {"driver": "file", "path": f"{Path(path).expanduser().absolute()}/"}
    try:
        return ts.KvStore.open(spec, context=CONTEXT).result()
    except ValueError as error:
        raise UserError(f"store '{path}': cannot be opened ({_brief(error)})") from None


def _description(folder: Any) -> dict[str, Any] | None:
    found = folder.read("description.json").result()
    return parse_object(found.value, f"{folder.path}description.json") if found.state == "value" else None


def _check(path: str | Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, value in json.loads(json.dumps(dict(wanted))).items():
        if name not in found:
            raise UserError(f"store '{path}': does not say with which {name} it was made, expected {name}={value}")
        if found[name] != value:
            raise UserError(f"store '{path}': was made with {name}={found[name]}, expected {name}={value}")


def _brief(error: Exception) -> str:
    """What tensorstore says, without the specification that it adds."""
    return str(error).split(" [", 1)[0]
